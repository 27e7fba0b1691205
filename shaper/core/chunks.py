"""Which tokens of waiting prompts a step takes: vLLM's own arithmetic, without vLLM.

Law. Prompts are served in their order until the step's tokens are used up. A chunk is at most
what is left of the prompt, of the step, and of the bound on one prompt. Where states are kept at
block boundaries (a hybrid model whose Mamba cache is in mode "align"), a chunk that does not end
its prompt ends at a boundary:

- a chunk that reaches no boundary gets nothing; a running prompt is then passed over, and a
  waiting one stops all behind it;
- a prompt stops at its last boundary, and what is left after it is a chunk of its own;
- since vLLM 0.28 a chunk may end inside a block that is longer than the whole step, and what
  is left after the last boundary runs whole. Before, any part of that may run.

Source: `Scheduler._mamba_block_aligned_split` of vLLM 0.23 and 0.28 to 0.33. Its stops for a
shared prefix that no other request has cached yet are not modelled: they shorten a chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class PrefillDemand(NamedTuple):
    """One prompt that the engine could work on: tokens left, and tokens already computed."""

    remaining_tokens: int
    computed_tokens: int


class Blocks(NamedTuple):
    """Where chunks may end."""

    tokens: int
    """Of a block."""
    inside: bool
    """A chunk may end inside a block that is longer than the step (vLLM 0.28)."""


class Taken(NamedTuple):
    """Sums over the chunks of a step; see `StepBatch` for what they are."""

    requests: int = 0
    tokens: int = 0
    context_tokens: int = 0
    token_context_product: int = 0
    squared_tokens: int = 0


def aligned_chunk(demand: PrefillDemand, chunk: int, step_tokens: int, blocks: Blocks) -> int:
    """Tokens that vLLM gives a prompt in place of `chunk`, 0 if none.

    Args:
        demand: the prompt.
        chunk: what it would get without blocks, at least 1.
        step_tokens: the most that the step, or one prompt of it, may have.
        blocks: where chunks may end.
    """
    start, block = demand.computed_tokens, blocks.tokens
    whole = start + demand.remaining_tokens
    last = whole - whole % block
    end = start + chunk
    if not blocks.inside:
        if end < last:
            return chunk - chunk % block
        return last - start if start < last < end else chunk
    if end < whole:
        aligned = end - end % block
        if aligned > start or block <= step_tokens:
            end = aligned
    boundary = start - start % block + block
    if start % block and boundary < end:
        end = boundary
    if start < last < end:
        end = last
    return max(end - start, 0)


def least_chunk(prefills: Sequence[PrefillDemand], blocks: Blocks | None) -> int:
    """The fewest tokens that surely bring the first of these prompts on."""
    if not prefills:
        return 0
    demand = prefills[0]
    if blocks is None:
        return 1
    to_boundary = blocks.tokens - demand.computed_tokens % blocks.tokens
    return min(demand.remaining_tokens, to_boundary)


def take(
    prefills: Iterable[PrefillDemand],
    headroom: int,
    *,
    most: int,
    splittable: bool,
    running: int,
    step_tokens: int,
    blocks: Blocks | None,
) -> Taken:
    """The chunks of a step.

    Args:
        prefills: in the engine's order.
        headroom: tokens for them.
        most: of one prompt; 0: no such bound.
        splittable: else a prompt runs whole.
        running: how many of them, from the first, are of running requests.
        step_tokens: the most that the whole step may have.
        blocks: where chunks may end; None: anywhere.
    """
    requests = tokens = contexts = products = squares = 0
    for index, demand in enumerate(prefills):
        if headroom <= 0:
            break
        left = demand.remaining_tokens
        chunk = left if left < headroom else headroom
        if 0 < most < chunk:
            chunk = most
        if chunk <= 0 or (chunk < left and not splittable):
            break
        if blocks is not None:
            bound = min(step_tokens, most) if most else step_tokens
            chunk = aligned_chunk(demand, chunk, bound, blocks)
            if not chunk:
                if index < running:
                    continue
                break
        context = demand.computed_tokens + chunk
        requests += 1
        tokens += chunk
        contexts += context
        products += chunk * context
        squares += chunk * chunk
        headroom -= chunk
    return Taken(requests, tokens, contexts, products, squares)
