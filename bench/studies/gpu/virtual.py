"""The servers' traffic in virtual time: vLLM's real scheduler over an emulated GPU.

It has no HTTP, API server or client: its latencies are the engine's, some milliseconds less.
Each shaped run keeps the same share of the unshaped peak of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from bench.studies.gpu.plan import RUNS, UNSHAPED, Run
from bench.studies.gpu.store import Settings
from shaper.simulate.setup import RackSetup


def virtual_figures(settings: Settings, names: Sequence[str], profile: str) -> dict[str, Any]:
    """The figures of each run (`shaper.simulate.figures.Figures` as data), by name.

    Raises:
        ConfigError: there is no such profile.
    """
    found: dict[str, Any] = {}
    for name in dict.fromkeys((UNSHAPED, *names)):
        peak = found[UNSHAPED]["peak_watts"] if found else 0.0
        found[name] = _figures(settings, RUNS[name], profile, peak)
    return found


def _figures(settings: Settings, run: Run, profile: str, peak_watts: float) -> dict[str, Any]:
    from shaper.simulate.figures import rack_figures
    from shaper.simulate.runs import run_rack

    limit = run.limit(peak_watts)
    setup = RackSetup(
        gpu=profile,
        model=settings.model,
        engines=1,
        # As a server's replay: until the last requests have ended.
        duration_seconds=settings.duration_seconds + 15.0,
        shaped=limit is not None,
        limits=() if limit is None else (limit,),
        itl_target_seconds=run.itl_target_seconds,
        max_num_batched_tokens=run.max_num_batched_tokens,
        max_num_seqs=run.max_num_seqs,
    )
    return asdict(rack_figures(run_rack(setup, settings.workload)).engines[0])
