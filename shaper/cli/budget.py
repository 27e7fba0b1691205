"""`shaper budget` and `shaper mode`: an operator's hand on a running server."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from shaper.cli.arguments import Parser
from shaper.cli.control_client import DEFAULT_URL, ask, signed
from shaper.config.budget import parse_power_limit
from shaper.config.schedule import ScheduleEntry
from shaper.config.sources import ADMIN_KEY_VARIABLE
from shaper.core.budget import describe, resolve
from shaper.core.types import PowerBudget, PowerLimit
from shaper.errors import ConfigError
from shaper.ipc.control_file import MODES


def budget_main(argv: Sequence[str]) -> int:
    """`shaper budget set|clear|show`.

    Raises:
        ConfigError: an argument is wrong, or there is no key.
        ControlError: the server is not there, or refuses.
    """
    options = _budget_parser().parse_args(list(argv))
    if options.action == "set":
        state = ask(options, "PUT", "budget", _set_request(options))
    elif options.action == "clear":
        state = ask(options, "DELETE", "budget", signed(options))
    else:
        state = ask(options, "GET", "state", None)
    _show(options, state)
    return 0


def mode_main(argv: Sequence[str]) -> int:
    """`shaper mode on|shadow|off`.

    Raises:
        ConfigError: an argument is wrong, or there is no key.
        ControlError: the server is not there, or refuses.
    """
    parser = Parser(prog="shaper mode", description="Switch a running server's shaper.")
    parser.add_argument("mode", choices=MODES)
    _common(parser, signed=True)
    options = parser.parse_args(list(argv))
    _show(options, ask(options, "PUT", "mode", {"mode": options.mode, **signed(options)}))
    return 0


def _budget_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="shaper budget",
        description="The power budget of a running server. The server must have been started with "
        f"{ADMIN_KEY_VARIABLE}; give the same here.",
    )
    actions = parser.add_subparsers(dest="action", required=True, parser_class=Parser)
    setting = actions.add_parser("set", help="put a budget in force")
    setting.add_argument(
        "limits",
        nargs="*",
        metavar="WATTS@WINDOW",
        help="limits of the engine, like 500W@1s 600W@100ms; none takes them away; "
        "what is not given stays as it is configured",
    )
    setting.add_argument(
        "--gpu-limit", action="append", metavar="WATTS@WINDOW", help="of each GPU; or none"
    )
    setting.add_argument("--ramp", metavar="WATTS/SECOND", help="like 200W/s; or none")
    setting.add_argument("--for", dest="for_", metavar="TIME", help="it ends after, like 10min")
    setting.add_argument("--until", metavar="MOMENT", help="it ends at, like 2026-11-25T18:00:00Z")
    setting.add_argument(
        "--fallback",
        action="append",
        metavar="WATTS@WINDOW",
        help="limits of the engine that hold when it ends; else what is configured",
    )
    _common(setting, signed=True)
    _common(actions.add_parser("clear", help="back to what is configured"), signed=True)
    _common(actions.add_parser("show", help="what holds, and how it goes"), signed=False)
    return parser


def _common(parser: argparse.ArgumentParser, *, signed: bool) -> None:
    parser.add_argument("--url", default=DEFAULT_URL, help=f"of the server (default {DEFAULT_URL})")
    parser.add_argument("--json", action="store_true", help="print all that the server says")
    if signed:
        parser.add_argument("--why", default="", metavar="TEXT", help="for the server's log")


def _limits(texts: Sequence[str]) -> list[str]:
    """The limits as written, once they are known to be such; none of them for `none`."""
    if list(texts) == ["none"]:
        return []
    for text in texts:
        parse_power_limit(text)
    return list(texts)


def _set_request(options: argparse.Namespace) -> dict[str, Any]:
    request: dict[str, Any] = signed(options)
    if options.limits:
        request["limits"] = _limits(options.limits)
    if options.gpu_limit:
        request["gpu_limits"] = _limits(options.gpu_limit)
    if options.ramp is not None:
        request["ramp_watts_per_second"] = options.ramp
    if options.for_ is not None:
        request["for"] = options.for_
    if options.until is not None:
        request["until"] = options.until
    if not {"limits", "gpu_limits", "ramp_watts_per_second"} & set(request):
        raise ConfigError(
            "no limit is given: write shaper budget set 500W@1s, or none to have none; --gpu-limit "
            "and --ramp set others"
        )
    if options.fallback:
        request["fallback"] = {"limits": _limits(options.fallback)}
    return request


def _show(options: argparse.Namespace, state: dict[str, Any]) -> None:
    if options.json:
        json.dump(state, sys.stdout, indent=2)
        print()
        return
    for warning in state.get("warnings", ()):
        print(f"shaper: warning: {warning}", file=sys.stderr)
    for engine in state["engines"]:
        print(_engine_line(engine))
    print("\n".join(_asked_lines(state["asked"])))
    for entry in (state.get("configured") or {}).get("schedule", ()):
        print(_scheduled_line(ScheduleEntry.model_validate(entry)))


def _scheduled_line(entry: ScheduleEntry) -> str:
    terms = entry.terms()
    says = []
    if terms.limits is not None or terms.ramp_watts_per_second is not None:
        says.append(describe(resolve(replace(terms, gpu_limits=None), 1)))
    if terms.gpu_limits is not None:
        says.append(f"each GPU {describe(PowerBudget(terms.gpu_limits))}")
    return f"scheduled {entry.name}: {'; '.join(says)}"


def _engine_line(engine: Mapping[str, Any]) -> str:
    budget = engine["budget"]
    limits = tuple(PowerLimit(x["watts"], x["window_seconds"]) for x in budget["limits"])
    holds = describe(PowerBudget(limits, budget["ramp_watts_per_second"]))
    change = engine["next_change_in_seconds"]
    ends = "" if change is None else f", next change in {_time(change)}"
    watts = engine["metrics"].get("power_average_watts")
    now = "" if watts is None else f"; draws {watts:.0f} W"
    group = engine.get("group")
    if group is not None:
        now += f"; {_group(group)}"
    return (
        f"engine {engine['engine']} ({engine['gpu_count']} x {engine['gpu']}) is "
        f"{engine['mode']}: {holds} ({engine['source']}{ends}){now}"
    )


def _group(group: Mapping[str, Any]) -> str:
    limits = tuple(PowerLimit(x["watts"], x["window_seconds"]) for x in group["limits"])
    alive = sum(engine["state"] == "alive" for engine in group["engines"])
    return f"in power group {group['name']} ({describe(PowerBudget(limits))}; {alive} alive)"


def _time(seconds: float) -> str:
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def _asked_lines(asked: Mapping[str, Any]) -> list[str]:
    if "error" in asked:
        return [f"the control file is not believed: {asked['error']}"]
    lines = []
    for name in ("budget", "mode"):
        if name in asked:
            origin = asked[name]["origin"]
            why = f": {origin['why']}" if origin["why"] else ""
            left = asked[name].get("seconds_left")
            ends = "" if left is None else f", ends in {_time(left)}" if left else ", has ended"
            change = f"{name} change {origin['sequence']}"
            lines.append(f"{change} by {origin['who']} at {origin['at']}{ends}{why}")
    return lines or ["no change in force"]
