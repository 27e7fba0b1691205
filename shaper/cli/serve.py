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
import time
from collections.abc import MutableMapping, Sequence
from pathlib import Path

from shaper.cli.lifecycle import DRAIN_SECONDS, Terms, report_serving
from shaper.cli.replayed import check_gpu_count, take_replay
from shaper.cli.serve_flags import new_parser, shaper_config
from shaper.config.group import check_group_idle
from shaper.config.model import ShaperConfig, check_floor, check_gpu_limits
from shaper.config.sources import CONFIG_VARIABLE, setting_variables
from shaper.core.model.profile import GpuProfile
from shaper.emulator.activate import EMULATE_VARIABLE, REPLAY_VARIABLE
from shaper.engine.compat import (
    configure_logging,
    device_ids,
    drain_by_default,
    drain_seconds,
    gpus_per_engine,
    set_up_command_line,
    vllm_version,
)
from shaper.engine.preflight import (
    check_files,
    check_model,
    check_port,
    early_address,
    engine_count,
)
from shaper.engine.shapeable import (
    SCHEDULER_PATH,
    check_arguments,
    is_ours,
    unless_unshaped_ok,
)
from shaper.errors import ConfigError, GpuError
from shaper.gpu.profiles import load_profile
from shaper.group import check_group, cleanup_groups
from shaper.ipc.status_block import RUN_VARIABLE
from shaper.recording.format import finish_recordings
from shaper.server.middleware import add_layers


def main(argv: Sequence[str]) -> int:
    """Serves until a signal ends it.

    Args:
        argv: the command line after `shaper serve`.

    Returns:
        0. vLLM's own failures leave through its own exceptions and exit codes.

    Raises:
        ConfigError: a flag is wrong, contradicts another, or names what is not there.
        EngineError: vLLM is not installed, or no engine would keep what is asked.
        GpuError: there is no GPU to read, and none is emulated.
        TraceError: the readings to play can't be read.
        FleetError: the power group is there already, with other limits.
    """
    options, passed_on = new_parser().parse_known_args(list(argv))
    help_flag = next((f for f in passed_on if re.fullmatch(r"-h|--help(=.*)?", f)), None)
    if help_flag is not None:
        return _print_help(help_flag)
    config = shaper_config(options)
    take_replay(options, config)
    if config is not None:
        check_files(config)
    vllm_version()
    if config is not None and config.group is not None:
        with unless_unshaped_ok(config):
            check_group(config.group.name, config.group.limits)
    check_port(*early_address(passed_on))
    profile = _check_gpus(options, config)
    emulated = profile is not None
    if passed_on and not passed_on[0].startswith("-"):
        check_model(passed_on[0], emulated=emulated)
    prepare_environment(os.environ, config, options)
    arguments = _parse_with_vllm(passed_on)
    if config is not None:
        check_arguments(arguments, config)
    check_model(arguments.model_tag or arguments.model, emulated=emulated)
    if not getattr(arguments, "uds", None):
        check_port(arguments.host, arguments.port)
    if profile is not None:
        _emulate(arguments, profile, options, config)
    if config is not None:
        if profile is None:
            _check_all_gpus(arguments, config)
        check_gpu_limits(config, gpus_per_engine(arguments))
        _use_scheduler(arguments)
    add_layers(arguments, shaped=config is not None)
    report_serving(_terms(arguments))
    try:
        _run_vllm(arguments)
    finally:
        # vLLM may end an engine before it has closed its files.
        if config is not None and config.record is not None:
            finish_recordings(config.record)
        if config is not None and config.group is not None:
            cleanup_groups(time.monotonic(), config.group.name)
    return 0


def _emulate(
    arguments: argparse.Namespace,
    profile: GpuProfile,
    options: argparse.Namespace,
    config: ShaperConfig | None,
) -> None:
    """Fill in what emulated engines need, and check what depends on how many they are."""
    from shaper.emulator.serving import fill_in

    idle_watts = fill_in(arguments, profile)
    gpu_count, engines = gpus_per_engine(arguments), engine_count(arguments)
    if options.replay is not None:
        check_gpu_count(options.replay, gpu_count, engines)
    if config is None:
        return
    check_floor(config, idle_watts, gpu_count)
    group = config.group
    if group is not None:
        check_group_idle(group, idle_watts, engines)
        with unless_unshaped_ok(config):
            check_group(group.name, group.limits, idle_watts=idle_watts, engines=engines)


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

        with unless_unshaped_ok(config):
            try:
                check_gpus(config)
            except GpuError as error:
                raise type(error)(f"{error} (to serve without a GPU, add --emulate GPU)") from error
    return None


def _check_all_gpus(arguments: argparse.Namespace, config: ShaperConfig) -> None:
    """All GPUs of this host's engines, where vLLM's arguments say which."""
    named = device_ids(arguments)
    elsewhere = arguments.nnodes != 1 or arguments.distributed_executor_backend
    # Numbers in `--device-ids` count within CUDA_VISIBLE_DEVICES: vLLM settles that.
    if elsewhere in (False, None, "", "mp", "uni") and not (
        named and "CUDA_VISIBLE_DEVICES" in os.environ
    ):
        from shaper.engine.readers import check_gpus

        with unless_unshaped_ok(config):
            check_gpus(config, gpus_per_engine(arguments), engine_count(arguments), named)


def _use_scheduler(arguments: argparse.Namespace) -> None:
    if arguments.scheduler_cls is not None and not is_ours(arguments.scheduler_cls):
        raise ConfigError(
            f"--scheduler-cls {arguments.scheduler_cls} and the shaper exclude each other, "
            "the shaper is a scheduler: leave one of them out (or give --shaper-off)"
        )
    arguments.scheduler_cls = arguments.scheduler_cls or SCHEDULER_PATH


def prepare_environment(
    environ: MutableMapping[str, str], config: ShaperConfig | None, options: argparse.Namespace
) -> None:
    """Sets what vLLM's processes inherit. What the user has set stays, except our own."""
    environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    # What a server that started this one has left there is not for this one.
    environ.pop(RUN_VARIABLE, None)
    environ.pop(CONFIG_VARIABLE, None)
    if config is None:
        # Nor are settings of the shaper for a server without it.
        for variable in setting_variables():
            environ.pop(variable, None)
    else:
        environ[CONFIG_VARIABLE] = config.model_dump_json(exclude_unset=True)
    for variable in (EMULATE_VARIABLE, REPLAY_VARIABLE):
        environ.pop(variable, None)
    wanted = ["shaper"]
    if options.emulate is not None:
        path = Path(options.emulate)
        environ[EMULATE_VARIABLE] = str(path.resolve()) if path.is_file() else options.emulate
        if getattr(options, "replay", None) is not None:
            environ[REPLAY_VARIABLE] = str(options.replay)
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
    new_parser().print_help()
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

    set_up_command_line()
    parser = FlexibleArgumentParser(prog="shaper", description="vllm serve, shaped")
    subparsers = parser.add_subparsers(required=True, dest="subparser")
    serve = ServeSubcommand().subparser_init(subparsers)
    serve.usage = "shaper serve [model_tag] [options]"
    drain_by_default(serve, DRAIN_SECONDS)
    arguments: argparse.Namespace = parser.parse_args(["serve", *passed_on])
    return arguments


def _terms(arguments: argparse.Namespace) -> Terms:
    """What the watching process needs to know of this server."""
    uds = getattr(arguments, "uds", None)
    listens = uds is None and not arguments.headless
    return Terms(drain_seconds(arguments), arguments.host, arguments.port if listens else None, uds)


def _run_vllm(arguments: argparse.Namespace) -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand

    configure_logging(arguments)
    command = ServeSubcommand()
    command.validate(arguments)
    command.cmd(arguments)
