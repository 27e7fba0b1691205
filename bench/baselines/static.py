"""Static caps: what vLLM's own knobs can do, as a policy.

Law: every step has at most `prefill_tokens` tokens of prompts, and no request enters
while `running_requests` or more run. Both are constants; power is never looked at.
(vLLM: `--max-num-batched-tokens` less the decodes, and `--max-num-active-seqs`.)
"""

from __future__ import annotations

from shaper.core.policy import Plan, PlanInput
from shaper.core.types import UNLIMITED, Reason, StepLimits
from shaper.errors import ConfigError


class StaticCaps:
    """The policy above. Remembers nothing.

    Args:
        prefill_tokens: of each step; None: no cap.
        running_requests: at once; None: no cap.

    Raises:
        ConfigError: a cap below 1, which would stop the engine.
    """

    def __init__(
        self, prefill_tokens: int | None = None, running_requests: int | None = None
    ) -> None:
        for name, cap in (
            ("prefill tokens", prefill_tokens),
            ("running requests", running_requests),
        ):
            if cap is not None and cap < 1:
                raise ConfigError(
                    f"a static cap of {cap} {name} would stop the engine: give 1 or more"
                )
        self._prefill_tokens = prefill_tokens
        self._running_requests = running_requests

    def plan(self, view: PlanInput) -> Plan:
        """The caps, unless the step stays below them anyway."""
        load, running = view.load, self._running_requests
        if not load.batch().requests:
            return Plan(UNLIMITED, Reason.IDLE)
        if running is not None:
            entering = load.capped(running)
            running = None if entering is load else running
            load = entering
        tokens = self._prefill_tokens
        if tokens is not None and not load.splittable and load.prefills:
            # A prompt that can't be cut runs whole, or it would never run.
            tokens = max(tokens, load.prefills[0].remaining_tokens)
        if tokens is not None and load.batch().prefill_tokens <= tokens:
            tokens = None
        limits = StepLimits(prefill_tokens=tokens, running_requests=running)
        return Plan(limits, Reason.CAP if limits.binding else Reason.UNCONSTRAINED)
