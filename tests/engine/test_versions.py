"""The installed vLLM is the one that was asked for, and has what `compat.py` says of it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shaper.core.policy import Plan
from shaper.core.types import PowerLimit, Reason, StepLimits
from shaper.engine import compat
from shaper.errors import EngineError

ROOT = Path(__file__).resolve().parents[2]
AMPLE = (PowerLimit(2000.0, 0.1),)


def test_the_version_is_the_one_that_was_asked_for():
    """Else a run over another version would test the set-up's own."""
    import vllm

    found = compat.vllm_version()
    assert vllm.__version__.split("+")[0] == found.split("+")[0]
    assert found.split("+")[0] == os.environ.get("WANTED_VLLM", found.split("+")[0])
    assert compat.supported(found)


def test_the_table_of_capabilities_is_right(make_rig):
    """Each by what is there to be seen."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.outputs import KVConnectorOutput

    scheduler = make_rig(None).engine.scheduler
    source = inspect.getsource(Scheduler.schedule)
    seen = {
        "throttled_prefills": "throttle_prefills"
        in inspect.signature(Scheduler.schedule).parameters,
        "counted_sessions": "num_waiting_for_streaming_input" in source,
        "failed_receiving": "failed_recving"
        in {field.name for field in dataclasses.fields(KVConnectorOutput)},
        "own_admission_cap": hasattr(scheduler, "max_num_active_reqs"),
        "handled_blocked": hasattr(scheduler, "_handle_blocked_waiting_request"),
        "lone_prompt_unbounded": "num_eligible_reqs" in source,
        "chunks_inside_blocks": "next_block_boundary"
        in inspect.getsource(Scheduler._mamba_block_aligned_split),
        "skips_remote_hits": "request.skip_reading_prefix_cache" in source,
    }
    assert seen == {name: compat.has(name) for name in compat.SINCE}
    compat.check_scheduler(scheduler)


def test_a_scheduler_without_the_levers_is_refused():
    """The message names what is missing."""
    with pytest.raises(EngineError, match=r"Scheduler\.current_step"):
        compat.check_scheduler(SimpleNamespace(running=[], waiting=[], max_num_scheduled_tokens=1))


class Always:
    """A policy: these limits."""

    def __init__(self, limits: StepLimits) -> None:
        self.limits = limits

    def plan(self, view: Any) -> Plan:
        # The first steps are vLLM's, so that there are decodes to hold.
        running = view.load.running_requests
        return Plan(self.limits if running >= 3 else StepLimits(), Reason.CAP)


def seen(make_rig: Any, limits: StepLimits, asynchronous: bool) -> list[dict[str, Any]]:
    """Those steps of five requests that ran under the limits."""
    rig = make_rig(
        AMPLE, policy=lambda: Always(limits), asynchronous=asynchronous, max_pause_seconds=30.0
    )
    rig.run([(0.05 * n, [n + 1] * 1500, 200) for n in range(5)], seconds=1.2)
    assert rig.shaper.counters.errors == 0
    decisions = [d for d in rig.log.decisions if d.decode_requests + d.prefill_tokens]
    pairs = zip(rig.outputs, decisions, strict=True)
    return [output for output, decision in pairs if decision.limits == limits]


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize(
    "limits",
    [
        StepLimits(decode_requests=2),
        StepLimits(running_requests=3),
        StepLimits(prefill_tokens=64),
        StepLimits(prefill_tokens=0),
    ],
    ids=["hold", "cap", "chunk", "no-prefill"],
)
def test_each_lever_has_its_effect_on_this_version(make_rig, limits, asynchronous):
    """On vLLM's real scheduler: who is held is held, and no step has more than it may."""
    steps = seen(make_rig, limits, asynchronous)
    assert len(steps) > 20
    for step in steps:
        counts = sorted(step["tokens"].values())
        if limits.decode_requests is not None:
            assert sum(count == 1 for count in counts) <= 2
        if limits.running_requests is not None:
            assert not step["new"]
        if limits.prefill_tokens == 0:
            assert set(counts) <= {1}
        elif limits.prefill_tokens is not None:
            assert sum(count for count in counts if count > 1) <= limits.prefill_tokens


# Names of our own, of argparse, and of ASGI: no version of vLLM gives or takes them.
NOT_BY_VERSION = {
    "engine/plugin.py": {
        *("power_shaper_config", "additional_config", "scheduler_cls", "_MARK"),
        "_FROM_COMMAND_LINE",
    },
    "engine/refusal.py": {"__module__"},
    "engine/load.py": {"shaper_arrival_seconds"},
    "engine/waiting.py": {"shaper_found", "connector"},
    "engine/queue.py": {"shaper_shown_first"},
    # A vLLM that is there and cannot be imported is said before anything starts.
    "engine/preflight.py": {"data_parallel_size_local", "ImportError"},
    "server/asgi.py": {"state", "vllm_config", "additional_config"},
    "server/drain.py": {"state", "engine_client"},
    "server/middleware.py": {"middleware"},
    "server/stats.py": {"_MARK"},
    "cli/serve.py": {"uds", "replay"},
    "ipc/flex.py": {"deferral"},
}


def by_version(path: Path) -> list[str]:
    """What a file asks for by name and can do without, and the imports it can do without."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            optional = node.func.id == "hasattr" or (
                node.func.id == "getattr" and len(node.args) == 3
            )
            if optional:
                name = node.args[1]
                found.append(ast.unparse(name).strip("'"))
        if isinstance(node, ast.ExceptHandler) and node.type is not None:
            caught = ast.unparse(node.type)
            if any(word in caught for word in ("ImportError", "ModuleNotFound", "AttributeError")):
                found.append(caught)
    return found


# Every package that runs inside vLLM or starts it.
SPEAKS_TO_VLLM = [
    path.relative_to(ROOT / "shaper").as_posix()
    for package in ("engine", "server", "cli", "ipc")
    for path in sorted((ROOT / "shaper" / package).glob("*.py"))
    if not path.name.startswith("compat")
]


@pytest.mark.parametrize("name", SPEAKS_TO_VLLM)
def test_only_compat_knows_versions(name):
    """Nothing else asks whether vLLM has something."""
    assert set(by_version(ROOT / "shaper" / name)) <= NOT_BY_VERSION.get(name, set())


def test_optional_modules_of_vllm_are_not_needed(monkeypatch):
    """Where a version keeps its command line's defaults elsewhere, nothing is set up."""
    monkeypatch.setattr(compat, "_exists", lambda name: False)
    compat.set_up_command_line()
    monkeypatch.undo()
    assert not compat._exists("vllm.there_is_no.such_module")
    assert compat._exists("vllm.engine.arg_utils")


def test_the_tests_that_the_document_names_exist():
    """Each by its file and name; every feature that is shaped or passed through names one."""
    text = (ROOT / "docs/compatibility.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 15
    missing = [
        (file, name)
        for file, name in named
        if not re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE)
    ]
    assert not missing
    rows = text.split("## Features of vLLM")[1].splitlines()
    rows = [row for row in rows if row.startswith("| ") and not row.startswith("| feature")]
    assert all("::" in row or "not tested" in row for row in rows)
