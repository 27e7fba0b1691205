"""What a waiting request would compute if the next step took it.

Laws. vLLM looks a request up when it starts it: tokens that its prefix cache or a KV connector
has are not computed, but every token that is attends to them. So a request is

- a prompt of what is left, at the context of what is found;
- or a load: what it lacks comes from elsewhere between steps. It takes no token of this
  step and no place among the running; when it is there, what is left is one token or more.

What was found is kept on the request. Where a hit is the run of cached blocks from the start
(full attention alone), it is asked each time whether its last block is still there and the one
behind it has come: vLLM frees the blocks of a request from its end, so the last goes first.
Requests with a block in common have all blocks before it in common, and share the answer.
Otherwise a request is looked up again when the cache holds more or less than before, as many
as `_BLOCKS_PER_READ` allow; the first of the queue always.

The answers of a reading are kept for the next one while they must be the same: for the requests
that still stand at the front of the queue, if of each chain the last cached block is still there
and the one behind it is not. A queue that stands still costs a comparison and two look-ups a chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

from shaper.core.types import PrefillDemand
from shaper.engine.compat import may_enter, waiting_requests
from shaper.engine.compat_prompts import (
    cached_tokens,
    is_chain_of_blocks,
    prefix_cache,
    reads_prefix_cache,
    remote_tokens,
)

# A look-up of a thousand blocks takes about 0.3 ms.
_BLOCKS_PER_READ = 4000
# A connector may have lost what it had: it is asked again after so many steps.
_ASK_AGAIN_STEPS = 64


class _Found(NamedTuple):
    """What a request's last look-up found."""

    hit_tokens: int
    epoch: tuple[int, int] | None
    """Of the cache; None where the blocks themselves are asked."""
    remote_tokens: int | None = 0
    loads: bool = False
    asked_step: int = 0


class Waiting:
    """The waiting requests of one scheduler. `begin` comes before each reading of the queue."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._cache = cache = prefix_cache(scheduler)
        self._pool = None if cache is None else cache.block_pool
        self._chain = cache is not None and is_chain_of_blocks(scheduler)
        self.connects = getattr(scheduler, "connector", None) is not None
        """Whether KV may come from elsewhere."""
        self._block_tokens: int = scheduler.block_size if cache is not None else 0
        self._last: tuple[int, Any] = 0, None
        self._epoch: tuple[int, int] | None = None
        self._blocks_left = 0
        self._free_tokens = 0
        self.asks = True
        """Whether anything is limited: else cached tokens are not looked up."""
        self.loads: list[Any] = []
        """Requests that would begin to load, in the order of the queue."""
        self._keeping = False
        self._kept: list[Any] = []
        self._demands: list[PrefillDemand] = []
        self._kept_asks = True
        # The last block that is cached and the first that is not, of each chain.
        self._ends: set[tuple[Any, Any]] = set()

    def begin(self) -> Sequence[PrefillDemand]:
        """The queue is about to be read. Returns the answers for its first requests, if known."""
        self.loads = []
        self._last = 0, None
        self._blocks_left = _BLOCKS_PER_READ
        pool = self._pool
        if pool is not None:
            free = pool.get_num_free_blocks()
            self._free_tokens = free * self._block_tokens
            if not self._chain:
                self._epoch = len(pool.cached_block_hash_to_block), free
        if not self._stands():
            self._kept, self._demands = [], []
            self._ends.clear()
            self._kept_asks = self.asks
        self._keeping = not self.connects and (pool is None or self._chain)
        return tuple(self._demands)

    def _stands(self) -> bool:
        """Whether what is kept holds; requests that left the front of the queue are dropped."""
        kept = self._kept
        if not kept or self._kept_asks != self.asks:
            return False
        queue = list(islice(waiting_requests(self._scheduler), len(kept)))
        if queue != kept:
            gone = kept.index(queue[0]) if queue and queue[0] in kept else len(kept)
            del kept[:gone], self._demands[:gone]
            if not kept or queue[: len(kept)] != kept:
                return False
        if self._pool is None:
            return True
        cached = self._pool.get_cached_block
        return not any(
            (there is not None and not cached(there, _FIRST))
            or (missing is not None and cached(missing, _FIRST))
            for there, missing in self._ends
        )

    def demand(self, request: Any) -> PrefillDemand | None:
        """What the next request of the queue would compute; None if it takes no token of this
        step. Those that `begin` answered for are not asked about again."""
        demand = self._demand(request) if may_enter(self._scheduler, request) else None
        # Nothing but a step takes it out of the queue; one that may not enter yet, others do.
        if demand is None:
            self._keeping = False
        elif self._keeping:
            self._kept.append(request)
            self._demands.append(demand)
        return demand

    def _demand(self, request: Any) -> PrefillDemand | None:
        computed = request.num_computed_tokens
        if computed == 0 and self.asks and (self._cache is not None or self.connects):
            found = self._found(request)
            remote = found.remote_tokens
            if remote is None:
                return None  # vLLM passes it over
            if found.loads:
                self.loads.append(request)
                return None
            computed = found.hit_tokens + remote
        left = request.num_tokens - computed
        if left <= 1:
            # Drafts that a request does not have yet are made up, so that rows are alike.
            left = 1 + self._scheduler.num_spec_tokens if computed else 1
        return PrefillDemand(left, computed)

    def clear(self) -> None:
        """The queue is empty."""
        self.loads = []
        if self._kept:
            self._kept, self._demands = [], []

    def too_large(self, remaining_tokens: int) -> bool:
        """Whether the KV cache surely has no room for a prompt now: it then stops all behind it.

        vLLM starts a prompt when what is left of it fits; on its way it takes no more than that.
        """
        if remaining_tokens <= self._free_tokens:
            return False
        return self._chain and bool(self._scheduler.scheduler_reserve_full_isl)

    def _found(self, request: Any) -> _Found:
        known: _Found | None = getattr(request, "shaper_found", None)
        if self.connects and request.status.name == "WAITING_FOR_REMOTE_KVS":
            known = None  # its load is over, and has failed
        hit, epoch = 0, None
        if self._cache is not None and reads_prefix_cache(request):
            if self._chain:
                hit = self._chain_tokens(request, known)
            else:
                hit, epoch = self._looked_up(request, known)
        same = known is not None and known.hit_tokens == hit and known.epoch == epoch
        if same and known is not None and (not self.connects or self._is_fresh(known)):
            return known
        found = _Found(hit, epoch)
        if self.connects:
            found = self._with_remote(request, found, known)
        request.shaper_found = found
        return found

    def _is_fresh(self, known: _Found) -> bool:
        """Whether the connector need not be asked again."""
        age = self._scheduler.current_step - known.asked_step
        return known.remote_tokens is not None and age < _ASK_AGAIN_STEPS

    def _with_remote(self, request: Any, found: _Found, known: _Found | None) -> _Found:
        hit = found.hit_tokens
        if known is not None and known.hit_tokens == hit and self._is_fresh(known):
            return known._replace(epoch=found.epoch)
        # vLLM offers whole blocks, and takes the longer of its own rest of one and what comes.
        part = hit % self._block_tokens if self._block_tokens else 0
        tokens, loads = remote_tokens(self._scheduler, request, hit - part)
        if part and tokens is not None:
            tokens, loads = (tokens - part, loads) if tokens > part else (0, False)
        asked = self._scheduler.current_step
        return _Found(hit, found.epoch, tokens, loads and bool(tokens), asked)

    def _chain_tokens(self, request: Any, known: _Found | None) -> int:
        assert self._pool is not None
        cached = self._pool.get_cached_block
        hashes, block = request.block_hashes, self._block_tokens
        most = min(len(hashes), (request.num_tokens - 1) // block)
        count = min(known.hit_tokens // block, most) if known is not None else 0
        shared, last = self._last
        if 0 < shared <= most and count <= shared and hashes[shared - 1] == last:
            count = shared
        elif known is None or (count and not cached(hashes[count - 1], _FIRST)):
            if most and cached(hashes[0], _FIRST):
                count = cached_tokens(self._cache, request) // block
            else:
                count = 0
        while count < most and cached(hashes[count], _FIRST):
            count += 1
        last = hashes[count - 1] if count else None
        if count:
            self._last = count, last
        self._ends.add((last, hashes[count] if count < most else None))
        return count * block

    def _looked_up(self, request: Any, known: _Found | None) -> tuple[int, Any]:
        if known is not None and (known.epoch == self._epoch or self._blocks_left <= 0):
            return known.hit_tokens, known.epoch
        self._blocks_left -= len(request.block_hashes)
        return cached_tokens(self._cache, request), self._epoch


# The one group of layers.
_FIRST = [0]
