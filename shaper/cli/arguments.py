"""The parser of this project's command lines, and the flags of settings."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from shaper.config.budget import first_line
from shaper.config.model import Flag, ShaperConfig
from shaper.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Its errors are `ConfigError`s, in place of printing the usage and leaving."""

    def error(self, message: str) -> NoReturn:
        """Raise."""
        raise ConfigError(f"{message}; see {self.prog} --help")


SETTING_FLAGS = {
    name: flag
    for name, field in ShaperConfig.model_fields.items()
    for flag in field.metadata
    if isinstance(flag, Flag)
}
"""Flags by the settings that they give."""


def add_settings(group: argparse._ArgumentGroup, *settings: str) -> None:
    """Add the flags of settings, with their types and help from `ShaperConfig`.

    A value goes into the namespace under its setting's name; without the flag it is absent.
    """
    for name in settings:
        flag, field = SETTING_FLAGS[name], ShaperConfig.model_fields[name]
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
        options["help"] = " ".join((field.description or "").split())
        if field.annotation is bool:
            options["action"] = "store_true"
        else:
            many = get_origin(field.annotation) is tuple
            options |= {"type": _reader(field), "action": "extend" if many else "store"}
            options["metavar"] = flag.metavar
        group.add_argument(flag.name, **options)


def _reader(field: FieldInfo) -> Callable[[str], object]:
    adapter: TypeAdapter[object] = TypeAdapter(field.rebuild_annotation())

    def read(text: str) -> object:
        try:
            return adapter.validate_python(text)
        except ValidationError as error:
            ours = error.errors()[0]["type"] == "value_error"
            given = "" if ours else f" (given: {text!r})"
            raise argparse.ArgumentTypeError(f"{first_line(error)}{given}") from error

    return read
