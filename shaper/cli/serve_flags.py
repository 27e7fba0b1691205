"""The shaper's own flags of `shaper serve`, and the configuration that they make."""

from __future__ import annotations

import argparse
import os

from shaper.cli.arguments import SETTING_FLAGS, Parser, add_settings
from shaper.config.model import ShaperConfig, build_config
from shaper.config.sources import parse_config_text, settings_from_environment, take_admin_key
from shaper.errors import ConfigError

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
    add_settings(group, *SETTING_FLAGS)
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
    return parser


def shaper_config(options: argparse.Namespace) -> ShaperConfig | None:
    """The config that the flags and the environment give; None with `--shaper-off`.

    A key of the control routes that a file gives is moved into the environment.

    Raises:
        ConfigError: a value is wrong, or two flags say different things.
    """
    given = {key: value for key, value in vars(options).items() if key in SETTING_FLAGS}
    text = options.power_shaper_config
    if options.shaper_off:
        extra = [SETTING_FLAGS[key].name for key in given]
        extra += ["--power-shaper-config"] * bool(text)
        if extra:
            raise ConfigError(f"--shaper-off contradicts {extra[0]}: leave one of them out")
        return None
    settings = settings_from_environment(os.environ)
    if text is not None:
        from_config = parse_config_text(text)
        take_admin_key(from_config, text, os.environ)
        for key in given:
            if key in from_config:
                raise ConfigError(
                    f"{SETTING_FLAGS[key].name} and --power-shaper-config both give {key!r}: "
                    "leave one of them out"
                )
        settings |= from_config
    return build_config(settings | given, "shaper serve")
