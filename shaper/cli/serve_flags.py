"""The shaper's own flags of `shaper serve`, and the configuration that they make."""

from __future__ import annotations

import argparse
import os
from typing import Any, get_args

from shaper.cli.arguments import Parser
from shaper.config.budget import parse_power_limit
from shaper.config.model import ShaperConfig, build_config
from shaper.config.sources import (
    parse_config_text,
    settings_from_environment,
    take_admin_key,
)
from shaper.errors import ConfigError
from shaper.units import parse_seconds, parse_watts, parse_watts_per_second

DESCRIPTION = """\
vllm serve with the shaper in it: same routes, same flags, same exit codes.
Flags that are not listed here go to vLLM; `shaper serve --help=all` lists them too.
"""


def new_parser() -> argparse.ArgumentParser:
    """Knows the shaper's flags alone; the rest of a command line is left over."""
    parser = Parser(
        prog="shaper serve",
        usage="shaper serve MODEL [shaper's flags] [any flag of vllm serve]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("shaper")
    _add_budget_flags(group)
    group.add_argument(
        "--itl-target",
        metavar="TIME",
        help="promise at p99 of the time between two tokens, like 50ms",
    )
    group.add_argument(
        "--ttft-target",
        metavar="TIME",
        help="promise at p99 of the time to the first token, like 1s",
    )
    group.add_argument(
        "--objective",
        choices=_choices("objective"),
        help="latency (default): tokens wait only as the budget asks; efficiency: decodes wait up "
        "to the ITL target for larger steps, for fewer joules a token",
    )
    group.add_argument(
        "--policy",
        metavar="{predictive,fixed}",
        help="predictive (default) is the shaper; fixed leaves vLLM alone",
    )
    group.add_argument(
        "--shadow",
        action="store_true",
        help="predict, decide, record and expose everything, apply nothing",
    )
    group.add_argument(
        "--force-version",
        action="store_true",
        help="shape under a version of vLLM that was not tried",
    )
    group.add_argument(
        "--unshaped-ok",
        action="store_true",
        help="start also where nobody would keep the limit or the latency target (an engine, a "
        "model or a version that is not shaped); without it such a start is refused",
    )
    group.add_argument(
        "--record",
        metavar="FILE",
        help="write what each step computed and took, and all readings, to FILE (.csv or .parquet)",
    )
    group.add_argument(
        "--power-shaper-config",
        metavar="JSON|PATH",
        help="all settings at once: a JSON object, or a path to JSON or TOML",
    )
    group.add_argument(
        "--shaper-off", action="store_true", help="vLLM's own scheduler, for comparison"
    )
    group.add_argument(
        "--emulate",
        metavar="GPU",
        help="serve on an emulated GPU: the name of a profile, like h200-sxm, or a path to one; "
        "MODEL may then be a built-in shape, like llama-3.1-8b; replay:FILE plays recorded "
        "readings (shaper record), whatever the load is",
    )
    group.add_argument(
        "--gpu-profile",
        metavar="NAME|PATH",
        help="predict with this profile; by default that of the GPU's own name",
    )
    return parser


def _add_budget_flags(group: argparse._ArgumentGroup) -> None:
    """What may be drawn, alone and together with others."""
    group.add_argument(
        "--power-limit",
        action="append",
        metavar="WATTS@WINDOW",
        help="mean power that no window of this length may exceed, summed over the engine's "
        "GPUs, like 560W@1s; may be given several times",
    )
    group.add_argument(
        "--gpu-limit",
        action="append",
        metavar="WATTS@WINDOW",
        help="the same for each GPU of the engine, like 650W@1s",
    )
    group.add_argument(
        "--power-group",
        metavar="NAME",
        help="share the group limits with the other engines of this host that name this group",
    )
    group.add_argument(
        "--group-limit",
        action="append",
        metavar="WATTS@WINDOW",
        help="the same for all engines of the group together, like 4000W@100ms",
    )
    group.add_argument(
        "--host-overhead",
        metavar="WATTS",
        help="group limits are of the server at the wall, and this is what it draws behind its "
        "power supplies besides its GPUs, like 1800W; with --psu-efficiency",
    )
    group.add_argument(
        "--psu-efficiency",
        metavar="RATIO",
        type=float,
        help="the share of the power at the wall that its power supplies pass on, like 0.94",
    )
    group.add_argument(
        "--ramp-limit",
        metavar="WATTS/SECOND",
        help="how much the mean power of 100 ms may rise within any second, like 200W/s",
    )


def _choices(key: str) -> tuple[str, ...]:
    return get_args(ShaperConfig.model_fields[key].annotation)


_QUANTITIES = (
    ("itl_target", "itl_target_seconds", parse_seconds),
    ("ttft_target", "ttft_target_seconds", parse_seconds),
    ("ramp_limit", "ramp_watts_per_second", parse_watts_per_second),
    ("host_overhead", "host_overhead_watts", parse_watts),
)
_LIMITS = (
    ("power_limit", "limits"),
    ("gpu_limit", "gpu_limits"),
    ("group_limit", "group_limits"),
)
_AS_THEY_ARE = (
    *((key, key) for key in ("objective", "policy", "record", "power_group", "gpu_profile")),
    ("psu_efficiency", "psu_efficiency_ratio"),
)


def _given(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings that flags of their own give, and which flag gave each."""
    given: dict[str, Any] = {}
    flags: dict[str, str] = {}
    for name, key in _LIMITS:
        texts = getattr(options, name)
        if texts:
            given[key] = [parse_power_limit(text).model_dump() for text in texts]
            flags[key] = f"--{name.replace('_', '-')}"
    for name, key, parse in _QUANTITIES:
        text = getattr(options, name)
        if text is not None:
            flags[key] = f"--{name.replace('_', '-')}"
            try:
                given[key] = parse(text)
            except ValueError as error:
                raise ConfigError(f"{flags[key]}: {error}") from error
    for name, key in _AS_THEY_ARE:
        if getattr(options, name) is not None:
            given[key] = getattr(options, name)
            flags[key] = f"--{name.replace('_', '-')}"
    for name in ("shadow", "force_version", "unshaped_ok"):
        if getattr(options, name):
            given[name] = True
            flags[name] = f"--{name.replace('_', '-')}"
    return given, flags


def shaper_config(options: argparse.Namespace) -> ShaperConfig | None:
    """The config that the flags and the environment give; None with `--shaper-off`.

    A key of the control routes that a file gives is moved into the environment.

    Raises:
        ConfigError: a value is wrong, or two flags say different things.
    """
    given, flags = _given(options)
    text = options.power_shaper_config
    if options.shaper_off:
        extra = [*flags.values(), *(["--power-shaper-config"] * bool(text))]
        if extra:
            raise ConfigError(f"--shaper-off contradicts {extra[0]}: leave one of them out")
        return None
    settings = settings_from_environment(os.environ)
    if text is not None:
        from_config = parse_config_text(text)
        take_admin_key(from_config, text, os.environ)
        for key, flag in flags.items():
            if key in from_config:
                raise ConfigError(
                    f"{flag} and --power-shaper-config both give {key!r}: leave one of them out"
                )
        settings |= from_config
    return build_config(settings | given, "shaper serve")
