"""In a child process: imports what vLLM would, and says whether the plug-in took hold.

    python -m shaper.doctor.import_check

`shaper doctor` runs it with a deadline: an import may hang on a driver, or end the process.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from importlib import metadata

from shaper.doctor.bounded import say_findings, say_stage
from shaper.doctor.findings import Checks, Finding, plain
from shaper.doctor.software import PLUGINS
from shaper.engine.plugin import FLAG, register
from shaper.engine.shapeable import SCHEDULER_PATH

_CHECKS = Checks("Software")


def main() -> None:
    """The whole check."""
    logging.disable(logging.CRITICAL)  # the child's output is for findings
    for stage, check in (
        ("torch is imported", _torch),
        ("vLLM and the plug-in are imported", _plugin),
    ):
        say_stage(stage)
        say_findings([check()])


def _guarded(check: str, body: Callable[[], Finding], advice: str) -> Finding:
    try:
        return body()
    except (Exception, SystemExit) as error:
        # Whatever a broken installation raises is what there is to say.
        return _CHECKS.fail(check, f"{type(error).__name__}: {plain(error, 300)}", advice)


def _torch() -> Finding:
    def body() -> Finding:
        import torch

        cuda = torch.version.cuda
        data = {"cuda": cuda, "gpus": torch.cuda.device_count() if cuda else 0}
        if cuda is None:
            return _CHECKS.ok("software.torch_runs", "imported; built without CUDA", **data)
        if not data["gpus"]:
            return _CHECKS.warn(
                "software.torch_runs",
                f"imported; built for CUDA {cuda} and sees no GPU",
                "where there is a GPU, its driver is older than this CUDA wants, or "
                "CUDA_VISIBLE_DEVICES hides it",
                **data,
            )
        found = f"imported; built for CUDA {cuda}, sees {data['gpus']} GPU(s)"
        return _CHECKS.ok("software.torch_runs", found, **data)

    advice = "install vLLM again: it brings the torch that it needs"
    return _guarded("software.torch_runs", body, advice)


def _plugin() -> Finding:
    def body() -> Finding:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        register()
        for group, (name, _) in PLUGINS.items():
            for entry in metadata.entry_points(group=group, name=name):
                entry.load()
        # What `--scheduler-cls` resolves.
        module, _, attribute = SCHEDULER_PATH.rpartition(".")
        getattr(importlib.import_module(module), attribute)
        parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
        if not any(FLAG in action.option_strings for action in parser._actions):
            return _CHECKS.fail(
                "software.plugin_runs",
                f"it ran, and {FLAG} is not on vLLM's command line",
                "use shaper serve, which needs no flag of vLLM's, or a supported vLLM",
            )
        return _CHECKS.ok("software.plugin_runs", f"loaded; {FLAG} is on vLLM's command line")

    advice = "vLLM or the plug-in can't be imported: install both again, in one environment"
    return _guarded("software.plugin_runs", body, advice)


if __name__ == "__main__":
    main()
