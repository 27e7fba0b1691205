"""The `vllm.general_plugins` entry: `--power-shaper-config` on vLLM's own command line.

vLLM calls `register` in every process, before it parses arguments. It wraps two
methods of `EngineArgs` and one of the metrics, once each, and is cheap.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import sys
from typing import Any

from shaper.config.model import ShaperConfig, build_config, check_gpu_limits
from shaper.config.sources import (
    ADDITIONAL_CONFIG_KEY,
    CONFIG_VARIABLE,
    given_settings,
    load_config,
    parse_config_text,
    take_admin_key,
)
from shaper.engine.compat import gpus_per_engine
from shaper.engine.refusal import show_refusals
from shaper.engine.shapeable import (
    SCHEDULER_PATH,
    check_arguments,
    check_engine,
    check_scheduler_class,
    is_ours,
)
from shaper.errors import ConfigError, EngineError
from shaper.ipc.logs import share_log_handlers
from shaper.ipc.status_block import run_id
from shaper.server.middleware import add_layers

logger = logging.getLogger(__name__)

FLAG = "--power-shaper-config"
_MARK = "_shaper_wrapped"
_FROM_COMMAND_LINE = "_shaper_from_command_line"


def register() -> None:
    """Wrap what needs to be wrapped. A failure leaves vLLM as it is, with a log line."""
    try:
        from vllm.engine.arg_utils import EngineArgs

        # Before any child is started, so that all processes of this run share it.
        run_id()
        share_log_handlers()
        _wrap_add_cli_args(EngineArgs)
        _wrap_from_cli_args(EngineArgs)
        _wrap_create_engine_config(EngineArgs)
        _wrap_multiprocess_collector()
    except Exception:
        # The boundary to a vLLM that has changed: serving goes on without the flag.
        logger.exception("%s is not available with this vLLM", FLAG)


def _wrap_add_cli_args(engine_args: Any) -> None:
    original = engine_args.__dict__["add_cli_args"].__func__
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = original(parser)
        if not any(FLAG in action.option_strings for action in parser._actions):
            group = parser.add_argument_group("PowerShaperConfig", "Power-aware step shaping.")
            group.add_argument(
                FLAG,
                metavar="JSON|PATH",
                default=None,
                help="Settings of the power shaper: a JSON object, or a path to JSON or TOML, "
                'e.g. \'{"limits": [{"watts": 560, "window_seconds": 1.0}]}\'.',
            )
        return parser

    setattr(add_cli_args, _MARK, True)
    engine_args.add_cli_args = staticmethod(add_cli_args)


def _wrap_from_cli_args(engine_args: Any) -> None:
    original = engine_args.__dict__["from_cli_args"].__func__
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def from_cli_args(cls: Any, args: argparse.Namespace) -> Any:
        try:
            use_flag(args)
        except (ConfigError, EngineError) as error:
            # As argparse does for a bad argument: one line and exit code 2.
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from error
        show_refusals()
        made = original(cls, args)
        setattr(made, _FROM_COMMAND_LINE, True)
        return made

    setattr(from_cli_args, _MARK, True)
    engine_args.from_cli_args = classmethod(from_cli_args)


def _wrap_create_engine_config(engine_args: Any) -> None:
    """Where the model is known too, and no engine has been started."""
    original = engine_args.create_engine_config
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(self, *args, **kwargs)
        try:
            _check_config(made)
        except (ConfigError, EngineError) as error:
            if not getattr(self, _FROM_COMMAND_LINE, False):
                raise
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from error
        return made

    setattr(create_engine_config, _MARK, True)
    engine_args.create_engine_config = create_engine_config


def _check_config(vllm_config: Any) -> None:
    given = given_settings(vllm_config.additional_config)
    if given is None and not is_ours(vllm_config.scheduler_config.scheduler_cls):
        return  # what the environment says is asked of a command line, not of every engine
    check_engine(vllm_config, load_config(given, os.environ))


def use_flag(args: argparse.Namespace) -> None:
    """Check the settings of this start, and turn the flag into a scheduler class.

    The settings travel in the environment, which vLLM's processes inherit, so that
    `additional_config` and with it vLLM's compile-cache key stay as they were.

    Raises:
        ConfigError: a setting is wrong.
        EngineError: nobody would keep what is asked.
    """
    text = getattr(args, "power_shaper_config", None)
    given = given_settings(getattr(args, "additional_config", None))
    if text is not None:
        if given is not None:
            raise ConfigError(
                f"both {FLAG} and additional_config[{ADDITIONAL_CONFIG_KEY!r}] are given: "
                "keep one of them"
            )
        settings = parse_config_text(text, FLAG)
        take_admin_key(settings, text, os.environ)
        build_config(settings, FLAG)
        os.environ[CONFIG_VARIABLE] = json.dumps(settings)
        _use_scheduler(args)
    chosen = getattr(args, "scheduler_cls", None)
    config = _settings(given, asked=given is not None or is_ours(chosen))
    if config is None:
        return
    check_arguments(args, config)
    check_scheduler_class(chosen, config)
    check_gpu_limits(config, gpus_per_engine(args))
    if is_ours(chosen):
        add_layers(args, shaped=True)


def _settings(given: Any, *, asked: bool) -> ShaperConfig | None:
    """The settings of this start; None where only variables that nobody asked us to read
    make no sense."""
    try:
        return load_config(given, os.environ)
    except ConfigError as error:
        if asked:
            raise
        logger.warning("the shaper is not used here, and its variables are not read: %s", error)
        return None


def _use_scheduler(args: argparse.Namespace) -> None:
    chosen = getattr(args, "scheduler_cls", None)
    if chosen not in (None, SCHEDULER_PATH):
        raise ConfigError(
            f"{FLAG} shapes with its own scheduler and --scheduler-cls names {chosen!r}: "
            "keep one of them"
        )
    args.scheduler_cls = SCHEDULER_PATH


def _wrap_multiprocess_collector() -> None:
    """Show our metrics where several API servers share vLLM's.

    With more than one, each scrape is answered from a fresh registry that reads only
    files of `PROMETHEUS_MULTIPROC_DIR`. A collector that joins it there brings ours in.
    """
    from prometheus_client.multiprocess import MultiProcessCollector

    original: Any = MultiProcessCollector.__init__
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def initialise(self: Any, registry: Any, *args: Any, **kwargs: Any) -> None:
        from shaper.server.stats import register_collector

        original(self, registry, *args, **kwargs)
        if registry is not None:
            register_collector(registry)

    setattr(initialise, _MARK, True)
    MultiProcessCollector.__init__ = initialise  # type: ignore[method-assign]
