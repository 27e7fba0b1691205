"""What documents name exists: files behind links, commands, flags, metrics and settings."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from shaper.config.model import ShaperConfig

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "bench/*.md", "deploy/**/*.md", "patches/*.md")
    for path in ROOT.glob(pattern)
)


def names(documents: list[Path], pattern: str) -> set[str]:
    """All that a pattern finds in documents."""
    return {name for path in documents for name in re.findall(pattern, path.read_text())}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    """Each relative link is a file or folder of the repository."""
    targets = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", path.read_text())
    missing = [target for target in targets if not (path.parent / target).exists()]
    assert not missing


def test_files_in_documents_exist():
    """A path of this repository in backquotes is there, or its module's file is."""
    paths = names(DOCUMENTS, r"`((?:shaper|tests|docs|bench|deploy|scripts)/[\w./-]+\.\w+)`")
    assert not sorted(path for path in paths if not (ROOT / path).exists())


def test_each_command_of_bench_is_listed():
    """`bench/README.md` has every module of `bench` that runs, and no other."""
    listed = names([ROOT / "bench" / "README.md"], r"python -m (bench(?:\.\w+)+)")
    bench = ROOT / "bench"
    runs = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        for path in (*bench.glob("*.py"), *(bench / "studies").rglob("*.py"))
        if '__name__ == "__main__"' in path.read_text()
    }
    assert listed == runs


def test_commands_in_documents_exist():
    """Whatever a document runs with `python -m` can be found."""
    modules = names(DOCUMENTS, r"python -m ((?:bench|shaper)(?:\.\w+)*)")
    assert modules
    assert not sorted(name for name in modules if importlib.util.find_spec(name) is None)


def test_metrics_in_documents_are_written():
    """A metric that an operator is told to look at has a source."""
    source = "".join(path.read_text() for path in (ROOT / "shaper").rglob("*.py"))
    metrics = names(DOCUMENTS, r"`(shaper_[a-z_]+[a-z])")
    # A counter's name gets its `_total` when it is shown.
    unknown = [m for m in metrics if m.removeprefix("shaper_").removesuffix("_total") not in source]
    assert not sorted(unknown)


def test_settings_in_documents_exist():
    """`SHAPER_...` names a setting, or a variable that the source reads."""
    source = "".join(path.read_text() for path in (ROOT / "shaper").rglob("*.py"))
    variables = names(DOCUMENTS, r"\bSHAPER_([A-Z_]+[A-Z])\b")
    settings = {name.upper() for name in ShaperConfig.model_fields}
    unknown = [v for v in variables if v not in settings and f"SHAPER_{v}" not in source]
    # `SHAPER_ITL_TARGET` stands for `itl_target_seconds`.
    unknown = [v for v in unknown if not any(name.startswith(f"{v}_") for name in settings)]
    assert not sorted(unknown)


@pytest.mark.parametrize(
    ("index", "pages"), [("docs/index.md", "docs/*.md"), ("docs/decisions/README.md", "*/*/*.md")]
)
def test_each_page_is_in_its_index(index, pages):
    """A reader finds every page from the index of its folder."""
    path = ROOT / index
    linked = {target.partition("#")[0] for target in names([path], r"\]\(([^)\s]+)\)")}
    present = {page.name for page in ROOT.glob(pages) if page.parent == path.parent}
    assert not sorted(present - linked - {path.name})
