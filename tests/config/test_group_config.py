"""Settings of a power group: what they mean, and what each mistake says."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shaper.cli import main, serve_flags
from shaper.config.group import check_group_idle
from shaper.config.model import build_config, check_floor, check_gpu_limits
from shaper.config.sources import CONFIG_VARIABLE, load_config
from shaper.core.types import PowerLimit
from shaper.errors import ConfigError

RACK = {"power_group": "rack-1", "group_limits": "4000W@100ms"}
WALL = {"host_overhead_watts": "1800W", "psu_efficiency_ratio": 0.94}


def test_a_group_asks_for_shaping_and_shares_its_limits():
    """Also where the engine has no limit of its own."""
    config = build_config({**RACK, "group_limits": "4000W@100ms,3.8kW@1s"})
    assert config.asks_for_shaping
    assert config.group is not None
    assert config.group.name == "rack-1"
    assert config.group.limits == (PowerLimit(4000.0, 0.1), PowerLimit(3800.0, 1.0))
    assert config.terms() == build_config({}).terms()
    assert build_config({}).group is None


def test_a_limit_at_the_wall_leaves_the_gpus_what_the_rest_does_not_take():
    """GPU watts = wall watts * efficiency - overhead, for each window."""
    config = build_config({**RACK, **WALL, "group_limits": "10kW@100ms,9kW@1s"})
    assert config.group is not None
    assert [limit.watts for limit in config.group.limits] == pytest.approx([7600.0, 6660.0])
    assert [limit.window_seconds for limit in config.group.limits] == [0.1, 1.0]


@given(
    gpu_watts=st.floats(1.0, 100_000.0),
    overhead_watts=st.floats(0.0, 20_000.0),
    efficiency_ratio=st.floats(0.7, 1.0),
)
def test_the_gpus_and_the_rest_never_draw_more_than_the_wall(
    gpu_watts, overhead_watts, efficiency_ratio
):
    """What the GPUs are given, the overhead and the losses add up to the limit."""
    wall_watts = (gpu_watts + overhead_watts) / efficiency_ratio
    config = build_config(
        {
            "power_group": "g",
            "group_limits": [{"watts": wall_watts, "window_seconds": 0.1}],
            "host_overhead_watts": overhead_watts,
            "psu_efficiency_ratio": efficiency_ratio,
        }
    )
    assert config.group is not None
    assert config.group.limits[0].watts == pytest.approx(gpu_watts, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"power_group": "rack-1"}, "give group_limits (--group-limit 4000W@100ms)"),
        ({"group_limits": "4000W@100ms"}, "name it with power_group (--power-group NAME)"),
        (WALL, "there is no group"),
        ({"host_overhead_watts": 0}, "there is no group"),
        ({**RACK, "host_overhead_watts": "1800W"}, "--psu-efficiency 0.94"),
        ({**RACK, "psu_efficiency_ratio": 0.94}, "--host-overhead 1800W"),
        ({**RACK, **WALL, "psu_efficiency_ratio": 94}, "if this is percent, write 0.94"),
        ({**RACK, **WALL, "psu_efficiency_ratio": 1.2}, "outside 0.7 to 1"),
        ({**RACK, **WALL, "psu_efficiency_ratio": float("nan")}, "psu_efficiency_ratio"),
        ({**RACK, **WALL, "host_overhead_watts": -1}, "outside 0 to"),
        ({**RACK, **WALL, "host_overhead_watts": "1800"}, "has no unit"),
        ({**RACK, **WALL, "host_overhead_watts": 1_800_000}, "outside 0 to"),
        ({**RACK, **WALL, "group_limits": "1900W@1s"}, "give more than 1915 W"),
        ({**RACK, "power_group": ""}, "1 to 64 letters, digits and dashes"),
        ({**RACK, "power_group": "../../etc/passwd"}, "letters, digits and dashes"),
        ({**RACK, "power_group": "rack 1"}, "letters, digits and dashes"),
        ({**RACK, "power_group": "rack-1\n"}, "letters, digits and dashes"),
        ({**RACK, "power_group": "räck"}, "letters, digits and dashes"),
        ({**RACK, "power_group": "r" * 65}, "letters, digits and dashes"),
        ({**RACK, "power_group": 7}, "power_group"),
        ({**RACK, "group_limits": "4000W"}, "no window"),
        ({**RACK, "group_limits": "4000W@1ms"}, "10 ms or more"),
        ({**RACK, "group_limits": "4000W@2min"}, "is over 60"),
        ({**RACK, "group_limits": "4000W@100ms,4100W@1s"}, "can never bind"),
        ({**RACK, "group_limits": "4000W@100ms,3900W@100ms"}, "keep one of them"),
        ({**RACK, "group_limits": [{"watt": 4000}]}, "did you mean 'watts'"),
        ({"power_grup": "rack-1"}, "did you mean 'power_group'"),
        ({**RACK, "sample_interval_seconds": 0.2}, "would take this engine for a hung one"),
        ({**RACK, "policy": "fixed"}, "leave policy or power_group out"),
    ],
)
def test_bad_groups_say_what_to_do(settings, says):
    """In one line, with the key; a budget that others share must not be guessed at."""
    with pytest.raises(ConfigError) as caught:
        build_config(settings)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_group_limit_below_what_idles_is_refused():
    """One engine's idle power at the least, all ranks of a server where they are known."""
    config = build_config({**RACK, "group_limits": "400W@1s"})
    check_floor(config, 399.0)
    with pytest.raises(ConfigError, match=r"leaves all GPUs 400 W .* draw 400 W idle"):
        check_floor(config, 400.0)
    assert config.group is not None
    check_group_idle(config.group, 112.0, 3)
    with pytest.raises(ConfigError, match=r"4 engine\(s\) alone draw 448 W idle"):
        check_group_idle(config.group, 112.0, 4)


def test_an_engine_s_limit_must_be_able_to_bind_inside_its_group():
    """Its own limit is below the group's, or it says nothing; also that of each GPU."""
    check_gpu_limits(build_config({**RACK, "limits": "600W@1s"}), 1)
    with pytest.raises(ConfigError, match=r"power group rack-1 has 4000 W over 0\.1 s"):
        check_gpu_limits(build_config({**RACK, "limits": "4000W@1s"}), 1)
    with pytest.raises(ConfigError, match="can never bind"):
        check_gpu_limits(build_config({**RACK, "gpu_limits": "700W@1s"}), 8)
    wall = build_config({**RACK, **WALL, "limits": "2500W@1s"})
    with pytest.raises(ConfigError, match=r"1960 W over 0\.1 s for all its engines"):
        check_gpu_limits(wall, 1)


@pytest.fixture
def no_settings(monkeypatch):
    for name in ("SHAPER_POWER_GROUP", "SHAPER_GROUP_LIMITS", CONFIG_VARIABLE):
        monkeypatch.delenv(name, raising=False)


def test_flags_environment_and_object_say_the_same(no_settings, monkeypatch):
    """Three ways to one config; children read back what the parent built."""
    line = "--power-group rack-1 --group-limit 9kW@100ms --group-limit 8kW@1s"
    line += " --host-overhead 1800W --psu-efficiency 0.94"
    options, left = serve_flags.new_parser().parse_known_args(line.split())
    assert left == []
    by_flags = serve_flags.shaper_config(options)
    assert by_flags is not None
    environ = {
        "SHAPER_POWER_GROUP": "rack-1",
        "SHAPER_GROUP_LIMITS": "9kW@100ms,8kW@1s",
        "SHAPER_HOST_OVERHEAD_WATTS": "1800W",
        "SHAPER_PSU_EFFICIENCY_RATIO": "0.94",
    }
    assert load_config(None, environ) == by_flags
    text = json.dumps({**RACK, **WALL, "group_limits": ["9kW@100ms", "8kW@1s"]})
    options, _ = serve_flags.new_parser().parse_known_args(["--power-shaper-config", text])
    assert serve_flags.shaper_config(options) == by_flags
    handed_on = {CONFIG_VARIABLE: by_flags.model_dump_json(exclude_unset=True)}
    assert load_config(None, handed_on) == by_flags


EMULATED = ("serve", "llama-3.1-8b", "--emulate", "h200-sxm", "--port", "0")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--power-group", "rack-1"), "--group-limit 4000W@100ms"),
        (("--group-limit", "4000W@100ms"), "--power-group NAME"),
        (("--power-group", "r", "--group-limit", "4000"), "no window"),
        (("--power-group", "r", "--group-limit", "100W@1s"), r"draw 11\d W idle"),
        (
            (*("--power-group", "r", "--group-limit", "2000W@1s"), "--host-overhead", "1800"),
            "--host-overhead: '1800' has no unit",
        ),
        (("--psu-efficiency", "94%"), "--psu-efficiency: .* valid number"),
        (("--shaper-off", "--power-group", "r"), "--shaper-off contradicts --power-group"),
    ],
)
def test_the_command_line_says_it_in_one_line(no_settings, capsys, arguments, says):
    """Code 2, before vLLM is imported."""
    assert main.main([*EMULATED, *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert re.search(says, lines[0]), lines[0]
