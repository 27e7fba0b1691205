"""The part of every limit that is kept free.

Law. What is wanted is the configured margin, what the estimator asks for, and
`BLIND_MARGIN_RATIO` where no reading is recent. What is kept follows it: up no faster than a
window's past can make headroom for it without a stop, and down slowly, so that neither the
loss of a sensor nor its return is a jump.
"""

from __future__ import annotations

# What a blind controller keeps free on top: about the mean error of the H100 and B200
# profiles on published serving power (`python -m bench.fidelity`).
BLIND_MARGIN_RATIO = 0.05
# Without an energy counter: a power reading lags by half a second or sees a quarter of the
# time, so what a second drew is known to a tenth or so, and gains follow it late.
UNCOUNTED_MARGIN_RATIO = 0.05
# The most that is ever kept free.
MAX_MARGIN_RATIO = 0.2
_RISE_PER_WINDOW = 0.3
_FALL_PER_SECOND = 0.05
# Where only latency is promised.
_WINDOW_SECONDS = 1.0


class Margin:
    """Stateful fields: what is kept, and when that was found.

    Args:
        least_ratio: what is configured.
        start_seconds: now. Nothing has been read yet.
    """

    def __init__(self, least_ratio: float, start_seconds: float) -> None:
        self._least_ratio = least_ratio
        self._found_seconds = start_seconds
        self.kept_ratio = least_ratio + BLIND_MARGIN_RATIO

    def follow(
        self, asked_ratio: float, blind: bool, longest_window_seconds: float, now_seconds: float
    ) -> float:
        """What to keep free now."""
        wanted = self._least_ratio + asked_ratio + (BLIND_MARGIN_RATIO if blind else 0.0)
        wanted = min(MAX_MARGIN_RATIO, wanted)
        elapsed = max(0.0, now_seconds - self._found_seconds)
        self._found_seconds = now_seconds
        rise = elapsed * _RISE_PER_WINDOW / (longest_window_seconds or _WINDOW_SECONDS)
        fall = elapsed * _FALL_PER_SECOND
        self.kept_ratio = min(max(wanted, self.kept_ratio - fall), self.kept_ratio + rise)
        return self.kept_ratio
