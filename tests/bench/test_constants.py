"""The table of constants, and what halving and doubling one does."""

from __future__ import annotations

import importlib
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.studies import constants as study


@dataclass
class Sources:
    root: Path

    def write(self, text: str) -> list[study.Constant]:
        folder = self.root / "shaper" / "core" / "policy"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "one.py").write_text(text)
        return list(study.constants(self.root))


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    return Sources(tmp_path)


def test_constants_are_found_with_their_words_and_units(sources: Sources) -> None:
    """Numbers and tuples of them, by comment, docstring or the constant that they follow."""
    found = sources.write(
        '"""Module."""\n'
        "# Two seconds\n# of rest.\nREST_SECONDS = 2.0\n_LEAST_TOKENS = 4 * 16\n\n"
        'SHARES = (0.5, 1.0)\n"""Of it all."""\n\n'
        "NAME = 'text'\nBUILT = dict()\nON = True\nlower = 3\n"
    )
    assert [(x.name, x.value, x.unit, x.words) for x in found] == [
        ("REST_SECONDS", 2.0, "s", "Two seconds of rest."),
        ("_LEAST_TOKENS", 64, "tokens", "Two seconds of rest."),
        ("SHARES", (0.5, 1.0), "", "Of it all."),
    ]
    assert [x.studied for x in found] == [True, True, False]


def test_every_use_of_a_scaled_constant_sees_it(
    sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defaults of arguments and constants that are made of it, too; the file stays as it is."""
    text = "BASE_SECONDS = 2.0\nTWICE = 2 * BASE_SECONDS\ndef f(x=BASE_SECONDS):\n    return x\n"
    (constant,) = (x for x in sources.write(text) if x.name == "BASE_SECONDS")
    (sources.root / "scaled_one.py").write_text(text)
    constant = constant._replace(path="scaled_one.py")
    monkeypatch.setattr(study, "ROOT", sources.root)
    monkeypatch.setattr(sys, "meta_path", [study._Scaled(constant, 0.5), *sys.meta_path])
    module = importlib.import_module("scaled_one")
    try:
        assert (module.BASE_SECONDS, module.TWICE, module.f()) == (1.0, 2.0, 1.0)
    finally:
        del sys.modules["scaled_one"]
    assert (sources.root / "scaled_one.py").read_text() == text


def test_what_moved_is_said() -> None:
    """By scene; a change below half a percent apart from none at all, and a run that failed."""
    before = {"rack": {"p99 TTFT": 1.0, "tokens/s": 100.0}, "engine": {"p99 TTFT": 2.0}}
    after = {"rack": {"p99 TTFT": 1.25, "tokens/s": 100.1}, "engine": {"p99 TTFT": 2.0002}}
    assert study.effect(before, after) == "rack: p99 TTFT x 1.25; engine: under 0.5%"
    assert study.effect(before, before) == "none"
    assert study.effect(before, "ValueError: no") == "ValueError: no"


def test_effects_are_kept_while_the_value_stays() -> None:
    """A page written again without running the scenes loses none, and none of an old value."""
    first = next(x for x in study.constants() if x.studied)
    name = f"{first.place}:{first.name}"
    text = study.page({name: ["none", "rack: tokens/s x 0.9"]})
    assert study.written_effects(text)[name] == ["none", "rack: tokens/s x 0.9"]
    old = text.replace(f"| {first.value} |", f"| {math.pi} |", 1)
    assert name not in study.written_effects(old)


def test_the_page_has_the_constants_of_the_code() -> None:
    """`python -m bench.studies.constants --write` makes it again."""
    text = study.DOCUMENT.read_text()
    assert text == study.page(study.written_effects(text))
