"""Puts our own layers around vLLM's API server, through its `--middleware`."""

from __future__ import annotations

import argparse
import os

from shaper.config.sources import admin_key

CONTROL_ROUTES = "shaper.server.routes.ControlRoutes"
ADMISSION = "shaper.server.admission.AdmissionMiddleware"
DRAIN = "shaper.server.drain.DrainMiddleware"


def add_layers(arguments: argparse.Namespace, *, shaped: bool) -> None:
    """Name the layers in `--middleware`.

    vLLM puts each middleware of the list around those before it, so that the last one sees
    a request first: the control routes come before vLLM's `--api-key` and before any layer that
    might log a header, and the drain sees every request.

    Args:
        arguments: of vLLM's server; changed.
        shaped: whether the engines have a shaper. Without one only the drain is added.

    Raises:
        ConfigError: the admin key is no key.
    """
    if shaped:
        add_middleware(arguments, ADMISSION)
        if admin_key(os.environ) is not None:
            add_middleware(arguments, CONTROL_ROUTES)
    add_middleware(arguments, DRAIN)


def add_middleware(arguments: argparse.Namespace, class_path: str) -> None:
    """Name a class in `--middleware`, last and once."""
    others = [path for path in getattr(arguments, "middleware", None) or [] if path != class_path]
    arguments.middleware = [*others, class_path]
