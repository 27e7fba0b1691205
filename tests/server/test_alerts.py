"""Each alert fires where it should and is silent where it should not: `promtool test rules`."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

RULES = Path(__file__).resolve().parents[2] / "deploy" / "prometheus" / "alerts.yml"
PROMTOOL = shutil.which("promtool")
# A scrape each 5 s, for 20 minutes.
INTERVAL_SECONDS, SCRAPES = 5, 240
NONE: frozenset[str] = frozenset()


def always(value: float) -> str:
    return f"{value}+0x{SCRAPES}"


def over(*parts: tuple[int, float | str]) -> str:
    """Values by how many seconds each lasts; `_` is no sample, `stale` the end of a series."""
    return " ".join(
        f"{value}x{seconds // INTERVAL_SECONDS}"
        if value == "_"
        else f"{value}+0x{seconds // INTERVAL_SECONDS - 1}"
        for seconds, value in parts
    )


def series(name: str, **labels: str) -> str:
    known = {"instance": "gpu1:8000", "engine": "0", **labels}
    return f"{name}{{{', '.join(f'{key}={value!r}' for key, value in known.items())}}}".replace(
        "'", '"'
    )


UP = 'up{instance="gpu1:8000", job="vllm-shaper"}'
LIMIT = series("shaper_power_limit_watts", window_seconds="1")
ON, SHADOW, OFF = (series("shaper_mode", mode=mode) for mode in ("on", "shadow", "off"))
REFUSED = series("shaper_requests_refused_total", work_class="flex", reason="power").replace(
    ', engine="0"', ""
)
GROUP_LIMIT = series("shaper_group_limit_watts", group="rack", window_seconds="1")
GROUP_ONLY: dict[str, str | None] = {
    LIMIT: None,
    series("shaper_power_limit_watts", window_seconds="0.1"): None,
    GROUP_LIMIT: always(560),
}
SECOND = {"instance": "gpu1:8001"}
_STALLED = series("shaper_group_engines", state="stalled")
HEALTHY = {
    UP: always(1),
    LIMIT: always(560),
    series("shaper_power_limit_watts", window_seconds="0.1"): always(640),
    ON: always(1),
    SHADOW: always(0),
    OFF: always(0),
    series("shaper_limit_unkept", reason="version"): always(0),
    series("shaper_part_errors_total", part="learn"): always(0),
    series("shaper_degraded_ratio", cause="clock"): always(0),
    REFUSED: always(0),
    series("shaper_group_engines", state="alive"): always(2),
    series("shaper_group_engines", state="stalled"): always(0),
} | {
    series(f"shaper_{name}"): always(value)
    for name, value in {
        "sample_age_seconds": 0.02,
        "heartbeat_age_seconds": 0.01,
        "sensor_lost": 0,
        "sample_read_errors_total": 3,
        "samples_rejected_total": 1,
        "sensor_hanging_seconds": 0,
        "errors_total": 0,
        "forced_steps_total": 0,
        "supervisor_errors_total": 0,
        "power_headroom_watts": 12,
        "power_average_watts": 548,
        "power_utilization_ratio": 0.9,
        "demand_watts": 600,
        "admission_state": 1,
        "gpu_clock_event_reasons": 4,
        "model_joules_gain_ratio": 1.02,
        "model_seconds_gain_ratio": 0.97,
        "model_disagrees": 0,
        "meter_disagrees": 0,
        "budget_infeasible": 0,
        "group_detached": 0,
        "group_errors_total": 0,
    }.items()
}


def engine(name: str) -> str:
    return series(f"shaper_{name}")


@dataclass(frozen=True)
class Scenario:
    """What differs from a healthy server, and all that fires at some times."""

    name: str
    changes: Mapping[str, str | None]
    fires: dict[str, frozenset[str]]


def one(
    name: str, changes: Mapping[str, str | None], alert: str, silent: str, loud: str
) -> Scenario:
    return Scenario(name, changes, {silent: NONE, loud: frozenset({alert})})


def counts(name: str) -> dict[str, str | None]:
    """A counter that moves by one, four minutes after the start."""
    return {name: over((240, 0), (960, 1))}


SCENARIOS = [
    Scenario("healthy", {}, {"20s": NONE, "5m": NONE, "19m": NONE}),
    Scenario(
        "fresh and full",
        {name: None for name in HEALTHY if "ratio" in name or "limit" in name}
        | {LIMIT: over((1200, 560)), engine("power_utilization_ratio"): over((1200, 1.0))},
        {"20s": NONE, "9m": NONE, "12m": frozenset({"ShaperPressureHigh"})},
    ),
    Scenario(
        "steady overload",
        {
            engine("power_utilization_ratio"): always(0.99),
            engine("demand_watts"): always(2240),
            engine("admission_state"): over((60, 1), (1140, 3)),
        },
        {
            "20s": NONE,
            "4m": frozenset({"ShaperDemandAboveLimit", "ShaperShedding"}),
            "15m": frozenset({"ShaperDemandAboveLimit", "ShaperShedding", "ShaperPressureHigh",
                              "ShaperFlexHeldLong"}),
        },
    ),
    one("a burst of demand", {engine("demand_watts"): over((300, 500), (10, 3000), (890, 500))},
        "", "6m", "20s"),
    Scenario(
        "shed for a moment",
        {engine("admission_state"): over((300, 1), (30, 3), (870, 1))},
        {"5m10s": NONE, "6m": NONE},
    ),
    one("flex deferred", {engine("admission_state"): over((60, 0), (1140, 2))},
        "ShaperFlexHeldLong", "5m", "13m"),
    Scenario(
        "dead server",
        {UP: over((300, 1), (900, 0))}
        | {name: over((300, float(value.partition("+")[0]))) + " stale"
           for name, value in HEALTHY.items() if name != UP},
        {"4m": NONE, "5m20s": NONE, "6m": frozenset({"ShaperServerDown"})},
    ),
    Scenario(
        "shadow over its limit",
        {engine("power_headroom_watts"): always(-100), ON: always(0), SHADOW: always(1)},
        {"1m": NONE, "5m": NONE},
    ),
    one("over its limit", {engine("power_headroom_watts"): over((120, 5), (1080, -40))},
        "ShaperOverLimit", "2m10s", "3m"),
    one(
        "over a limit of 100 ms alone",
        {LIMIT: None, engine("power_headroom_watts"): over((120, 5), (1080, -40))},
        "ShaperOverLimit", "2m10s", "3m",
    ),
    Scenario("at its limit", {engine("power_headroom_watts"): always(-3)}, {"5m": NONE}),
    one("lost sensor", {engine("sample_age_seconds"): over((120, 0.02), (1080, 60)),
                        engine("sensor_lost"): over((120, 0), (1080, 1))},
        "ShaperSensorLost", "1m", "3m"),
    one("no reading was ever believed",
        {engine("sample_age_seconds"): None, engine("sensor_lost"): over((10, 0), (1190, 1)),
         engine("samples_rejected_total"): f"0+250x{SCRAPES}"},
        "ShaperSensorLost", "20s", "2m"),
    Scenario(
        "no sensor on purpose",
        {engine("sample_age_seconds"): None, engine("sensor_lost"): always(1),
         engine("sample_read_errors_total"): always(0),
         engine("samples_rejected_total"): always(0)},
        {"2m": NONE, "15m": NONE},
    ),
    one("sampler dead", {engine("heartbeat_age_seconds"): over((60, 0.01), (1140, 99))},
        "ShaperSamplerDead", "1m10s", "2m"),
    one("fallback cap", counts(engine("errors_total")), "ShaperInFallbackCap", "3m", "5m"),
    one("part failed", counts(series("shaper_part_errors_total", part="learn")),
        "ShaperPartFailed", "3m", "5m"),
    one("supervisor failed", counts(engine("supervisor_errors_total")),
        "ShaperSupervisorFailed", "3m", "5m"),
    one("unkept", {series("shaper_limit_unkept", reason="version"): over((60, 0), (1140, 1))},
        "ShaperLimitUnkept", "1m10s", "3m"),
    one("switched off", {ON: over((60, 1), (1140, 0)), OFF: over((60, 0), (1140, 1))},
        "ShaperNotEnforcing", "5m", "8m"),
    one("forced", {engine("forced_steps_total"): f"0+2x{SCRAPES}"},
        "ShaperBudgetTooSmall", "2m", "8m"),
    one("group stalled", {_STALLED: over((60, 0), (1140, 1))},
        "ShaperGroupEngineStalled", "1m10s", "3m"),
    one("group broken", {engine("group_detached"): over((60, 0), (1140, 1))},
        "ShaperGroupBroken", "50s", "2m"),
    one("group error", counts(engine("group_errors_total")), "ShaperGroupBroken", "3m", "5m"),
    one("hot", {engine("gpu_clock_event_reasons"): over((60, 4), (1140, 0x44))},
        "ShaperGpuSlowedDown", "1m30s", "4m"),
    one("wrong profile", {engine("model_joules_gain_ratio"): over((60, 1), (1140, 1.3))},
        "ShaperModelOff", "9m", "13m"),
    one("degraded", {series("shaper_degraded_ratio", cause="clock"): over((60, 0), (1140, 0.2))},
        "ShaperGpuDegraded", "1m10s", "3m"),
    one("infeasible", {engine("budget_infeasible"): over((60, 0), (1140, 1))},
        "ShaperBudgetInfeasible", "1m10s", "3m"),
    one("disagrees", {engine("model_disagrees"): over((60, 0), (1140, 1))},
        "ShaperModelDisagrees", "1m30s", "4m"),
    one("meter disagrees", {engine("meter_disagrees"): over((60, 0), (1140, 1))},
        "ShaperMeterDisagrees", "1m30s", "4m"),
    one("refuses", {REFUSED: over((120, 0)) + " 0+3x215"}, "ShaperRefusing", "3m", "6m"),
    Scenario("a burst of refusals", {REFUSED: over((120, 0), (1080, 60))},
             {"2m30s": NONE, "4m": NONE, "6m": NONE}),
    Scenario("refuses one a minute", {REFUSED: " ".join(f"{n}+0x11" for n in range(20))},
             {"6m": NONE, "15m": NONE}),
    Scenario("group's limit alone", GROUP_ONLY, {"5m": NONE, "19m": NONE}),
    one("over the group's limit",
        GROUP_ONLY | {engine("power_headroom_watts"): over((120, 5), (1080, -40))},
        "ShaperOverLimit", "2m10s", "3m"),
    one("switched off under a group's limit",
        GROUP_ONLY | {ON: over((60, 1), (1140, 0)), OFF: over((60, 0), (1140, 1))},
        "ShaperNotEnforcing", "5m", "8m"),
    one("unkept limit of a group",
        GROUP_ONLY | {series("shaper_limit_unkept", reason="version"): over((60, 0), (1140, 1))},
        "ShaperLimitUnkept", "1m10s", "3m"),
    one("demand of two servers above their group's limit",
        GROUP_ONLY | {
            series("shaper_demand_watts", **SECOND): over((120, 100), (1080, 600)),
            series("shaper_group_limit_watts", group="rack", window_seconds="1", **SECOND):
                always(560),
        },
        "ShaperDemandAboveLimit", "2m", "6m"),
    one("slows down soon",
        {engine("time_to_thermal_slowdown_seconds"): over((60, 900), (1140, 30))},
        "ShaperSlowdownSoon", "50s", "2m"),
    one("held for heat",
        {
            engine("time_to_thermal_slowdown_seconds"): always(30),
            engine("thermal_limit_watts"): always(500),
        },
        "ShaperHeldForHeat", "5m", "12m"),
]  # fmt: skip


def as_test(scenario: Scenario) -> dict[str, Any]:
    """One of promtool's tests: what fires is asked of `ALERTS`, so that nothing else may."""
    values = {k: v for k, v in {**HEALTHY, **scenario.changes}.items() if v is not None}
    return {
        "name": scenario.name,
        "interval": f"{INTERVAL_SECONDS}s",
        "input_series": [{"series": name, "values": text} for name, text in values.items()],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": at,
                "exp_samples": [
                    {"labels": f'{{alertname="{alert}"}}', "value": 1}
                    for alert in sorted(alerts - {""})
                ],
            }
            for at, alerts in scenario.fires.items()
        ],
    }


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is missing: apt-get install prometheus")
def test_alerts_fire_where_they_should(tmp_path: Path) -> None:
    """Every scenario by Prometheus's own evaluation of the rules."""
    assert PROMTOOL is not None
    shutil.copy(RULES, tmp_path / "alerts.yml")
    content = {
        "rule_files": ["alerts.yml"],
        "evaluation_interval": f"{INTERVAL_SECONDS}s",
        "tests": [as_test(each) for each in SCENARIOS],
    }
    (tmp_path / "tests.yml").write_text(yaml.safe_dump(content, sort_keys=False))
    done = subprocess.run(
        [PROMTOOL, "test", "rules", "tests.yml"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_scenario() -> None:
    """In which it fires, and one of a healthy server in which none does."""
    rules = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
    fired = {alert for each in SCENARIOS for alerts in each.fires.values() for alert in alerts}
    assert {rule["alert"] for rule in rules} == fired - {""}


def test_rules_are_evaluated_as_often_as_servers_are_scraped() -> None:
    """Prometheus's own interval of a minute is longer than most of the rules' spans."""
    found = yaml.safe_load((RULES.parent / "prometheus.yml").read_text())
    assert found["global"]["evaluation_interval"] == found["global"]["scrape_interval"]
    assert found["scrape_configs"][0]["job_name"] == "vllm-shaper"
