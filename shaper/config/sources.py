"""Where settings come from. The first that names a key wins:

1. what was given: `--power-limit` and its sisters, `--power-shaper-config`
   (JSON, or a path to JSON or TOML), or vLLM's
   `additional_config["power_shaper"]`;
2. `SHAPER_CONFIG`, a whole JSON object (this is how `shaper serve` hands its
   flags to vLLM's processes, so that vLLM's `additional_config`, which is part
   of its compile-cache key, does not change with the budget);
3. `SHAPER_<KEY>`, one variable per key, e.g. `SHAPER_LIMITS=560W@1s,640W@100ms`.

The key of the control routes is no setting: it travels in `SHAPER_ADMIN_KEY` alone.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from shaper.config.model import ShaperConfig, build_config
from shaper.config.suggest import suggest
from shaper.errors import ConfigError

ADDITIONAL_CONFIG_KEY = "power_shaper"
CONFIG_VARIABLE = "SHAPER_CONFIG"
ADMIN_KEY = "admin_key"
ADMIN_KEY_VARIABLE = "SHAPER_ADMIN_KEY"
ENV_PREFIX = "SHAPER_"
_OTHER_VARIABLES = frozenset(
    {
        *("SHAPER_EMULATE", "SHAPER_EMULATE_TRACE", "SHAPER_EMULATE_TIME_SCALE"),
        "SHAPER_EMULATE_REPLAY",
        *(CONFIG_VARIABLE, ADMIN_KEY_VARIABLE),
    }
)
# 16 hexadecimal digits are 64 bits: too many to guess over a network.
MIN_KEY_CHARACTERS = 16


def parse_config_text(text: str, source: str = "--power-shaper-config") -> dict[str, Any]:
    """The settings behind a JSON object, or behind a path to a JSON or TOML file.

    Raises:
        ConfigError: it is neither.
    """
    stripped = text.strip()
    if _inline(text):
        return _json_object(stripped, source)
    path = Path(stripped).expanduser()
    try:
        content = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: {path} is not UTF-8 text: save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(
            f"{source}: {stripped!r} is neither a JSON object nor a readable file "
            f"({error.strerror}); give '{{\"limits\": [...]}}' or a path to .json or .toml"
        ) from error
    if path.suffix.lower() != ".toml":
        return _json_object(content, str(path))
    try:
        return tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def _inline(text: str) -> bool:
    return text.lstrip().startswith("{")


def _json_object(text: str, source: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{source} must be a JSON object, not {value!r}")
    return value


def setting_variables() -> dict[str, str]:
    """The settings by the environment variables that may give them."""
    fields = ShaperConfig.model_fields
    return {f"{ENV_PREFIX}{name.removesuffix('_seconds').upper()}": name for name in fields}


def settings_from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """The settings that `SHAPER_*` variables give.

    Raises:
        ConfigError: a `SHAPER_` variable that means nothing, with the nearest that does.
    """
    variables = setting_variables()
    settings: dict[str, Any] = {}
    for variable, text in environ.items():
        if not variable.startswith(ENV_PREFIX) or variable in _OTHER_VARIABLES:
            continue
        if variable not in variables:
            raise ConfigError(
                f"environment variable {variable} means nothing to the shaper; "
                f"{suggest(variable, [*variables, *_OTHER_VARIABLES])}"
            )
        settings[variables[variable]] = _environment_value(text)
    if CONFIG_VARIABLE in environ:
        settings |= parse_config_text(environ[CONFIG_VARIABLE], CONFIG_VARIABLE)
    return settings


def _environment_value(text: str) -> Any:
    if text.strip().startswith(("[", "{")):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{text!r} is not valid JSON: {error}") from error
    return text


def given_settings(additional_config: Any) -> Any:
    """The shaper's settings in vLLM's `additional_config`; None where there are none."""
    if isinstance(additional_config, Mapping):
        return additional_config.get(ADDITIONAL_CONFIG_KEY)
    return None


def load_config(given: Mapping[str, Any] | None, environ: Mapping[str, str]) -> ShaperConfig:
    """The config of this engine: what was given, filled up from the environment.

    Raises:
        ConfigError: with the key, the value and the fix.
    """
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f"power_shaper must be an object of keys, not {given!r}")
    return build_config(settings_from_environment(environ) | dict(given or {}))


def take_admin_key(settings: dict[str, Any], text: str, environ: MutableMapping[str, str]) -> None:
    """Move the key of the control routes out of a file's settings, into the environment.

    It is then in no configuration object, hence in no log, and not on a command line.

    Args:
        settings: those that `text` gave; changed.
        text: what `parse_config_text` was given. A key in inline JSON stays where it is, and
            `build_config` refuses it.
        environ: changed; what stands there already wins.

    Raises:
        ConfigError: it is no key.
    """
    if not _inline(text) and ADMIN_KEY in settings:
        key = settings.pop(ADMIN_KEY)
        environ.setdefault(ADMIN_KEY_VARIABLE, key if isinstance(key, str) else "")
    admin_key(environ)


def admin_key(environ: Mapping[str, str]) -> str | None:
    """The key of the control routes; None: there are no such routes.

    Raises:
        ConfigError: it is too short to be a secret, or can't stand in a header.
    """
    key = environ.get(ADMIN_KEY_VARIABLE)
    if key is None:
        return None
    if len(key) < MIN_KEY_CHARACTERS or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"{ADMIN_KEY_VARIABLE} must be {MIN_KEY_CHARACTERS} or more ASCII characters without "
            "spaces; make one with: openssl rand -hex 16"
        )
    return key
