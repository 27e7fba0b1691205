"""`/metrics` of the real server, read with Prometheus's own parser."""

from __future__ import annotations

import os
import time
from pathlib import Path

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from shaper.gpu.profiles import load_profile
from shaper.recording.format import read_recording
from tests.e2e.conftest import MODEL, Server, running_server

pytestmark = pytest.mark.e2e


def scrape(server: Server) -> dict[str, dict[tuple[str, ...], float]]:
    """Sample values by name, then by label values."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(server.metrics()):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


def complete(server: Server, tokens: int, prompt: str = "hello") -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with client:
        client.completions.create(model=MODEL, prompt=prompt, max_tokens=tokens)


def test_metrics_are_there_fresh_and_count(shaped_server: Server) -> None:
    """Power, limit, steps and decisions next to vLLM's own; fresh while nothing runs."""
    before = scrape(shaped_server)
    complete(shaped_server, 40)
    shaped_server.wait_until_idle()
    after = scrape(shaped_server)
    engine = ("0",)
    # One prefill and 39 decodes; vLLM schedules one more step ahead than it needs at most.
    steps = after["shaper_steps_total"][engine] - before["shaper_steps_total"][engine]
    assert 40 <= steps <= 42
    assert after["shaper_power_limit_watts"][("0", "0.1")] == 520.0
    decided = sum(after["shaper_decisions_total"].values())
    assert decided >= after["shaper_steps_total"][engine]
    assert after["shaper_prefill_chunk_tokens_count"][engine] >= 1
    assert 0 <= after["shaper_power_utilization_ratio"][engine] <= 1
    assert after["shaper_errors_total"][engine] == 0
    assert after["vllm:request_success_total"]

    def energy_grows_while_idle() -> bool:
        now = scrape(shaped_server)
        grown = (
            now["shaper_energy_joules_total"][engine] > after["shaper_energy_joules_total"][engine]
        )
        return grown and now["shaper_sample_age_seconds"][engine] < 1.0

    shaped_server.wait_for("a fresh sample while idle", energy_grows_while_idle)


def test_metered_and_predicted_energy_agree(shaped_server: Server) -> None:
    """Over seconds of steady decoding, the meter's joules are the predicted ones and those of
    the idle time between requests, however much of it a busy host makes."""
    start = time.monotonic()
    first = scrape(shaped_server)
    first_seconds = start - first["shaper_sample_age_seconds"][("0",)]
    while time.monotonic() - start < 4.0:  # long against the meter's refresh of 100 ms
        complete(shaped_server, 200)
    last = scrape(shaped_server)
    # From sample to sample: on a busy host the first may be old.
    elapsed_seconds = time.monotonic() - last["shaper_sample_age_seconds"][("0",)] - first_seconds

    def grown(name: str) -> float:
        return last[name][("0",)] - first[name][("0",)]

    metered, predicted = (
        grown("shaper_energy_joules_total"),
        grown("shaper_predicted_energy_joules_total"),
    )
    step_watts = last["shaper_step_predicted_watts"][("0",)]
    idle_seconds = max(elapsed_seconds - predicted / step_watts, 0.0)
    power = load_profile("h200-sxm").power
    assert metered > 0.9 * (predicted + power.idle_watts * idle_seconds)
    assert metered < 1.1 * (predicted + power.gap_watts * idle_seconds)
    assert last["shaper_step_measured_watts"][("0",)] == pytest.approx(step_watts, rel=0.25)


@pytest.mark.timeout(600)
def test_two_api_servers_and_two_ranks_show_all_engines(tmp_path: Path) -> None:
    """Whichever API server answers, it shows both engines, each with its own numbers; both
    ranks have joined the server's power group."""
    record = tmp_path / "run.csv"
    flags = ("--power-limit", "520W@100ms", "--api-server-count", "2", "--record", str(record))
    group = ("--power-group", f"ranks-{os.getpid()}", "--group-limit", "1010W@100ms")
    with running_server(tmp_path, *flags, *group, "--data-parallel-size", "2") as server:
        for index in range(8):
            complete(server, 10, prompt=f"{index} is a number")
        for _ in range(6):  # the kernel deals connections to the two servers
            values = scrape(server)
            assert set(values["shaper_steps_total"]) == {("0",), ("1",)}
            assert set(values["shaper_power_limit_watts"].values()) == {520.0}
            assert set(values["shaper_group_limit_watts"].values()) == {1010.0}
            alive = {values["shaper_group_engines"][engine, "alive"] for engine in ("0", "1")}
            assert alive == {2.0}
            assert all(age < 1.0 for age in values["shaper_sample_age_seconds"].values())
        assert sum(values["shaper_steps_total"].values()) >= 80
        assert min(values["shaper_steps_total"].values()) > 0
    # Each rank has a recording of its own, here of servers that were killed.
    for rank, path in enumerate((record, tmp_path / "run.rank1.csv")):
        recording = read_recording(path)
        assert recording.meta["gpu"] == "h200-sxm"
        assert abs(len(recording.steps) - values["shaper_steps_total"][(str(rank),)]) <= 2
        assert len(recording.samples) > 50
