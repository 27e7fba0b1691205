"""A KV connector with no workers: which prompts come from elsewhere, and when, is a script.

It goes through vLLM's own interface (`KVConnectorBase_V1`, loaded by its module's path), on
the scheduler's side only. `RemoteKv.attach` lets an engine in virtual time hear of finished
loads, as a worker would tell it: with the output of a step, empty ones included.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
)
from vllm.v1.outputs import KVConnectorOutput

from shaper.engine.compat import has

NEVER = math.inf


@dataclass(frozen=True, slots=True)
class Load:
    """What becomes of one request's remote KV."""

    tokens: int
    """How many tokens of its prompt are elsewhere."""
    seconds: float
    """How long their transfer takes; `NEVER` is never."""
    fails: bool = False
    """The transfer ends, but without the data: all is computed here."""
    unsure_seconds: float = 0.0
    """How long after its first look the connector can't say what there is."""


class ScriptedConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """The scheduler's side of a connector. Which request loads what is in `loads`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loads: dict[str, Load] = {}
        self.clock: Callable[[], float] = lambda: 0.0
        self.begun: dict[str, float] = {}
        """When each load began."""
        self._asked: dict[str, float] = {}
        self._due: dict[str, tuple[float, bool]] = {}
        self._loaded: set[str] = set()

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        load = self.loads.get(request.request_id)
        if load is None or request.request_id in self._loaded:
            return 0, False
        asked = self._asked.setdefault(request.request_id, self.clock())
        if self.clock() - asked < load.unsure_seconds:
            return None, False
        tokens = min(load.tokens, request.num_prompt_tokens) - num_computed_tokens
        return (tokens, True) if tokens > 0 else (0, False)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens and request.request_id not in self._due:
            load = self.loads[request.request_id]
            self.begun.setdefault(request.request_id, self.clock())
            self._due[request.request_id] = (self.clock() + load.seconds, load.fails)

    def take_finished(self) -> KVConnectorOutput:
        """The transfers that are over by now."""
        due = {name: fails for name, (end, fails) in self._due.items() if end <= self.clock()}
        for name in due:
            del self._due[name]
        self._loaded |= due.keys()
        failed = {name for name, fails in due.items() if fails}
        if has("failed_receiving"):
            return KVConnectorOutput(finished_recving=set(due), failed_recving=failed)
        assert not failed
        return KVConnectorOutput(finished_recving=set(due))

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return KVConnectorMetadata()

    # The workers' side: there are none.

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def wait_for_layer_load(self, layer_name: str) -> None:
        raise NotImplementedError

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def wait_for_save(self) -> None:
        raise NotImplementedError


def kv_transfer_config() -> Any:
    """vLLM's configuration of this connector."""
    from vllm.config import KVTransferConfig

    return KVTransferConfig(
        kv_connector="ScriptedConnector",
        kv_connector_module_path="tests.engine.remote_kv",
        kv_role="kv_consumer",
        kv_load_failure_policy="recompute",
    )


def attach(engine: Any) -> ScriptedConnector:
    """Lets the engine hear of finished transfers, and returns its connector."""
    scheduler = engine.scheduler
    connector: ScriptedConnector = scheduler.connector
    connector.clock = lambda: engine.now_seconds
    inner = scheduler.update_from_output

    def update_from_output(scheduler_output: Any, answer: Any) -> Any:
        done = connector.take_finished()
        return inner(scheduler_output, replace(answer, kv_connector_output=done))

    scheduler.update_from_output = update_from_output
    return connector
