"""What `deploy/` says about metrics, addresses and flags holds in the code."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
import yaml

from shaper.core.standing import Cause
from shaper.core.types import PowerBudget, PowerLimit, Reason
from shaper.group_status import GROUP_METRICS, GroupStatus, MemberStatus
from shaper.metric_values import (
    FLEX_METRICS,
    SAMPLER_METRICS,
    SCHEDULER_METRICS,
    STANDING_METRICS,
)
from shaper.metrics import StatusCollector
from shaper.status import Status
from tests.scraping import control

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
WITH_METRICS = ("prometheus/alerts.yml", "grafana/shaper.json", "../docs/operating.md")


def exposed_names() -> set[str]:
    """Every name that a scrape of one engine can show, histograms by their series."""
    values = (1.0,) * 200
    held = control(560.0, budget=PowerBudget((PowerLimit(560.0, 1.0),), 900.0))
    sections = dict.fromkeys(("sampler", "scheduler", "standing", "flex", "parts"), values)
    group = GroupStatus((PowerLimit(4000.0, 0.1),), (MemberStatus(1, "alive", 1.0, 1.0),), 1.0, 1.0)
    own = {"control": tuple(held.values()), "group": tuple(group.values())}
    status = Status(info={"engine": 0}, values={**sections, **own})
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
    }
    tables = (
        *(*SAMPLER_METRICS, *SCHEDULER_METRICS),
        *(*STANDING_METRICS, *FLEX_METRICS, *GROUP_METRICS),
    )
    assert {name for name, _ in tables if name not in text} == derived


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
