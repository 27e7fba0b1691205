"""What is said of each GPU, from what its reader tells. No I/O here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from shaper.core.types import ClockEventReasons, GpuIdentity, GpuSample
from shaper.doctor.findings import Checks, Finding, plain
from shaper.errors import ConfigError
from shaper.gpu.capabilities import INTEGRATED, GpuCapabilities
from shaper.gpu.meter_properties import MeterFacts
from shaper.gpu.profiles import known_profiles, load_profile, profile_for_device
from shaper.gpu.validation import SampleValidator

SECTION = "GPUs"
NO_GPU_ADVICE = (
    "without a GPU: shaper serve MODEL --emulate h200-sxm serves an emulated one, and "
    "--shaper-off serves unshaped. With one: is nvidia-smi well? A container needs --gpus all and "
    "NVIDIA_DRIVER_CAPABILITIES with utility"
)
# The sampler reads every 20 ms.
_SAMPLER_SECONDS = 0.02
_LOST_ADVICE = (
    "an engine will take this sensor for lost, and keep 5% of each limit free: look at dmesg for "
    "Xid errors, reset the GPU, or update its driver"
)
# A load step heats a die by some degrees within a second.
_NEAR_SLOWDOWN_CELSIUS = 5.0
# Meters refresh every 100 ms at the slowest known, and 8 intervals are wanted.
LEAST_METER_SECONDS = 1.0
_LIMIT_SLACK_WATTS = 1.0
# What the shaper steers by; from which source it comes is shown for these.
_METERED = ("instant_watts", "average_watts", "energy_joules")

REASON_WORDS: Mapping[ClockEventReasons, str] = {
    ClockEventReasons.GPU_IDLE: "idle",
    ClockEventReasons.APPLICATIONS_CLOCKS_SETTING: "application clocks are set",
    ClockEventReasons.SW_POWER_CAP: "at its power cap",
    ClockEventReasons.HW_SLOWDOWN: "slowed down by hardware",
    ClockEventReasons.SYNC_BOOST: "in a sync boost group",
    ClockEventReasons.SW_THERMAL_SLOWDOWN: "slowed down for heat by the driver",
    ClockEventReasons.HW_THERMAL_SLOWDOWN: "slowed down for heat by hardware",
    ClockEventReasons.HW_POWER_BRAKE_SLOWDOWN: "slowed down by the power brake",
    ClockEventReasons.DISPLAY_CLOCK_SETTING: "display clocks are set",
}
_HEAT = ClockEventReasons.SW_THERMAL_SLOWDOWN | ClockEventReasons.HW_THERMAL_SLOWDOWN
_BRAKE = ClockEventReasons.HW_POWER_BRAKE_SLOWDOWN
_UNIT_ENDINGS = ("_watts", "_joules", "_hertz", "_celsius", "_seconds")


def checks_of(gpu: GpuCapabilities) -> Checks:
    """Makes this GPU's findings."""
    return Checks(SECTION, f"GPU {gpu.gpu.index}")


def model(gpu: GpuCapabilities, gpu_profile: str | None) -> Finding:
    """Which GPU it is, and whether a profile describes it.

    Args:
        gpu: the GPU.
        gpu_profile: what the environment's settings name; None: the driver's name decides.
    """
    checks, name = checks_of(gpu), plain(gpu.gpu.name, 60)
    data = {"name": gpu.gpu.name, "uuid": gpu.gpu.uuid, "mig": gpu.mig}
    try:
        named = None if gpu_profile is None else load_profile(gpu_profile)
    except ConfigError as error:
        return checks.fail("gpu.profile", f"{name}: {error}", "correct gpu_profile", **data)
    profile = named or profile_for_device(gpu.gpu.name)
    if profile is None:
        return checks.fail(
            "gpu.profile",
            f"{name}: no profile describes it",
            f"set gpu_profile to the nearest of {', '.join(known_profiles())}, or fit one of its "
            "own with shaper fit (docs/profiles.md)",
            **data,
            profile=None,
        )
    how = "" if named is None else " (by gpu_profile)"
    return checks.ok(
        "gpu.profile", f"{name}, profile {profile.name}{how}", **data, profile=profile.name
    )


def kinds(found: Sequence[GpuIdentity], gpu_profile: str | None) -> list[Finding]:
    """Only where GPUs are not alike: an engine has one profile for all of its own."""
    profiles = {gpu.name: profile_for_device(gpu.name) for gpu in found}
    names = {name if each is None else each.name for name, each in profiles.items()}
    if len(names) < 2:
        return []
    listed = ", ".join(f"GPU {gpu.index} {plain(gpu.name, 60)}" for gpu in found)
    advice = (
        "for an engine of several GPUs name those of one kind in CUDA_VISIBLE_DEVICES: it has one "
        "profile, and with several kinds it does not start"
        if gpu_profile is None
        else "gpu_profile is used for all of them: it must be that which draws most"
    )
    said = f"the GPUs are not alike: {listed}"
    return [Checks(SECTION).warn("gpu.kinds", said, advice, kinds=sorted(names))]


def readings(gpu: GpuCapabilities) -> list[Finding]:
    """What can be read, from which source; and whose power that is."""
    checks = checks_of(gpu)
    sources = {source.quantity: source for source in gpu.sources}
    data = {"sources": {name: {"how": s.how, "missing": s.missing} for name, s in sources.items()}}
    by_source: dict[str, list[str]] = {}
    for name in _METERED:
        if sources[name].how:
            by_source.setdefault(sources[name].how, []).append(_words(name))
    parts = [f"{', '.join(names)}: {how}" for how, names in by_source.items()]
    rest = [_words(s.quantity) for s in gpu.sources if s.how and s.quantity not in _METERED]
    parts.append(f"also {', '.join(rest)}" if rest else "")
    by_lack: dict[str, list[str]] = {}
    for source in gpu.sources:
        if not source.how:
            by_lack.setdefault(source.missing, []).append(_words(source.quantity))
    parts += [f"{why}: {', '.join(names)}" for why, names in by_lack.items()]
    found = "; ".join(part for part in parts if part)
    return [_power(checks, gpu), _reads(checks, found or "nothing", sources, data)]


def _power(checks: Checks, gpu: GpuCapabilities) -> Finding:
    data = {"scope": gpu.power_scope or None}
    if not gpu.power_scope:
        return checks.fail(
            "gpu.scope",
            "its power can't be read",
            "without a meter only prediction is left: set sensor to none and name gpu_profile, "
            "or use another GPU",
            **data,
        )
    if gpu.power_scope != "GPU":
        return checks.warn(
            "gpu.scope",
            f"its power is read of the whole {gpu.power_scope}, CPU included",
            "count the CPU in the limits: what the CPU draws is metered and not predicted",
            **data,
        )
    return checks.ok("gpu.scope", "power is that of the GPU, memory included", **data)


def _reads(
    checks: Checks, found: str, sources: Mapping[str, Any], data: Mapping[str, Any]
) -> Finding:
    refused = [_words(n) for n, source in sources.items() if "permission" in source.missing]
    if refused:
        return checks.warn(
            "gpu.reads",
            found,
            f"the driver refuses this user {', '.join(refused)}: ask who runs the host",
            **data,
        )
    if sources["energy_joules"].how == INTEGRATED:
        return checks.warn(
            "gpu.reads",
            found,
            "there is no energy counter: energy is summed up from power readings, and short "
            "bursts between them are missed; keep more of each limit free",
            **data,
        )
    return checks.ok("gpu.reads", found, **data)


def limits(gpu: GpuCapabilities) -> Finding:
    """The driver's own power limits. The shaper reads them and never sets one."""
    checks, enforced = checks_of(gpu), gpu.gpu.enforced_limit_watts
    data = {
        "enforced_limit_watts": enforced,
        "default_limit_watts": gpu.default_limit_watts,
        "min_limit_watts": gpu.min_limit_watts,
        "max_limit_watts": gpu.max_limit_watts,
    }
    if enforced is None:
        return checks.warn(
            "gpu.limits",
            "the driver's power limit can't be read",
            "a limit above it could not be told: compare yours with the board's by hand",
            **data,
        )
    parts = [f"enforced {enforced:.0f} W"]
    if gpu.default_limit_watts is not None:
        parts.append(f"default {gpu.default_limit_watts:.0f} W")
    if gpu.min_limit_watts is not None and gpu.max_limit_watts is not None:
        parts.append(f"{gpu.min_limit_watts:.0f} to {gpu.max_limit_watts:.0f} W can be set")
    found = ", ".join(parts)
    default = gpu.default_limit_watts
    if default is not None and enforced < default - _LIMIT_SLACK_WATTS:
        return checks.warn(
            "gpu.limits",
            found,
            "somebody has lowered it: a budget above it can't be used, and at it the clocks fall. "
            f"If that is not wanted, whoever may: nvidia-smi -i {gpu.gpu.index} -pl {default:.0f}",
            **data,
        )
    return checks.ok("gpu.limits", found, **data)


def lost_power(raw: Sequence[GpuSample], screened: Sequence[GpuSample]) -> set[int]:
    """Indices of the GPUs that say a power and whose power an engine would not believe.

    Args:
        raw: as the driver says.
        screened: the same samples, through the screen that an engine uses.
    """

    def watts(sample: GpuSample) -> list[float]:
        each = (sample.instant_watts, sample.average_watts)
        return [value for value in each if value is not None]

    pairs = zip(raw, screened, strict=True)
    return {one.gpu_index for one, believed in pairs if watts(one) and not watts(believed)}


def now(gpu: GpuCapabilities, sample: GpuSample) -> Finding:
    """Power, clock, heat and what lowers the clocks, at this moment."""
    checks, reasons = checks_of(gpu), sample.clock_event_reasons
    words = [word for reason, word in REASON_WORDS.items() if reason & reasons]
    margin = sample.slowdown_margin_celsius
    watts = sample.instant_watts if sample.instant_watts is not None else sample.average_watts
    parts = [
        "" if watts is None else f"{watts:.0f} W",
        "" if sample.sm_clock_hertz is None else f"{sample.sm_clock_hertz / 1e6:.0f} MHz",
        "" if sample.temperature_celsius is None else f"{sample.temperature_celsius:.0f} °C",
        "" if margin is None else f"{margin:.0f} °C below slowdown",
        ", ".join(words) or "nothing lowers the clocks",
    ]
    found = ", ".join(part for part in parts if part)
    data = {
        "power_watts": watts,
        "sm_clock_hertz": sample.sm_clock_hertz,
        "temperature_celsius": sample.temperature_celsius,
        "slowdown_margin_celsius": margin,
        "clock_event_reasons": int(reasons),
        "clock_event_words": words,
    }
    advice = _clocks_advice(reasons, margin)
    if lost_power([sample], SampleValidator().pass_on([sample])):
        found = f"no GPU draws that: {found}"
        return checks.fail("gpu.now", found, _LOST_ADVICE, **data)
    if advice is None:
        return checks.ok("gpu.now", found, **data)
    return checks.warn("gpu.now", found, advice, **data)


def _clocks_advice(reasons: ClockEventReasons, margin_celsius: float | None) -> str | None:
    if reasons & _HEAT:
        return "too hot: look at the air and the fans; until then a lower limit keeps it even"
    if reasons & (_BRAKE | ClockEventReasons.HW_SLOWDOWN):
        return "the board's supply or its protection slows it down: look at power shelf and cables"
    if margin_celsius is not None and margin_celsius < _NEAR_SLOWDOWN_CELSIUS:
        return "near its slowdown temperature: look at the air and the fans, or lower the limit"
    if reasons & ClockEventReasons.SW_POWER_CAP:
        return "the hardware's cap rules here, not the shaper: give limits that are below it"
    return None


def meter(
    gpu: GpuCapabilities,
    facts: MeterFacts,
    seconds: float,
    *,
    counter_moved: bool | None,
    lost: bool = False,
) -> Finding:
    """How often the meter refreshes, over which window, and what a read costs.

    Args:
        gpu: the GPU.
        facts: as measured.
        seconds: for how long.
        counter_moved: whether the energy counter did meanwhile; None where there is none.
        lost: whether an engine would not believe its power after that time.
    """
    checks = checks_of(gpu)
    refreshes = {
        "instant": facts.instant_refresh_seconds,
        "average": facts.average_refresh_seconds,
        "energy": facts.energy_refresh_seconds,
    }
    told = [f"{n} every {1e3 * s:.0f} ms" for n, s in refreshes.items() if s is not None]
    untold = [name for name, s in refreshes.items() if s is None]
    found = f"refreshes {', '.join(told)}" if told else "no refresh seen often enough to tell"
    if told and untold:
        found += f" ({', '.join(untold)}: not seen to change)"
    window = facts.average_window_seconds
    found += "; window of the average " + (
        "not told (it takes 5 s and a load that moves)" if window is None else f"{window:.1f} s"
    )
    p50, p99 = facts.read_p50_seconds, facts.read_p99_seconds
    if p50 is not None and p99 is not None:
        found += f"; a read of all GPUs takes {1e6 * p50:.0f} µs (p99 {1e6 * p99:.0f})"
    data = {**asdict(facts), "measured_seconds": seconds, "counter_moved": counter_moved}
    del data["gpu_index"]
    if lost:
        return checks.fail("gpu.meter", f"its power stands still; {found}", _LOST_ADVICE, **data)
    if seconds >= LEAST_METER_SECONDS and counter_moved is False:
        return checks.warn(
            "gpu.meter",
            f"the energy counter stands still; {found}",
            "where it has counted before, the shaper takes the sensor for stuck: look at dmesg for "
            "Xid errors, reset the GPU, or update its driver",
            **data,
        )
    if p50 is not None and p50 > _SAMPLER_SECONDS:
        return checks.warn(
            "gpu.meter",
            found,
            "a read takes longer than the sampler's pace of 20 ms, so readings come late: turn on "
            "persistence mode (nvidia-smi -pm 1), and end tools that poll the driver",
            **data,
        )
    return checks.ok("gpu.meter", found, **data)


def others(gpu: GpuCapabilities, users: Sequence[str] | None, *, engines: int) -> Finding:
    """Who else is on the GPU: its power can't be told apart.

    Args:
        gpu: the GPU.
        users: processes that are no shaped engine's; None: the driver does not say.
        engines: shaped engines of this user on it.
    """
    checks, data = checks_of(gpu), {"processes": users, "engines": engines}
    if users is None:
        return checks.ok("gpu.others", "the driver does not say who uses it", **data)
    who = list(users) + ([f"{engines} shaped engines"] if engines > 1 else [])
    if not who:
        said = "one shaped engine, nobody else" if engines else "nobody uses it"
        return checks.ok("gpu.others", said, **data)
    if engines == 1:
        who.append("a shaped engine")
    return checks.warn(
        "gpu.others",
        f"in use by {', '.join(who)}",
        "the meter can't tell processes apart: give a shaped engine a GPU of its own, and end "
        "what should not be there",
        **data,
    )


def _words(quantity: str) -> str:
    for ending in _UNIT_ENDINGS:
        quantity = quantity.removesuffix(ending)
    return quantity.replace("_", " ")
