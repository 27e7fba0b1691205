"""`/metrics` of the real server, read with Prometheus's own parser."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from shaper.emulator.trace import read_power_trace
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


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def complete(server: Server, tokens: int, prompt: str = "hello") -> None:
    with client_of(server) as client:
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
    assert after["shaper_power_limit_watts"][("0", "0.1")] == 550.0
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
def test_two_ranks_of_two_gpus_are_seen_whole_and_end_while_they_work(tmp_path: Path) -> None:
    """Whichever of two API servers answers, it shows both engines, each with its own numbers, and
    both in the server's power group. SIGINT with requests in flight that can't be finished ends
    every process with code 0; each rank leaves a recording and a power trace."""
    record = tmp_path / "run.csv"
    flags = ("--power-limit", "900W@1s", "--api-server-count", "2", "--record", str(record))
    group = ("--power-group", f"ranks-{os.getpid()}", "--group-limit", "1810W@100ms")
    ranks = ("--data-parallel-size", "2", "--tensor-parallel-size", "2", "--shutdown-timeout", "6")
    traced = {"SHAPER_EMULATE_TRACE": str(tmp_path / "power")}
    with running_server(tmp_path, *flags, *group, *ranks, environment=traced) as server:
        for index in range(8):
            complete(server, 10, prompt=f"{index} is a number")
        for _ in range(6):  # the kernel deals connections to the two servers
            values = scrape(server)
            assert set(values["shaper_steps_total"]) == {("0",), ("1",)}
            assert set(values["shaper_power_limit_watts"].values()) == {900.0}
            assert set(values["shaper_group_limit_watts"].values()) == {1810.0}
            alive = {values["shaper_group_engines"][engine, "alive"] for engine in ("0", "1")}
            assert alive == {2.0}
            assert all(age < 1.0 for age in values["shaper_sample_age_seconds"].values())
        assert sum(values["shaper_steps_total"].values()) >= 80
        assert min(values["shaper_steps_total"].values()) > 0
        first = threading.Event()

        def read() -> None:
            with contextlib.suppress(openai.APIError), client_of(server) as client:
                for _ in client.completions.create(
                    model=MODEL, prompt="a", max_tokens=100_000, stream=True
                ):
                    first.set()

        readers = [threading.Thread(target=read) for _ in range(4)]
        for reader in readers:
            reader.start()
        assert first.wait(60), server.tail()
        assert server.stop(signal.SIGINT) == 0, server.tail()
        for reader in readers:
            reader.join(60)
            assert not reader.is_alive()
        # vLLM's own front ends may log that the engines went away before them.
        assert "/shaper/" not in server.log.read_text(errors="replace"), server.tail()
    for rank, path in enumerate((record, tmp_path / "run.rank1.csv")):
        recording = read_recording(path)
        assert recording.meta["gpu"] == "h200-sxm"
        assert len(recording.steps) >= values["shaper_steps_total"][(str(rank),)]
        assert len(recording.samples) > 50
        assert read_power_trace(tmp_path / f"power.rank{rank}").joules > 0
