"""Whether this process serves an emulated GPU. Imports nothing: vLLM asks in every process."""

from __future__ import annotations

import os

EMULATE_VARIABLE = "SHAPER_EMULATE"
"""Name of a GPU profile, or path to one."""
REPLAY_VARIABLE = "SHAPER_EMULATE_REPLAY"
"""Recording whose readings are played instead of metering the emulated GPU."""
TRACE_VARIABLE = "SHAPER_EMULATE_TRACE"
"""Where the true power goes: `PREFIX.rank0` and so on."""
TIME_SCALE_VARIABLE = "SHAPER_EMULATE_TIME_SCALE"
"""1: steps take their modelled time; 0: they take none."""
PLATFORM_CLASS_PATH = "shaper.emulator.platform.EmulatedPlatform"


def platform_class_path() -> str | None:
    """The platform to use, or None to leave vLLM's own choice alone.

    vLLM's entry point group `vllm.platform_plugins` calls this. Only the
    environment decides, so that an installed shaper changes nothing on a
    machine whose GPUs are real.
    """
    return PLATFORM_CLASS_PATH if os.environ.get(EMULATE_VARIABLE) else None
