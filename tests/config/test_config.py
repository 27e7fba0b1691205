"""Settings: each mistake is named with its key, its value and what to do."""

from __future__ import annotations

import json
import math

import pytest

from shaper.config.budget import parse_power_limit
from shaper.config.model import build_config, check_floor, check_gpu_limits
from shaper.config.sources import load_config, parse_config_text, take_admin_key
from shaper.core.budget import Constraints, resolve
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
    assert parse_power_limit(text) == PowerLimit(watts, seconds)


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
        ({"gpu_limits": "650W@1s,640W@1s"}, "gpu_limits name the window 1 s twice"),
        ({"limits": [f"{900 - i}W@{10 + i}ms" for i in range(33)]}, "at most 32"),
        ({"ramp_watts_per_second": "200W"}, "unit 'W'; use one of w/s"),
        ({"ramp_watts_per_second": "200MW/s"}, "unit 'MW/s'"),
        ({"ramp_watts_per_second": -1}, "outside 1 to 1,000,000"),
        ({"ttft_target_seconds": 1000}, "milliseconds, write 1"),
        ({"policy": "static"}, "shaper simulate --policy static"),
        ({"policy": "fixed", "static_caps": {"prefill_tokens": 9}}, "static_caps"),
        ({"flex_max_wait_seconds": "0s"}, "outside 1 s to a day"),
        ({"flex_on_timeout": "drop"}, "'run' or 'refuse'"),
        ({"api_key_classes": {"k": "flexible"}}, "'interactive' or 'flex'"),
        ({"admin_key": "x" * 20}, "SHAPER_ADMIN_KEY"),
    ],
)
def test_bad_settings_name_the_key_and_the_fix(settings, says):
    """Every mistake stops the start with a message that helps."""
    with pytest.raises(ConfigError) as caught:
        build_config(settings)
    assert says in str(caught.value)


NIGHT = {"daily": "22:00-06:00", "limits": ["450W@1s"]}
EVENING = {
    "at": "2026-11-25T18:00:00Z",
    "until": "2026-11-25T22:00:00+01:00",
    "limits": ["400W@1s"],
}


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([NIGHT | {"dayly": "x"}], "did you mean 'daily'"),
        ([NIGHT | {"limits": [{"watt": 5}]}], "did you mean 'watts'"),
        ([{"daily": "22:00-06:00"}], "says no limits"),
        ([{"limits": ["450W@1s"]}], "give at and until, or daily"),
        ([EVENING | {"until": None}], "give at and until"),
        ([EVENING | {"daily": "22:00-06:00"}], "make two entries"),
        ([EVENING | {"until": "2026-11-25T18:00:00Z"}], "is not before"),
        ([EVENING | {"at": "2026-11-25T18:00:00"}], "has no zone"),
        ([EVENING | {"at": "tomorrow"}], "no moment"),
        ([EVENING | {"at": 1764093600}], "no moment"),
        ([EVENING | {"zone": "UTC"}], "belongs to daily entries"),
        ([NIGHT | {"daily": "22:00"}], "write 22:00-06:00"),
        ([NIGHT | {"daily": "22:00-25:00"}], "write 22:00-06:00"),
        ([NIGHT | {"daily": "24:00-06:00"}], "write 22:00-06:00"),
        ([NIGHT | {"daily": "22:60-06:00"}], "write 22:00-06:00"),
        ([NIGHT | {"daily": "06:00-06:00"}], "00:00-24:00"),
        ([NIGHT | {"zone": "Europe/Berlinn"}], "did you mean 'Europe/Berlin'"),
        ([NIGHT | {"zone": "../../etc/passwd"}], "is unknown"),
        ([NIGHT | {"weekdays": "mon-fri"}], "remove the key, and give the days that differ"),
        ([NIGHT, NIGHT | {"daily": "05:59-12:00"}], "overlap"),
        ([NIGHT, NIGHT | {"daily": "21:59-22:01"}], "overlap"),
        ([NIGHT, NIGHT | {"daily": "00:00-24:00"}], "overlap"),
        ([NIGHT, NIGHT | {"daily": "08:00-09:00", "zone": "Europe/Berlin"}], "one zone"),
        (
            [EVENING, EVENING | {"at": "2026-11-25T20:59:59Z", "until": "2027-01-01T00:00:00Z"}],
            "overlap",
        ),
    ],
)
def test_bad_schedules_name_the_entry_and_the_fix(entries, says):
    """A wrong entry stops the start; it would else be found at night."""
    with pytest.raises(ConfigError) as caught:
        build_config({"limits": ["560W@1s"], "schedule": entries})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_schedule_that_is_right_is_read():
    """Neighbours touch, and a dated entry may lie over a daily one."""
    config = build_config(
        {
            "schedule": [
                EVENING,
                NIGHT,
                NIGHT | {"daily": "06:00-22:00", "ramp_watts_per_second": "none"},
            ]
        }
    )
    plan = config.budget_plan
    # The dated one comes last, over the others.
    assert plan.schedule[-1].name.startswith("at 2026-11-25 18:00:00")
    assert config.asks_for_shaping
    again = build_config(json.loads(config.model_dump_json(exclude_unset=True)))
    assert again == config
    assert again.schedule[2].ramp_watts_per_second == math.inf


def test_a_schedule_is_read_from_toml_with_its_own_dates(tmp_path):
    """TOML has dates; one without an offset is refused like any other."""
    path = tmp_path / "budget.toml"
    entry = "[[schedule]]\nat = 2026-11-25T18:00:00{}\nuntil = 2026-11-25T22:00:00Z\n"
    entry += 'limits = ["400W@1s"]\n'
    path.write_text(entry.format("Z"))
    assert len(build_config(parse_config_text(str(path))).schedule) == 1
    path.write_text(entry.format(""))
    with pytest.raises(ConfigError, match="has no zone"):
        build_config(parse_config_text(str(path)))


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
    assert resolve(config.terms(), 1).limits == (PowerLimit(640.0, 0.1), PowerLimit(560.0, 1.0))
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
    assert resolve(config.terms(), 1).limits == (PowerLimit(560.0, 1.0),)


def test_a_list_for_settings_is_refused():
    """`additional_config={"power_shaper": [...]}` is no mapping."""
    with pytest.raises(ConfigError, match="object of keys"):
        load_config([("limits", 1)], {})  # type: ignore[arg-type]


def test_a_limit_below_idle_names_the_idle_power():
    """No schedule can keep it."""
    with pytest.raises(ConfigError, match="112 W"):
        check_floor(build_config({"limits": "100W@1s"}), 112.0)
    check_floor(build_config({"limits": "113W@1s"}), 112.0)


def test_a_scheduled_limit_below_idle_is_found_at_the_start():
    """And one of each GPU, against one GPU's share of idle power."""
    with pytest.raises(ConfigError, match="schedule: daily 22:00-06:00 UTC: power limit 100 W"):
        check_floor(build_config({"schedule": [NIGHT | {"limits": ["100W@1s"]}]}), 112.0)
    config = build_config({"gpu_limits": "113W@1s"})
    check_floor(config, 224.0, 2)
    with pytest.raises(ConfigError, match=r"each GPU draws idle \(114 W\)"):
        check_floor(config, 228.0, 2)


def test_limits_of_the_engine_and_of_each_gpu_must_both_be_able_to_bind():
    """It depends on how many GPUs there are, and not on how they share the work."""
    config = build_config({"limits": "1200W@1s", "gpu_limits": "650W@1s"})
    check_gpu_limits(config, 2)
    with pytest.raises(ConfigError, match="the engine's can never bind"):
        check_gpu_limits(config, 1)
    loose = build_config({"limits": "600W@1s", "gpu_limits": "650W@1s"})
    with pytest.raises(ConfigError, match="each GPU's can never bind"):
        check_gpu_limits(loose, 2)


def test_the_admin_key_is_taken_out_of_a_file_and_nowhere_else(tmp_path):
    """It goes into the environment, where what stands already wins, and into no config."""
    path = tmp_path / "s.toml"
    path.write_text(f'admin_key = "{"k" * 20}"\nlimits = ["560W@1s"]\n')
    environ: dict[str, str] = {}
    settings = parse_config_text(str(path))
    take_admin_key(settings, str(path), environ)
    assert environ == {"SHAPER_ADMIN_KEY": "k" * 20}
    assert "k" * 20 not in repr(build_config(settings))
    settings, environ = parse_config_text(str(path)), {"SHAPER_ADMIN_KEY": "e" * 20}
    take_admin_key(settings, str(path), environ)
    assert environ == {"SHAPER_ADMIN_KEY": "e" * 20}
    inline = '{"admin_key": "kkkkkkkkkkkkkkkkkkkk"}'
    settings, environ = parse_config_text(inline), {}
    take_admin_key(settings, inline, environ)
    assert environ == {}
    with pytest.raises(ConfigError) as caught:
        build_config(settings)
    assert "kkkk" not in str(caught.value)
    path.write_text("admin_key = 12345678901234567890\n")
    with pytest.raises(ConfigError, match="openssl rand"):
        take_admin_key(parse_config_text(str(path)), str(path), {})


def test_objects_may_stand_in_variables():
    """As JSON."""
    environ = {
        "SHAPER_SCHEDULE": json.dumps([NIGHT]),
        "SHAPER_RAMP_WATTS_PER_SECOND": "200W/s",
        "SHAPER_TTFT_TARGET": "1s",
        "SHAPER_ADMIN_KEY": "not a setting",
    }
    config = load_config(None, environ)
    assert config.ramp_watts_per_second == 200.0
    assert config.ttft_target_seconds == 1.0
    assert len(config.schedule) == 1


def test_heat_is_shaped_where_there_is_something_to_keep():
    """Without a limit or a target vLLM is left alone, unless it is asked for."""
    free, later = Constraints(), Constraints(shared_limits=(PowerLimit(560.0, 1.0),))
    assert not build_config({}).shapes_heat(free)
    assert build_config({}).shapes_heat(later)
    assert build_config({"limits": "560W@1s"}).shapes_heat(free)
    assert build_config({"shape_heat": True}).shapes_heat(free)
    assert not build_config({"limits": "560W@1s", "shape_heat": False}).shapes_heat(later)
