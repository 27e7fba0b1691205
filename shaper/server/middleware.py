"""Puts our own layers around vLLM's API server, through its `--middleware`."""

from __future__ import annotations

import argparse
import os

from shaper.config.sources import admin_key

CONTROL_ROUTES = "shaper.server.routes.ControlRoutes"
ADMISSION = "shaper.server.admission.AdmissionMiddleware"
DRAIN = "shaper.server.drain.DrainMiddleware"


def add_admission(arguments: argparse.Namespace) -> None:
    """Mark flex requests for the engine, and refuse them while it sheds."""
    add_middleware(arguments, ADMISSION)


def add_control_routes(arguments: argparse.Namespace) -> None:
    """Serve the control routes, if there is a key for them.

    vLLM puts each middleware of the list around those before it, so that the last one sees
    a request first: before vLLM's `--api-key` does, and before any that might log a header.

    Raises:
        ConfigError: the key is no key.
    """
    if admin_key(os.environ) is not None:
        add_middleware(arguments, CONTROL_ROUTES)


def add_drain(arguments: argparse.Namespace) -> None:
    """See to it that a stop leaves no client without an end. Outermost: call it last."""
    add_middleware(arguments, DRAIN)


def add_middleware(arguments: argparse.Namespace, class_path: str) -> None:
    """Name a class in `--middleware`, last and once."""
    others = [path for path in getattr(arguments, "middleware", None) or [] if path != class_path]
    arguments.middleware = [*others, class_path]
