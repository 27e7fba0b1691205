"""`shaper serve`: vLLM's own serve command, with the shaper (and maybe an emulated GPU) in it.

The shaper's flags are taken out of the command line and all others go to
vLLM's parser untouched. What can be checked is checked before an engine
starts, so that a wrong setting costs one line and not a minute.

The config travels to vLLM's processes in `SHAPER_CONFIG`, not in vLLM's
`additional_config`: that is part of the key of vLLM's compile cache, and a
change of the budget must not recompile the model.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from shaper.config import (
    CONFIG_VARIABLE,
    ShaperConfig,
    build_config,
    check_floor,
    parse_config_text,
    parse_power_limit,
    settings_from_environment,
)
from shaper.core.profile import GpuProfile
from shaper.emulator.activate import EMULATE_VARIABLE
from shaper.engine.preflight import check_model, check_port, check_vllm, early_address
from shaper.errors import ConfigError, GpuError
from shaper.gpu.profiles import load_profile
from shaper.recording import finish_recordings
from shaper.status import RUN_VARIABLE
from shaper.units import parse_seconds

SCHEDULER_CLASS_PATH = "shaper.PowerScheduler"

DESCRIPTION = """\
vllm serve with the shaper in it: same routes, same flags, same exit codes.
Flags that are not listed here go to vLLM; `shaper serve --help=all` lists them too.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see shaper serve --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="shaper serve",
        usage="shaper serve MODEL [shaper's flags] [any flag of vllm serve]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("shaper")
    group.add_argument(
        "--power-limit",
        action="append",
        metavar="WATTS@WINDOW",
        help="mean power that no window of this length may exceed, summed over the engine's "
        "GPUs, like 560W@1s; may be given several times",
    )
    group.add_argument(
        "--itl-target",
        metavar="TIME",
        help="longest step that decodes may wait behind, like 50ms",
    )
    group.add_argument(
        "--objective",
        choices=("latency", "efficiency"),
        help="latency (default): tokens wait only as the budget asks; efficiency: decodes wait up "
        "to the ITL target for larger steps, for fewer joules a token",
    )
    group.add_argument(
        "--shadow",
        action="store_true",
        help="predict, decide, record and expose everything, apply nothing",
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
        "MODEL may then be a built-in shape, like llama-3.1-8b",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Serves until a signal ends it.

    Args:
        argv: the command line after `shaper serve`.

    Returns:
        0. vLLM's own failures leave through its own exceptions and exit codes.

    Raises:
        ConfigError: a flag is wrong, contradicts another, or names what is not there.
        EngineError: vLLM is not installed.
        GpuError: there is no GPU to read, and none is emulated.
    """
    options, passed_on = _parser().parse_known_args(list(argv))
    help_flag = next((f for f in passed_on if re.fullmatch(r"-h|--help(=.*)?", f)), None)
    if help_flag is not None:
        return _print_help(help_flag)
    config = shaper_config(options)
    check_vllm()
    check_port(*early_address(passed_on))
    profile = _check_gpus(options, config)
    emulated = profile is not None
    if passed_on and not passed_on[0].startswith("-"):
        check_model(passed_on[0], emulated=emulated)
    prepare_environment(os.environ, config, options)
    arguments = _parse_with_vllm(passed_on)
    check_model(arguments.model_tag or arguments.model, emulated=emulated)
    if not getattr(arguments, "uds", None):
        check_port(arguments.host, arguments.port)
    if profile is not None:
        from shaper.emulator.serving import fill_in

        idle_watts = fill_in(arguments, profile)
        if config is not None:
            check_floor(config, idle_watts)
    if config is not None:
        _use_scheduler(arguments)
    try:
        _run_vllm(arguments)
    finally:
        # vLLM may end an engine before it has closed its files.
        if config is not None and config.record is not None:
            finish_recordings(config.record)
    return 0


def _check_gpus(options: argparse.Namespace, config: ShaperConfig | None) -> GpuProfile | None:
    """The profile of the GPU to emulate; None after a look at the real ones."""
    if options.emulate is not None:
        profile = load_profile(options.emulate)
        if config is not None:
            # Of one GPU: how many there will be, only vLLM's parser knows.
            check_floor(config, profile.power.context_watts)
        return profile
    if config is not None:
        from shaper.engine.readers import check_gpus

        try:
            check_gpus(config)
        except GpuError as error:
            raise type(error)(f"{error} (to serve without a GPU, add --emulate GPU)") from error
    return None


def _use_scheduler(arguments: argparse.Namespace) -> None:
    if arguments.scheduler_cls not in (None, SCHEDULER_CLASS_PATH):
        raise ConfigError(
            f"--scheduler-cls {arguments.scheduler_cls} and the shaper exclude each other, "
            "the shaper is a scheduler: leave one of them out (or give --shaper-off)"
        )
    arguments.scheduler_cls = SCHEDULER_CLASS_PATH


def shaper_config(options: argparse.Namespace) -> ShaperConfig | None:
    """The config that the flags and the environment give; None with `--shaper-off`.

    Raises:
        ConfigError: a value is wrong, or two flags say different things.
    """
    given: dict[str, Any] = {}
    flags: dict[str, str] = {}
    if options.power_limit:
        given["limits"] = [parse_power_limit(text).model_dump() for text in options.power_limit]
        flags["limits"] = "--power-limit"
    if options.itl_target is not None:
        try:
            given["itl_target_seconds"] = parse_seconds(options.itl_target)
        except ValueError as error:
            raise ConfigError(f"--itl-target: {error}") from error
        flags["itl_target_seconds"] = "--itl-target"
    if options.objective is not None:
        given["objective"] = options.objective
        flags["objective"] = "--objective"
    if options.shadow:
        given["shadow"] = True
        flags["shadow"] = "--shadow"
    if options.record is not None:
        given["record"] = options.record
        flags["record"] = "--record"
    if options.shaper_off:
        extra = [*flags.values(), *(["--power-shaper-config"] * bool(options.power_shaper_config))]
        if extra:
            raise ConfigError(f"--shaper-off contradicts {extra[0]}: leave one of them out")
        return None
    settings = settings_from_environment(os.environ)
    if options.power_shaper_config is not None:
        from_config = parse_config_text(options.power_shaper_config)
        for key, flag in flags.items():
            if key in from_config:
                raise ConfigError(
                    f"{flag} and --power-shaper-config both give {key!r}: leave one of them out"
                )
        settings |= from_config
    return build_config(settings | given, "shaper serve")


def prepare_environment(
    environ: MutableMapping[str, str], config: ShaperConfig | None, options: argparse.Namespace
) -> None:
    """Sets what vLLM's processes inherit. What the user has set stays, except our own."""
    environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    # What a server that started this one has left there is not for this one.
    environ.pop(RUN_VARIABLE, None)
    environ.pop(CONFIG_VARIABLE, None)
    if config is not None:
        environ[CONFIG_VARIABLE] = config.model_dump_json(exclude_unset=True)
    environ.pop(EMULATE_VARIABLE, None)
    wanted = ["shaper"]
    if options.emulate is not None:
        path = Path(options.emulate)
        environ[EMULATE_VARIABLE] = str(path.resolve()) if path.is_file() else options.emulate
        environ.setdefault("HF_HUB_OFFLINE", "1")
        # An emulated machine must not show up in vLLM's usage statistics.
        environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        # An explicit CPU target would win over the emulated platform.
        environ.pop("VLLM_TARGET_DEVICE", None)
        wanted.append("shaper_emulated")
    allowed = environ.get("VLLM_PLUGINS")
    if allowed is not None:
        names = [name for name in allowed.split(",") if name]
        environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*names, *wanted]))


def _print_help(flag: str) -> int:
    _parser().print_help()
    print()
    if "=" not in flag or importlib.util.find_spec("vllm") is None:
        print("vLLM's flags: shaper serve --help=all, or one group: --help=ModelConfig")
        return 0
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    _parse_with_vllm([flag])
    return 0


def _parse_with_vllm(passed_on: Sequence[str]) -> argparse.Namespace:
    """vLLM's own parsing of its own flags. A wrong one exits with 2, as `vllm serve` does."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    _vllm_cli_setup()
    parser = FlexibleArgumentParser(prog="shaper", description="vllm serve, shaped")
    subparsers = parser.add_subparsers(required=True, dest="subparser")
    serve = ServeSubcommand().subparser_init(subparsers)
    serve.usage = "shaper serve [model_tag] [options]"
    arguments: argparse.Namespace = parser.parse_args(["serve", *passed_on])
    return arguments


def _vllm_cli_setup() -> None:
    # It moved between vLLM's releases, and is a default or two of the environment.
    for module_name in (
        "vllm.entrypoints.serve.utils.api_utils",
        "vllm.entrypoints.utils",
    ):
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        setup = getattr(module, "cli_env_setup", None)
        if setup is not None:
            setup()
            return


def _run_vllm(arguments: argparse.Namespace) -> None:
    from vllm import logger as vllm_logger
    from vllm.entrypoints.cli.serve import ServeSubcommand

    configure = getattr(vllm_logger, "configure_logging_from_args", None)
    if configure is not None:
        configure(arguments)
    command = ServeSubcommand()
    command.validate(arguments)
    command.cmd(arguments)
