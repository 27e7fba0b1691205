"""The nearest right word, for messages about a wrong one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggest(word: str, known: Iterable[str], kind: str = "known keys:", most: int = 50) -> str:
    """`did you mean 'limits'?`, or the known words where none is near."""
    words = sorted(known)
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"{kind} {', '.join(words[:most])}"
