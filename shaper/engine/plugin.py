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

from shaper.config import build_config, check_gpu_limits
from shaper.engine.logs import share_log_handlers
from shaper.engine.middleware import add_admission, add_control_routes
from shaper.engine.preflight import engine_gpu_count
from shaper.errors import ConfigError
from shaper.settings import (
    ADDITIONAL_CONFIG_KEY,
    CONFIG_VARIABLE,
    load_config,
    parse_config_text,
    take_admin_key,
)
from shaper.status import run_id

logger = logging.getLogger(__name__)

FLAG = "--power-shaper-config"
SCHEDULER_NAME = "shaper.PowerScheduler"
_MARK = "_shaper_wrapped"


def register() -> None:
    """Wrap what needs to be wrapped. A failure leaves vLLM as it is, with a log line."""
    try:
        from vllm.engine.arg_utils import EngineArgs

        # Before any child is started, so that all processes of this run share it.
        run_id()
        share_log_handlers()
        _wrap_add_cli_args(EngineArgs)
        _wrap_from_cli_args(EngineArgs)
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
        except ConfigError as error:
            # As argparse does for a bad argument: one line and exit code 2.
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from error
        return original(cls, args)

    setattr(from_cli_args, _MARK, True)
    engine_args.from_cli_args = classmethod(from_cli_args)


def use_flag(args: argparse.Namespace) -> None:
    """Check the settings of this start, and turn the flag into a scheduler class.

    The settings travel in the environment, which vLLM's processes inherit, so that
    `additional_config` and with it vLLM's compile-cache key stay as they were.

    Raises:
        ConfigError: a setting is wrong.
    """
    text = getattr(args, "power_shaper_config", None)
    additional = getattr(args, "additional_config", None)
    given = additional.get(ADDITIONAL_CONFIG_KEY) if isinstance(additional, dict) else None
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
    if text is not None or given is not None:
        check_gpu_limits(load_config(given, os.environ), engine_gpu_count(args))
    if getattr(args, "scheduler_cls", None) == SCHEDULER_NAME:
        add_admission(args)
        add_control_routes(args)


def _use_scheduler(args: argparse.Namespace) -> None:
    chosen = getattr(args, "scheduler_cls", None)
    if chosen not in (None, SCHEDULER_NAME):
        raise ConfigError(
            f"{FLAG} shapes with its own scheduler and --scheduler-cls names {chosen!r}: "
            "keep one of them"
        )
    args.scheduler_cls = SCHEDULER_NAME


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
        from shaper.engine.stats import register_collector

        original(self, registry, *args, **kwargs)
        if registry is not None:
            register_collector(registry)

    setattr(initialise, _MARK, True)
    MultiProcessCollector.__init__ = initialise  # type: ignore[method-assign]
