"""In a child process: asks the driver, and says what it finds. See `bounded`.

    python -m shaper.doctor.gpu_probe '{"seconds": 2.0, "emulate": null}'

Each GPU is opened by itself, so that one which is lost or in MIG mode hides no other.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from shaper.config.sources import load_config
from shaper.core.types import StepBatch
from shaper.doctor import gpus
from shaper.doctor.blocks import engine_pids
from shaper.doctor.bounded import say_findings, say_stage
from shaper.doctor.findings import Checks, Finding, plain
from shaper.emulator.device import EmulatedDevice
from shaper.emulator.shapes import load_shape
from shaper.errors import ConfigError, GpuError, GpuPermissionError
from shaper.gpu.capabilities import GpuCapabilities, describe_gpus
from shaper.gpu.meter_properties import measure_meter
from shaper.gpu.nvml import NvmlReader, host_gpus
from shaper.gpu.nvml_driver import Driver
from shaper.gpu.reader import GpuReader
from shaper.gpu.validation import SampleValidator
from shaper.gpu.visible import (
    device_order_warning,
    refuse_twice,
    visible_count,
    visible_gpus,
)

# What the emulated GPU works on: a meter is seen to refresh only where power moves.
_EMULATED_MODEL, _PROMPT_TOKENS, _PROMPT_EVERY_SECONDS = "llama-3.1-8b", 4096, 0.3
# How many parents of a process are looked at.
_PARENTS = 64


def main(argument: str) -> None:
    """The whole probe."""
    wanted = json.loads(argument)
    checks = Checks(gpus.SECTION)
    profile = _named_profile()
    if wanted["emulate"] is not None:
        _emulated(wanted["emulate"], wanted["seconds"], profile)
        return
    say_stage("the driver is opened")
    try:
        selectors = list(_visible(checks))
    except GpuError as error:
        say_findings([checks.fail("gpu.driver", str(error), _driver_advice(error))])
        return
    good: list[int | str] = []
    for selector in selectors:
        subject = f"GPU {selector}" if isinstance(selector, int) else selector
        say_stage(f"{subject} is asked what it can read")
        try:
            reader = NvmlReader((selector,))
            try:
                say_findings(_one(reader, profile))
            finally:
                reader.close()
            good.append(selector)
        except GpuError as error:
            own = Checks(gpus.SECTION, subject)
            say_findings([own.fail("gpu.readable", str(error), _lost_advice(error))])
    if good:
        say_stage("the GPUs' meters are measured")
        try:
            together = NvmlReader(tuple(good))
            try:
                say_findings(gpus.kinds(together.gpus, profile))
                _measure(together, wanted["seconds"])
            finally:
                together.close()
        except GpuError as error:
            say_findings([checks.fail("gpu.readable", str(error), _lost_advice(error))])


def _emulated(gpu: str, seconds: float, profile: str | None) -> None:
    device = EmulatedDevice(gpu, load_shape(_EMULATED_MODEL))
    tokens = _PROMPT_TOKENS
    prompt = StepBatch(
        prefill_requests=1,
        prefill_tokens=tokens,
        prefill_context_tokens=tokens,
        prefill_token_context_product=tokens**2,
        prefill_squared_tokens=tokens**2,
    )
    due_seconds = time.monotonic()

    def work(pause_seconds: float) -> None:
        nonlocal due_seconds
        if time.monotonic() >= due_seconds:
            device.launch(prompt)
            due_seconds = time.monotonic() + _PROMPT_EVERY_SECONDS
        time.sleep(pause_seconds)

    said = f"emulated; it works off prompts of {tokens} tokens, so that its meter moves"
    say_findings([Checks(gpus.SECTION).ok("gpu.driver", said, emulated=True)])
    say_findings(_one(device.reader, profile))
    say_stage("the emulated meter is measured")
    _measure(device.reader, seconds, work)


def _named_profile() -> str | None:
    try:
        return load_config(None, os.environ).gpu_profile
    except ConfigError:
        return None  # `host.settings` says so


@contextlib.contextmanager
def _opened() -> Iterator[Driver]:
    driver = Driver()
    driver.call("nvmlInit")
    try:
        yield driver
    finally:
        driver.call("nvmlShutdown")


def _visible(checks: Checks) -> Iterator[int | str]:
    """The GPUs that an engine of this process could use."""
    with _opened() as driver:
        count = int(driver.call("nvmlDeviceGetCount"))
    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = "not set" if variable is None else f"'{plain(variable, 80)}'"
    found = f"the driver shows {count} GPU{'s' if count != 1 else ''}"
    data = {"gpu_count": count, "cuda_visible_devices": variable}
    if not count:
        say_findings([checks.fail("gpu.driver", found, gpus.NO_GPU_ADVICE, **data)])
        return
    named = visible_count(os.environ)
    own = visible_gpus(os.environ, count if named is None else named)
    using = ", ".join(map(str, own))
    found += f"; CUDA_VISIBLE_DEVICES is {shown}, so this process would use {using or 'none'}"
    if not own:
        advice = "name the GPUs to use in CUDA_VISIBLE_DEVICES, or unset it"
        say_findings([checks.fail("gpu.driver", found, advice, **data, used=0)])
        return
    say_findings([checks.ok("gpu.driver", found, **data, used=len(own))])
    host = host_gpus()
    warning = device_order_warning(os.environ, own, [gpu.name for gpu in host])
    if warning is not None:
        what, _, advice = warning.partition(": ")
        say_findings([checks.warn("gpu.order", what, advice)])
    refuse_twice(own, {gpu.index: gpu.uuid for gpu in host})
    yield from own


def _one(reader: GpuReader, profile: str | None) -> list[Finding]:
    (gpu,) = describe_gpus(reader)
    (sample,) = reader.read()
    version = {"driver_version": gpu.driver_version} if gpu.driver_version else {}
    findings = [gpus.model(gpu, profile), *gpus.readings(gpu), gpus.limits(gpu)]
    if version:
        findings.append(gpus.checks_of(gpu).ok("gpu.version", gpu.driver_version, **version))
        users, engines = _users(gpu)
        findings.append(gpus.others(gpu, users, engines=engines))
    return [*findings, gpus.now(gpu, sample)]


def _measure(
    reader: GpuReader, seconds: float, sleep: Callable[[float], None] = time.sleep
) -> None:
    before = {sample.gpu_index: sample.energy_joules for sample in reader.read()}
    screen = SampleValidator()
    measured = measure_meter(reader, seconds, sleep=sleep, screen=screen)
    facts = {fact.gpu_index: fact for fact in measured}
    last = reader.read()
    after = {sample.gpu_index: sample.energy_joules for sample in last}
    lost = gpus.lost_power(last, screen.pass_on(last))
    for gpu in describe_gpus(reader):
        index = gpu.gpu.index
        joules = before[index], after[index]
        moved = None if None in joules else joules[0] != joules[1]
        if index in facts:
            found = gpus.meter(gpu, facts[index], seconds, counter_moved=moved, lost=index in lost)
            say_findings([found])


def _users(gpu: GpuCapabilities) -> tuple[list[str] | None, int]:
    """Processes on the GPU that are no shaped engine's, and how many shaped engines are."""
    try:
        with _opened() as driver:
            handle = driver.call("nvmlDeviceGetHandleByIndex", gpu.gpu.index)
            found = driver.call("nvmlDeviceGetComputeRunningProcesses", handle)
    except GpuError:
        return None, 0  # said as such: it is nice to know, no more
    engines, strangers = set(), []
    shaped = engine_pids()
    for pid in sorted({int(process.pid) for process in found}):
        own = next((each for each in _line(pid) if each in shaped), None)
        if own is not None:
            engines.add(own)
        else:
            strangers.append(f"process {pid}{_name(pid)}")
    return strangers, len(engines)


def _line(pid: int) -> Iterator[int]:
    """A process and those that it comes from."""
    for _ in range(_PARENTS):
        yield pid
        try:
            text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        except OSError:
            return
        pid = int(text.rpartition(")")[2].split()[1])
        if pid <= 1:
            return


def _name(pid: int) -> str:
    try:
        return f" ({plain(Path(f'/proc/{pid}/comm').read_text(errors='replace'), 30)})"
    except OSError:
        return ""  # of another container, or gone


def _driver_advice(error: GpuError) -> str:
    if isinstance(error, GpuPermissionError):
        return (
            "this user may not open the GPU's device files (/dev/nvidia*): see their group, or "
            "give the container --gpus all"
        )
    if "MIG" in str(error) or "CUDA_VISIBLE_DEVICES" in str(error):
        return "correct CUDA_VISIBLE_DEVICES: whole GPUs, by index or UUID, each once"
    return gpus.NO_GPU_ADVICE


def _lost_advice(error: GpuError) -> str:
    words: Mapping[str, str] = {
        r"MIG": "turn MIG off (nvidia-smi -mig 0, by root), or name another GPU",
        r"beginning of|no GPU \d": "correct CUDA_VISIBLE_DEVICES; nvidia-smi -L lists the UUIDs",
        r"(?i)lost|reset|bus": "look at dmesg for Xid errors; reset the GPU, or restart the host",
        r"(?i)permission": "this user may not read it: see the group of /dev/nvidia*",
    }
    for pattern, advice in words.items():
        if re.search(pattern, str(error)):
            return advice
    return "see what nvidia-smi says of it, and dmesg"


if __name__ == "__main__":
    main(sys.argv[1])
