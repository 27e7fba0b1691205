"""Whether this process serves an emulated GPU. Imports nothing: vLLM asks in every process."""

from __future__ import annotations

import os

EMULATE_VARIABLE = "SHAPER_EMULATE"
PLATFORM_CLASS_PATH = "shaper.emulator.platform.EmulatedPlatform"


def platform_class_path() -> str | None:
    """The platform to use, or None to leave vLLM's own choice alone.

    vLLM's entry point group `vllm.platform_plugins` calls this. Only the
    environment decides, so that an installed shaper changes nothing on a
    machine whose GPUs are real.
    """
    return PLATFORM_CLASS_PATH if os.environ.get(EMULATE_VARIABLE) else None
