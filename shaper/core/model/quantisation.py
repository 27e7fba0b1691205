"""Bytes a weight of each kind of matrix, scales and exceptions counted.

`shaper.core.model.weight_formats` says what a method does; here its exceptions, which are
lists of module names and patterns, are applied to the matrices of a decoder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from shaper.core.model.weight_formats import KINDS, rules_of

# Modules beside the matrices of the decoder: not read by a step of text, small, or never
# quantised. A name of these in a list of exceptions changes nothing.
_BESIDE = re.compile(
    r"vision|visual|audio|image|speech|multi_modal|mm_|projector|connector|norm|embed|router|"
    r"(^|\.)gate(\.|$|\*|\$)|shared_expert_gate|bias|mtp|eagle|draft|rotary|pooler|score|classifier|"
    r"experts\.\d+\.|wte|\bconv1d\b"
)


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """Bytes a weight by kind of matrix (see `KINDS`), scales included; means over layers."""

    attention: float = 2.0
    output: float = 2.0
    gate_up: float = 2.0
    down: float = 2.0
    experts: float = 2.0
    shared: float = 2.0
    head: float = 2.0
    plain: float = 2.0
    """Of what is never quantised: routers, embeddings."""
    quantised: float = 2.0
    """Mean over the matrices that are quantised; the plain width where none is."""

    @classmethod
    def all_plain(cls, width: float) -> WeightBytes:
        """A model that is not quantised."""
        return cls(*([width] * 9))


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix of a layer: its kind, how many weights, and the names it may have in lists."""

    kind: str
    weights: int
    names: tuple[str, ...]


def weight_bytes(
    matrices: Sequence[Matrix],
    layers: int,
    plain: float,
    quantisation: Mapping[str, Any] | None,
    method: str | None = None,
) -> WeightBytes:
    """The bytes of these matrices' weights.

    Args:
        matrices: of all `layers` of the decoder.
        plain: bytes of a weight that is not quantised.
        quantisation, method: see `rules_of`.

    Raises:
        ValueError: a method or an exception that is not understood; names the key.
    """
    rules = rules_of(quantisation, method)
    if rules is None:
        return WeightBytes.all_plain(plain)
    found = _Named(rules.named)
    totals = {kind: [0.0, 0.0] for kind in KINDS}
    quantised = [0.0, 0.0]
    for matrix in matrices:
        named, width = found.of(matrix.names)
        if not named:
            width = rules.widths.get(matrix.kind)
        totals[matrix.kind][0] += matrix.weights * (plain if width is None else width)
        totals[matrix.kind][1] += matrix.weights
        if width is not None and width != plain:
            quantised[0] += matrix.weights * width
            quantised[1] += matrix.weights
    found.check_all_placed(layers)
    means = {kind: bytes_ / count if count else plain for kind, (bytes_, count) in totals.items()}
    mean = quantised[0] / quantised[1] if quantised[1] else plain
    return WeightBytes(**means, plain=plain, quantised=mean)


class _Named:
    """Finds the rule that names a matrix, and knows which rules never named one."""

    def __init__(self, rules: Sequence[tuple[str, str, float | None]]) -> None:
        self._rules = rules
        self._exact: dict[str, int] = {}
        self._matchers: list[tuple[int, Callable[[str], bool]]] = []
        self._placed: set[int] = set()
        for index, (key, pattern, _) in enumerate(rules):
            expression = pattern.startswith("re:")
            if _BESIDE.search(pattern):
                self._placed.add(index)
            if expression or "*" in pattern:
                self._matchers.append((index, _matcher(key, pattern)))
            elif index not in self._placed or "experts." in pattern:
                self._exact.setdefault(_from_layers(pattern), index)

    def of(self, names: Iterable[str]) -> tuple[bool, float | None]:
        """(whether a rule names one of these, the bytes that the rule gives)."""
        index = self._index(names)
        if index is None:
            return False, None
        self._placed.add(index)
        return True, self._rules[index][2]

    def _index(self, names: Iterable[str]) -> int | None:
        for name in names:
            parts = name.split(".")
            for start in range(len(parts)):
                for end in range(start + 1, len(parts) + 1):
                    found = self._exact.get(".".join(parts[start:end]))
                    if found is not None:
                        return found
        for index, matches in self._matchers:
            if any(matches(name) for name in names):
                return index
        return None

    def check_all_placed(self, layers: int) -> None:
        """Raises ValueError when a rule names nothing that this module knows of."""
        for index, (key, pattern, _) in enumerate(self._rules):
            # Layers above the decoder's hold drafts.
            number = re.search(r"\blayers\.(\d+)", pattern)
            if index in self._placed or (number and int(number.group(1)) >= layers):
                continue
            raise ValueError(
                f"quantisation key {key!r} names {pattern!r}, which is not a matrix that is known"
            )


def _from_layers(name: str) -> str:
    """A module's name without what is before its layer: `language_model.model.`, `model.`"""
    return re.sub(r"^.*?(?=\blayers\.)|^(.*\.)?(?=lm_head$)", "", name)


def _matcher(key: str, pattern: str) -> Callable[[str], bool]:
    prefixes = ("", "model.", "language_model.model.", "model.language_model.", "language_model.")
    if not pattern.startswith("re:"):
        return lambda name: any(
            fnmatchcase(prefix + name, end)
            for prefix in prefixes
            for end in (pattern, pattern + ".*")
        )
    try:
        expression = re.compile(pattern[3:])
    except re.error as error:
        raise ValueError(f"quantisation key {key!r}: {pattern!r} is no expression") from error
    return lambda name: any(expression.match(prefix + name) for prefix in prefixes)
