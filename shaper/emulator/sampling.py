"""Which token an emulated model says next: printable, and the same for the same request.

There are no weights, so tokens come from a fixed text of made-up words. Where
a request starts in it depends on its prompt and seed only; the token at an
output position never depends on the batch, on timing or on how the prompt was
cut into chunks. A request that names `max_tokens` gets exactly that many; one
that leaves the length to the model ends by itself after `SHORTEST_ANSWER` to
`LONGEST_ANSWER` tokens.
"""

from __future__ import annotations

import array
import random
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from shaper.emulator.batching import TrackedRequest

# Made up: tokens of answers whose length a request leaves to the model.
SHORTEST_ANSWER = 64
LONGEST_ANSWER = 320

_TEXT_LENGTH = 1 << 14
# With a grammar: what ends things comes first, so that every answer is finite.
_GRAMMAR_ORDER = b'"}],:{[0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-_. '
_PRINTABLE = tuple(range(0x20, 0x7F))


def _made_up_text() -> tuple[int, ...]:
    generator = random.Random(20230901)
    letters = "etaoinshrdlucmfwygpbvk"
    text: list[int] = []
    while len(text) < _TEXT_LENGTH:
        word = "".join(generator.choice(letters) for _ in range(generator.randint(2, 8)))
        text.extend((word + generator.choice((" ", " ", " ", ", ", ". "))).encode())
    return tuple(text[:_TEXT_LENGTH])


_TEXT = _made_up_text()


class TokenSource:
    """Picks tokens for requests.

    Args:
        vocabulary_size: token ids stay below this.
        max_model_length: tokens of prompt and output together.
    """

    def __init__(self, vocabulary_size: int, max_model_length: int) -> None:
        self._vocabulary_size = vocabulary_size
        self._max_model_length = max_model_length

    def pick(
        self, request: TrackedRequest, output: int, bitmask: npt.NDArray[np.int32] | None = None
    ) -> int:
        """The token at output index `output` (0 is the first).

        Args:
            request: where it starts in the text is worked out once and kept in it.
            bitmask: one row of the grammar's bitmask, 32 tokens to a word; the
                token is one of those it allows.
        """
        if request.text_offset is None:
            self._place(request)
        parameters = request.sampling_params
        if bitmask is not None:
            return self._grammatical(bitmask, getattr(parameters, "eos_token_id", None))
        if request.natural_length is not None and output >= request.natural_length:
            return int(parameters.eos_token_id)
        assert request.text_offset is not None
        token = _TEXT[(request.text_offset + output) % _TEXT_LENGTH] % self._vocabulary_size
        allowed = getattr(parameters, "allowed_token_ids", None)
        if allowed:
            return int(allowed[token % len(allowed)])
        if output < getattr(parameters, "min_tokens", 0):
            return self._not_a_stop(token, parameters)
        return token

    def _place(self, request: TrackedRequest) -> None:
        parameters = request.sampling_params
        tokens = request.prompt_token_ids or []
        seed = getattr(parameters, "seed", None) or 0
        digest = zlib.crc32(array.array("q", tokens).tobytes(), seed & 0xFFFFFFFF)
        request.text_offset = digest % _TEXT_LENGTH
        limit = getattr(parameters, "max_tokens", None)
        end = getattr(parameters, "eos_token_id", None)
        unlimited = limit is None or limit >= self._max_model_length - request.prompt_length
        if unlimited and end is not None:
            length = SHORTEST_ANSWER + digest % (LONGEST_ANSWER - SHORTEST_ANSWER + 1)
            request.natural_length = max(length, getattr(parameters, "min_tokens", 0))

    def _not_a_stop(self, token: int, parameters: Any) -> int:
        stops = getattr(parameters, "all_stop_token_ids", None) or ()
        if token not in stops:
            return token
        return next((other for other in _PRINTABLE if other not in stops), token)

    def _grammatical(self, bitmask: npt.NDArray[np.int32], end: int | None) -> int:
        def allows(token: int) -> bool:
            word = token >> 5
            return word < len(bitmask) and bool(int(bitmask[word]) >> (token & 31) & 1)

        if end is not None and allows(end):
            return end
        for token in _GRAMMAR_ORDER:
            if allows(token):
                return token
        words = np.flatnonzero(bitmask)
        if len(words):
            bits = int(bitmask[words[0]]) & 0xFFFFFFFF
            return int(words[0]) * 32 + (bits & -bits).bit_length() - 1
        # Nothing is allowed: the grammar is at its end, and any token ends the request.
        return end if end is not None else _GRAMMAR_ORDER[0]


def alternatives(token: int, count: int, vocabulary_size: int) -> list[int]:
    """`token` and `count` other printable tokens, most probable first."""
    others = [other for other in _PRINTABLE if other != token and other < vocabulary_size]
    if count > len(others):
        others += [
            t for t in range(min(256, vocabulary_size)) if t not in _PRINTABLE and t != token
        ]
    while len(others) < count:
        others.append(len(others) % vocabulary_size)
    return [token, *others[:count]]


def logprob_rows(
    tokens: Sequence[int | None], count: int, vocabulary_size: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """Plausible log probabilities: the sampled token first, at rank 1.

    Args:
        tokens: the sampled token of each row; None gives a row that nobody reads.
        count: alternatives beside the sampled token.

    Returns:
        Token ids and log probabilities, each rows x (count + 1), and ranks, one a row.
        The probabilities of a row add up to less than 1.
    """
    columns = count + 1
    ids = np.zeros((len(tokens), columns), dtype=np.int32)
    for row, token in enumerate(tokens):
        if token is not None:
            ids[row] = alternatives(token, count, vocabulary_size)
    # Halving from 0.5: 1/2, 1/4, ... sums to below 1 for any number of columns.
    logprobs = np.tile(np.log(0.5) * np.arange(1, columns + 1, dtype=np.float32), (len(tokens), 1))
    return ids, logprobs.astype(np.float32), np.ones(len(tokens), dtype=np.int32)
