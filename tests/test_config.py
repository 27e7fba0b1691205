"""Settings: each mistake is named with its key, its value and what to do."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from shaper.config import (
    ShaperConfig,
    build_config,
    check_floor,
    load_config,
    parse_config_text,
    parse_power_limit,
)
from shaper.core.types import PowerLimit
from shaper.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "watts", "seconds"),
    [
        ("560W@1s", 560.0, 1.0),
        ("4kW@100ms", 4000.0, 0.1),
        ("640 W @ 0.1 s", 640.0, 0.1),
        ("1e3w@1min", 1000.0, 60.0),
    ],
)
def test_limits_are_read(text, watts, seconds):
    """Quantities carry their units."""
    assert parse_power_limit(text).as_limit() == PowerLimit(watts, seconds)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("560W", "no window"),
        ("560@1s", "no unit"),
        ("560W@1", "no unit"),
        ("560V@1s", "unit 'V'"),
        ("1MW@1s", "unit 'MW'"),
        ("560000W@1s", "milliwatts, write 560"),
        ("560W@100s", "milliseconds, write 0.1"),
        ("560W@1ms", "10 ms or more"),
        ("0W@1s", "above 0"),
        ("-5W@1s", "not a quantity"),
        ("@", "not a quantity"),
        ("nanW@1s", "not a quantity"),
    ],
)
def test_bad_limits_say_what_to_write(text, says):
    """The message quotes the text and names the fix."""
    with pytest.raises(ConfigError) as caught:
        parse_power_limit(text)
    assert says in str(caught.value)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"limts": []}, "did you mean 'limits'"),
        ({"limits": [{"watt": 560, "window_seconds": 1}]}, "did you mean 'watts'"),
        ({"limits": "560W@1s,550W@1s"}, "keep one of them"),
        ({"limits": "560W@100ms,640W@1s"}, "can never bind"),
        ({"limits": 560}, "limits"),
        ({"itl_target_seconds": 50}, "milliseconds, write 0.05"),
        ({"itl_target_seconds": "50"}, "no unit"),
        ({"objective": "efficiency"}, "set itl_target_seconds"),
        ({"objective": "speed"}, "objective"),
        ({"shadow": "maybe"}, "'maybe'"),
        ({"margin_ratio": 3}, "margin_ratio"),
        ({"margin_ratio": float("nan")}, "margin_ratio"),
        ({"policy": "predictve"}, "policy"),
        ({"sample_interval_seconds": 0}, "sample_interval_seconds"),
    ],
)
def test_bad_settings_name_the_key_and_the_fix(settings, says):
    """Every mistake stops the start with a message that helps."""
    with pytest.raises(ConfigError) as caught:
        build_config(settings)
    assert says in str(caught.value)


def test_what_is_given_wins_over_the_environment_key_by_key():
    """Given, then SHAPER_CONFIG, then SHAPER_<KEY>."""
    environ = {
        "SHAPER_LIMITS": "560W@1s,640W@100ms",
        "SHAPER_ITL_TARGET": "50ms",
        "SHAPER_SHADOW": "1",
        "SHAPER_CONFIG": json.dumps({"itl_target_seconds": 0.04}),
        "SHAPER_EMULATE": "h200-sxm",
        "PATH": "/bin",
    }
    config = load_config({"shadow": False}, environ)
    assert config.power_limits == (PowerLimit(640.0, 0.1), PowerLimit(560.0, 1.0))
    assert config.itl_target_seconds == 0.04
    assert config.shadow is False


def test_a_misspelt_variable_is_an_error():
    """A budget that is silently ignored would be the worst mistake."""
    with pytest.raises(ConfigError, match="SHAPER_LIMITS"):
        load_config(None, {"SHAPER_LIMTS": "560W@1s"})


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_files_are_read(tmp_path, suffix):
    """The flag takes a path to TOML or JSON as well."""
    path = tmp_path / f"budget{suffix}"
    path.write_text(
        'limits = ["560W@1s"]\nshadow = true\n'
        if suffix == ".toml"
        else '{"limits": ["560W@1s"], "shadow": true}'
    )
    config = build_config(parse_config_text(str(path)))
    assert config.shadow
    assert config.power_limits == (PowerLimit(560.0, 1.0),)


@pytest.mark.parametrize("text", ["/no/such/file.toml", "{broken", "[1]"])
def test_unreadable_settings_are_named(text):
    """A missing file and broken JSON each say so."""
    with pytest.raises(ConfigError):
        parse_config_text(text)


def test_a_list_for_settings_is_refused():
    """`additional_config={"power_shaper": [...]}` is no mapping."""
    with pytest.raises(ConfigError, match="object of keys"):
        load_config([("limits", 1)], {})  # type: ignore[arg-type]


def test_a_limit_below_idle_names_the_idle_power():
    """No schedule can keep it."""
    with pytest.raises(ConfigError, match="112 W"):
        check_floor(build_config({"limits": "100W@1s"}), 112.0)
    check_floor(build_config({"limits": "113W@1s"}), 112.0)


def test_the_config_is_frozen():
    """Built once, never changed."""
    with pytest.raises(ValidationError):
        ShaperConfig().shadow = True
