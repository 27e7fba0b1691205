"""The parser of this project's command lines."""

from __future__ import annotations

import argparse
from typing import NoReturn

from shaper.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Raises `ConfigError` in place of printing the usage and leaving."""

    def error(self, message: str) -> NoReturn:
        """See the class."""
        raise ConfigError(f"{message}; see {self.prog} --help")
