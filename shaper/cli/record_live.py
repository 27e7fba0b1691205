"""`shaper record --url`: a running server's engines write their steps and samples."""

from __future__ import annotations

import argparse
import sys
import threading
from typing import Any

from shaper.cli.control_client import ask, signed
from shaper.errors import ConfigError

_POLL_SECONDS = 0.5
_UNDER_WAY = ("recording", "finishing")


def record_live(options: argparse.Namespace, duration_seconds: float, stop: threading.Event) -> int:
    """Asks for a recording and waits for its end, or ends it when `stop` is set.

    The engines end it by themselves when its time is over, also when this command has ended.

    Returns:
        0; 1 where an engine's recording failed.

    Raises:
        ConfigError: no key, or no file name.
        ControlError: the server is not there, or refuses.
    """
    if "/" in options.out:
        raise ConfigError(
            f"{options.out!r} is a path: with --url give a file name; the server writes it into "
            "its recording directory"
        )
    request = {"file": options.out, "for": f"{duration_seconds}s", **signed(options)}
    state = ask(options, "PUT", "record", request)
    number = state["sequence"]
    files = {engine["engine"]: engine["recording"]["file"] for engine in state["engines"]}
    for name, file in files.items():
        print(f"engine {name} records to {file}", flush=True)
    ended = False
    while _under_way(state, number):
        if stop.wait(_POLL_SECONDS) and not ended:
            ended = True
            ask(options, "DELETE", "record", signed(options))
        if ended:
            threading.Event().wait(_POLL_SECONDS / 5)
        state = ask(options, "GET", "state", None)
        _show(state)
    failed = False
    for engine in state["engines"]:
        found = engine.get("recording", {})
        line = f"engine {engine['engine']}: {files.get(engine['engine'], 'no file')}"
        if found.get("sequence") != number:
            failed = True
            print(f"{line}: not finished, the engine was started anew", file=sys.stderr)
            continue
        print(f"{line}: {found['rows']} rows, {found['bytes']} bytes")
        if found["dropped"]:
            print(f"  {found['dropped']} rows are missing: its disk was too slow", file=sys.stderr)
        if found["phase"] == "failed":
            failed = True
            print(f"  it ended early: {found.get('error')}", file=sys.stderr)
    return 1 if failed or not state["engines"] else 0


def _under_way(state: dict[str, Any], number: int) -> bool:
    recordings = [engine.get("recording", {}) for engine in state["engines"]]
    return any(r.get("phase") in _UNDER_WAY and r.get("sequence") == number for r in recordings)


def _show(state: dict[str, Any]) -> None:
    if not sys.stderr.isatty():
        return
    rows = sum(engine.get("recording", {}).get("rows", 0) for engine in state["engines"])
    watts = [e["metrics"].get("power_instant_watts") for e in state["engines"]]
    drawn = sum(w for w in watts if w is not None)
    print(f"\r{drawn:.0f} W  {rows} rows\033[K\r", end="", file=sys.stderr, flush=True)
