"""Runs a probe in a child process that may hang, crash or be killed, and takes what it said.

A call of a driver can hang where not even a signal ends it; the child is then left behind,
and nothing here waits for it. A probe writes one JSON object a line: `{"stage": "..."}`
before it does something that may take long, and `{"finding": {...}}`. The deadline is on
silence: each line starts it again.
"""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import IO

from shaper.doctor.findings import Finding, finding_of, json_object, plain, values

# After SIGKILL a process is gone at once, unless it is stuck in the kernel.
_KILL_SECONDS = 1.0
_ERROR_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class Probed:
    """What a child said, and how it ended."""

    findings: tuple[Finding, ...]
    stage: str
    """What it was at, at last."""
    hung: bool
    error: str | None
    """How it ended, where that was no good end; None too where it hung."""


def say_stage(stage: str) -> None:
    """In a child: what comes next."""
    print(json.dumps({"stage": stage}), flush=True)


def say_findings(findings: Iterable[Finding]) -> None:
    """In a child: what was found."""
    for finding in findings:
        print(json.dumps({"finding": values(finding)}), flush=True)


def probe(module: str, arguments: Sequence[str], silence_seconds: float) -> Probed:
    """Run `python -m module arguments` and take its findings.

    Args:
        module: a probe.
        arguments: of its command line.
        silence_seconds: longest time between two of its lines.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            # Without the working directory on its path, as the installed commands are.
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
        )
        lines: queue.Queue[str | None] = queue.Queue()
        assert process.stdout is not None
        threading.Thread(target=_pass_on, args=(process.stdout, lines), daemon=True).start()
        findings: list[Finding] = []
        stage, hung = "Python is started", True
        try:
            while (line := lines.get(timeout=silence_seconds)) is not None:
                said = json_object(line)
                stage = str(said.get("stage", stage))
                # A library may print what looks like ours and is not.
                with contextlib.suppress(KeyError, TypeError, ValueError):
                    findings.append(finding_of(said["finding"]))
            hung = False
        except queue.Empty:
            pass  # `hung` stays
        finally:
            # Also where the user has had enough.
            code = _end(process, hung=hung)
        error = None if hung or code == 0 else _why(code, errors)
    return Probed(tuple(findings), stage, hung, error)


def _pass_on(output: IO[str], lines: queue.Queue[str | None]) -> None:
    with output:
        for line in output:
            lines.put(line)
    lines.put(None)


def _end(process: subprocess.Popen[str], *, hung: bool) -> int | None:
    """The exit code; None where the child could not be ended."""
    try:
        if hung:
            process.kill()
        # With its output closed a child has ended, or is about to.
        return process.wait(_KILL_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
    try:
        return process.wait(_KILL_SECONDS)
    except subprocess.TimeoutExpired:
        # Stuck in the kernel: it is the init process's from now on.
        process.returncode = -9
        return None


def _why(code: int | None, errors: IO[bytes]) -> str:
    errors.seek(0, 2)
    errors.seek(max(0, errors.tell() - _ERROR_BYTES))
    lines = [line for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    return plain(f"{how}: {lines[-1]}" if lines else how)
