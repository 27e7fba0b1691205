"""What `deploy/` says about metrics, addresses and flags holds in the code."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from shaper.cli.lifecycle import DRAIN_SECONDS, END_SECONDS, LEFTOVER_SECONDS
from shaper.core.supervise.status import (
    Admissibility,
    Cause,
    EngineDemand,
    EngineStatus,
    ThermalOutlook,
    Usage,
)
from shaper.core.types import PowerBudget, PowerLimit, PowerState, Reason
from shaper.gpu.parts import PARTS
from shaper.gpu.sampler import SensorReport
from shaper.ipc.engine_record import EngineRecord, SchedulerCounters, Status
from shaper.ipc.flex import FlexQueue
from shaper.ipc.group_status import GroupStatus, MemberStatus
from shaper.ipc.metric_table import METRICS
from shaper.server.metrics import StatusCollector
from tests.scraping import control

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
WITH_METRICS = ("prometheus/alerts.yml", "grafana/shaper.json", "../docs/operating.md")


def exposed_names() -> set[str]:
    """Every name that a scrape of one engine can show, histograms by their series."""
    limit, demand = (
        PowerLimit(560.0, 1.0),
        EngineDemand(1.0, wanted_watts=1.0, running_cap=1, cadence_seconds=1.0),
    )
    heat = ThermalOutlook(*(1.0,) * 5, limit, 1.0)
    record = EngineRecord(
        at_seconds=1.0,
        power=PowerState(1.0, 1, *(1.0,) * 6, slowdown_margin_celsius=1.0),
        sensor=SensorReport(),
        usage=Usage(1.0, 1.0),
        standing=EngineStatus(1.0, Admissibility(recovery_seconds=1.0), (), heat, demand=demand),
        control=control(560.0, budget=PowerBudget((limit,), 900.0)),
        group=GroupStatus((limit,), (MemberStatus(1, "alive", 1.0, 1.0),), 1.0, 1.0),
        flex=FlexQueue(oldest_deferred_seconds=1.0),
        counters=SchedulerCounters(*(1,) * 11),
        failures=dict.fromkeys(PARTS, 0),
    )
    status = Status({"engine": 0}, record)
    return {
        sample.name
        for family in StatusCollector(lambda: [status]).collect()
        for sample in family.samples
    }


@pytest.mark.parametrize("name", WITH_METRICS)
def test_every_metric_named_is_exposed(name: str) -> None:
    """A renamed metric would leave an alert silent and a panel empty."""
    known = exposed_names() | {"shaper_prefill_chunk_tokens"}
    used = set(re.findall(r"\bshaper_[a-z_]+[a-z]\b", (DEPLOY / name).read_text()))
    assert used, f"{name} names no metric"
    assert used <= known, sorted(used - known)


def test_every_metric_is_on_the_dashboard() -> None:
    """Nothing is exposed that nobody can see, apart from what others are derived from."""
    text = (DEPLOY / "grafana" / "shaper.json").read_text()
    derived = {
        "shaper_steps_total",
        "shaper_step_predicted_seconds",
        "shaper_step_measured_seconds",
        "shaper_predicted_energy_joules_total",
        "shaper_gpu_clock_event_reasons",
        "shaper_ramp_limit_watts_per_second",
    }
    assert {metric.name for metric in METRICS if metric.name not in text} == derived


def test_every_metric_is_explained_to_operators() -> None:
    """docs/operating.md says of each metric what it answers."""
    text = (ROOT / "docs" / "operating.md").read_text()
    series = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in exposed_names()}
    assert sorted(name for name in series if f"`{name}" not in text) == []


def test_every_cause_is_explained_to_operators() -> None:
    """docs/health.md says of each what it means and what to do."""
    text = (ROOT / "docs" / "health.md").read_text()
    assert [cause.value for cause in Cause if f"`{cause.value}`" not in text] == []


def test_the_dashboard_is_what_its_script_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The JSON is never edited by hand."""
    module = runpy.run_path(str(ROOT / "scripts" / "dashboard"))
    target = tmp_path / "shaper.json"
    monkeypatch.setitem(module["main"].__globals__, "TARGET", target)
    module["main"]()
    assert target.read_text() == (DEPLOY / "grafana" / "shaper.json").read_text()


def test_panels_do_not_overlap() -> None:
    """Each cell of the grid belongs to one panel."""
    panels = json.loads((DEPLOY / "grafana" / "shaper.json").read_text())["panels"]
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert all(x < 24 for x, _ in cells)


def test_every_reason_is_explained_to_operators() -> None:
    """docs/operating.md has a line for each reason that shaper_decisions_total counts."""
    text = (ROOT / "docs" / "operating.md").read_text()
    assert [reason.value for reason in Reason if f"`{reason.value}`" not in text] == []


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.yml")), ids=lambda path: path.name)
def test_yaml_parses_and_nothing_listens_beyond_loopback(path: Path) -> None:
    """The defaults open no port to the network."""
    text = path.read_text()
    assert yaml.safe_load(text)
    assert "0.0.0.0" not in text
    for address in re.findall(r"(?:listen-address=|HTTP_ADDR: |http://)([\d.]+)", text):
        assert address == "127.0.0.1"


def test_the_service_starts_on_loopback_and_does_not_retry_a_wrong_setting() -> None:
    """Exit code 2 is a setting that is wrong; a restart would not mend it."""
    text = (DEPLOY / "systemd" / "vllm-shaper@.service").read_text()
    assert "Environment=HOST=127.0.0.1" in text
    assert "RestartPreventExitStatus=2" in text


def settings(text: str) -> dict[str, str]:
    """Of a unit; the last of a name."""
    lines = [line for line in text.splitlines() if "=" in line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def test_all_instances_of_the_service_share_a_power_group() -> None:
    """One user that is made before, and the memory that all see."""
    text = (DEPLOY / "systemd" / "vllm-shaper@.service").read_text()
    found = settings(text)
    assert "DynamicUser" not in found
    made = (DEPLOY / "systemd" / "vllm-shaper.conf").read_text()
    assert f"u {found['User']} " in made
    for hides in ("PrivateUsers", "TemporaryFileSystem", "InaccessiblePaths", "PrivateIPC"):
        assert hides not in found


def test_the_service_waits_for_the_drain_that_it_promises() -> None:
    """The first process alone is told, and has time for the drain and for its end."""
    found = settings((DEPLOY / "systemd" / "vllm-shaper@.service").read_text())
    assert found["KillMode"] == "mixed"
    assert float(found["TimeoutStopSec"]) > DRAIN_SECONDS + END_SECONDS + LEFTOVER_SECONDS
    assert found["SuccessExitStatus"] == "143"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_takes_the_service(tmp_path: Path) -> None:
    """As far as it can tell without a machine that runs it."""
    text = (DEPLOY / "systemd" / "vllm-shaper@.service").read_text()
    unit = tmp_path / "vllm-shaper@0.service"
    unit.write_text(text.replace("/opt/vllm-shaper/bin/shaper", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert unit.name not in done.stderr, done.stderr
    assert "vllm-shaper" not in done.stderr, done.stderr
