"""What the result depends on: the same limit in watts on GPUs that are not what they seem.

The limit is found once, on the rack as it is, and stays. Each variant changes one thing, under
the drawn errors that every rack has, and is compared with the unshaped rack of that variant.
The shaper is told of none, but for those that are called known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from bench.harness.runner import Run, Runner, Search
from bench.racks import policies
from bench.racks.outcome import Outcome
from bench.racks.plan import Comparison, limit_of, limited
from bench.racks.rows import VARIANT_COLUMNS, Entry, Reference
from shaper.core.model.power_model import StepModel
from shaper.core.model.profile import GpuProfile
from shaper.errors import ConfigError
from shaper.simulate import true_gpu
from shaper.simulate.setup import NO_ERRORS, Errors, RackSetup
from shaper.simulate.simulated_engine import drawn_gpu
from shaper.simulate.true_gpu import TrueGpu

LIMIT_RATIO = 0.70
ITL_TARGET_SECONDS = 0.1
# As in the variants that the shaper is not told of.
KNOWN_GAPS_WATTS = (170.0, 200.0)

Bend = Callable[[StepModel], TrueGpu]


def _true(model: StepModel, index: int, errors: Errors, seed: int, bend: Bend) -> TrueGpu:
    """The GPUs as drawn, with a bend in them."""
    drawn = drawn_gpu(model, errors, seed, index)
    return bend(StepModel(drawn.profile, model.coefficients))


def _profiled(model: StepModel, change: Callable[[GpuProfile], GpuProfile]) -> TrueGpu:
    return TrueGpu(StepModel(change(model.profile), model.coefficients))


def _gap(watts: float, profile: GpuProfile) -> GpuProfile:
    return replace(profile, power=replace(profile.power, gap_watts=watts))


def _gap_hold(seconds: float, profile: GpuProfile) -> GpuProfile:
    return replace(profile, power=replace(profile.power, gap_hold_seconds=seconds))


def _cap_lag(ratio: float, profile: GpuProfile) -> GpuProfile:
    cap = profile.cap
    slower = replace(
        cap,
        window_seconds=cap.window_seconds * ratio,
        slew_down_hertz=cap.slew_down_hertz / ratio,
        slew_up_hertz=cap.slew_up_hertz / ratio,
    )
    return replace(profile, cap=slower)


def _ceiling(ratio: float, model: StepModel) -> TrueGpu:
    return true_gpu.ceiling(model, ratio * model.profile.power.limit_watts * model.gpu_count)


def _steeper(ratio: float, model: StepModel) -> TrueGpu:
    watts = ratio * model.profile.power.limit_watts * model.gpu_count
    return true_gpu.steeper(model, watts, 1.3)


@dataclass(frozen=True, slots=True)
class Variant:
    """One thing that is changed."""

    name: str
    change: Callable[[RackSetup], RackSetup]
    capped: bool = False
    """A power cap of the same watts is shown as well."""


def _bent(bend: Bend) -> Callable[[RackSetup], RackSetup]:
    return lambda rack: replace(
        rack, plant=partial(_true, errors=rack.errors, seed=rack.seed, bend=bend)
    )


def _profile(change: Callable[[GpuProfile], GpuProfile]) -> Callable[[RackSetup], RackSetup]:
    return _bent(partial(_profiled, change=change))


def _errors(**changes: float) -> Callable[[RackSetup], RackSetup]:
    return lambda rack: replace(rack, errors=replace(rack.errors, **changes))  # type: ignore[arg-type]


VARIANTS = (
    Variant("as it is", lambda rack: rack, capped=True),
    Variant("cap follows twice as fast", _profile(partial(_cap_lag, 0.5)), capped=True),
    Variant("cap lags twice as long", _profile(partial(_cap_lag, 2.0)), capped=True),
    Variant("120 W between steps", _profile(partial(_gap, 120.0))),
    Variant("170 W between steps", _profile(partial(_gap, 170.0))),
    Variant("200 W between steps", _profile(partial(_gap, 200.0))),
    Variant("power stays up for 1 s after a step", _profile(partial(_gap_hold, 1.0))),
    Variant(
        "a hold costs 0.5 ms: a step's end is heard of late", _errors(host_late_seconds=0.0005)
    ),
    Variant("a hold costs 1 ms", _errors(host_late_seconds=0.001)),
    Variant("the shaper knows everything", lambda rack: replace(rack, errors=NO_ERRORS)),
    Variant("model within 10%, each GPU 4%", _errors(model_ratio=0.10, own_ratio=0.04)),
    Variant("model within 20%, each GPU 8%", _errors(model_ratio=0.20, own_ratio=0.08)),
    Variant("a ceiling at 85% of TDP", _bent(partial(_ceiling, 0.85))),
    Variant(
        "steps over 2,048 tokens take 1.2 times", _bent(partial(true_gpu.cliff, above_tokens=2048))
    ),
    Variant("power above 70% of TDP rises 1.3 times", _bent(partial(_steeper, 0.7))),
)


def known(rack: RackSetup, folder: Path, watts: float) -> RackSetup:
    """Other power between steps that the shaper's profile has right.

    Raises:
        ConfigError: the profile can't be written.
    """
    path = folder / f"gap-{watts:g}.toml"
    source = "an assumption of the comparison"
    try:
        path.write_text(
            f'name = "gap-{watts:g}"\nbase = "{rack.gpu}"\n\n[power]\n'
            f'gap_watts = {{ value = {watts:g}, source = "{source}" }}\n'
        )
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error}") from error
    return replace(rack, gpu=str(path))


def vary(runner: Runner, rack: RackSetup, folder: Path) -> Comparison:
    """All variants at one limit in watts.

    Args:
        folder: for profiles that variants need.

    Returns:
        Rows whose `seed` is the place of their variant, which is what their reference goes by.
    """
    variants = [
        *VARIANTS,
        *(
            Variant(f"{watts:g} W between steps, known", partial(known, folder=folder, watts=watts))
            for watts in KNOWN_GAPS_WATTS
        ),
    ]
    (before,) = runner.drive([_unshaped(rack, VARIANTS[0])])
    entry = limited(rack, before, LIMIT_RATIO)
    found = runner.drive([_vary(rack, entry, place, each) for place, each in enumerate(variants)])
    return Comparison(
        rack,
        (rack.seed,),
        {place: reference for place, (reference, _) in enumerate(found)},
        [each for _, entries in found for each in entries],
        columns=VARIANT_COLUMNS,
    )


def _unshaped(rack: RackSetup, variant: Variant) -> Search[Outcome]:
    found: Sequence[Outcome] = yield [Run(f"{policies.UNSHAPED}, {variant.name}", rack)]
    return found[0]


def _vary(
    rack: RackSetup, entry: Entry, place: int, variant: Variant
) -> Search[tuple[Reference, list[Entry]]]:
    changed, limit = variant.change(rack), limit_of(entry)
    before = yield from _unshaped(changed, variant)
    named = [(policies.CAP, policies.power_cap(changed, limit))] if variant.capped else []
    named.append((policies.SHARED, policies.shared(changed, limit, ITL_TARGET_SECONDS)))
    outcomes = yield [Run(f"{policy}, {variant.name}", setup) for policy, setup in named]
    return Reference(before), [
        replace(entry, policy=variant.name, detail=policy, seed=place, outcome=outcome)
        for (policy, _), outcome in zip(named, outcomes, strict=True)
    ]
