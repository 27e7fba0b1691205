"""What differs between versions of vLLM about prompts: bounds on their chunks, and what is
found of them in a cache. The table is in `compat.py`."""

from __future__ import annotations

from typing import Any

from shaper.core.chunks import Blocks
from shaper.engine.compat import has


def request_chunk_tokens(scheduler: Any) -> int:
    """The most tokens of one prompt in the next step; 0: no such bound.

    Since 0.31 it is lifted while the engine has no other request, and may be adaptive: then it
    is at least an equal share of `max_num_batched_tokens`, which no lever of ours moves.
    """
    config = scheduler.scheduler_config
    most: int = config.long_prefill_token_threshold
    if most <= 0 or not has("lone_prompt_unbounded"):
        return max(most, 0)
    requests = sum(scheduler.get_request_counts())
    if requests <= 1:
        return 0
    if getattr(scheduler, "adaptive_long_prefill_threshold", False):
        most = max(most, config.max_num_batched_tokens // requests)
    return most


def chunk_blocks(scheduler: Any) -> Blocks | None:
    """Where the chunks of prompts must end; None: anywhere."""
    if not getattr(scheduler, "need_mamba_block_aligned_split", False):
        return None
    return Blocks(scheduler.cache_config.block_size, has("chunks_inside_blocks"))


def prefix_cache(scheduler: Any) -> Any:
    """vLLM's coordinator of the prefix cache; None where nothing is looked up."""
    manager = getattr(scheduler, "kv_cache_manager", None)
    if manager is None or not manager.enable_caching:
        return None
    return manager.coordinator


def is_chain_of_blocks(scheduler: Any) -> bool:
    """Whether a prompt's hit is the run of cached blocks from its start: one group of layers
    with full attention, and no draft model that wants a block of it computed again."""
    coordinator = scheduler.kv_cache_manager.coordinator
    if type(coordinator).__name__ != "UnitaryKVCacheCoordinator":
        return False
    kinds = {type(each).__name__ for each in coordinator.single_type_managers}
    return kinds == {"FullAttentionManager"} and not coordinator.eagle_group_ids


def cached_tokens(coordinator: Any, request: Any) -> int:
    """Tokens that the prefix cache has of a request, as vLLM looks them up when it starts it:
    the last token is always computed. Nothing is counted, published or touched."""
    found = coordinator.find_longest_cache_hit(request.block_hashes, request.num_tokens - 1)
    tokens: int = found[1]
    return tokens


def reads_prefix_cache(request: Any) -> bool:
    """Whether a request may use what is cached; one that wants logprobs of its prompt may not."""
    return not getattr(request, "skip_reading_prefix_cache", False)


def remote_tokens(scheduler: Any, request: Any, local_tokens: int) -> tuple[int | None, bool]:
    """What a KV connector has of a request beyond the local hit, and whether it is loaded
    between steps; `None` tokens: the connector does not know yet.

    vLLM asks the same of the connector each time that it looks at the request.
    """
    connector = getattr(scheduler, "connector", None)
    if connector is None:
        return 0, False
    if not reads_prefix_cache(request) and has("skips_remote_hits"):
        return 0, False
    tokens, loads = connector.get_num_new_matched_tokens(request, local_tokens)
    return tokens, bool(loads)
