"""The rules of the house that a machine can hold: who imports what, and how long files are."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "shaper"
SOURCES = sorted(path for path in PACKAGE.rglob("*.py"))
ALL_SOURCES = sorted(
    path for folder in ("shaper", "bench", "tests") for path in (ROOT / folder).rglob("*.py")
)

# Time, chance and the outside come into the core as arguments.
NOT_IN_CORE = frozenset(
    {"time", "datetime", "random", "secrets", "threading", "multiprocessing", "concurrent"}
    | {"asyncio", "queue", "signal", "socket", "subprocess", "os", "io", "pathlib", "shutil"}
    | {"tempfile", "logging", "sys", "importlib"}
)
# What each package may import of the others; `errors` and `units` are free to all. Each stands
# below those that name it, so no import goes upwards and there is no circle.
PACKAGES: dict[str, frozenset[str]] = {
    "core": frozenset(),
    "files": frozenset(),
    "config": frozenset({"core"}),
    "recording": frozenset({"core", "files"}),
    "gpu": frozenset({"core", "recording"}),
    "fitting": frozenset({"core", "recording"}),
    "ipc": frozenset({"core", "config", "gpu"}),
    "group": frozenset({"core", "ipc"}),
    "emulator": frozenset({"core", "gpu"}),
    "traffic": frozenset({"core", "files", "emulator"}),
    "report": frozenset(),
    "server": frozenset({"core", "config", "recording", "gpu", "ipc"}),
    "engine": frozenset(
        {"core", "files", "config", "recording", "gpu", "ipc", "group", "emulator", "server"}
    ),
    "simulate": frozenset(
        {"core", "config", "gpu", "group", "emulator", "traffic", "report", "engine"}
    ),
    "doctor": frozenset({"core", "config", "gpu", "ipc", "group", "emulator", "engine"}),
    "cli": frozenset(
        {"core", "files", "config", "recording", "gpu", "fitting", "ipc", "group", "emulator"}
        | {"traffic", "report", "server", "engine", "simulate", "doctor"}
    ),
}
FREE = frozenset({"errors", "units"})
TOP = frozenset({"__init__", "__main__", "errors", "units"})
# Parts of the core, lowest first: `types` and what it needs are below all of them.
CORE_PARTS: dict[str, frozenset[str]] = {
    "model": frozenset(),
    "learn": frozenset({"model"}),
    "ledger": frozenset(),
    "policy": frozenset({"ledger"}),
    "supervise": frozenset({"model", "learn"}),
}
CORE_FREE = frozenset({"types", "chunks"})
# The part of the emulator that vLLM's engine runs; the rest of it knows no vLLM.
EMULATED_EXECUTOR = (
    "emulator/executor.py",
    "emulator/kv_cache.py",
    "emulator/platform.py",
    "emulator/selfcheck.py",
)
# Commands that end in vLLM's own, and a check of what it would import.
COMMANDS = ("cli/serve.py", "cli/vllm.py", "doctor/import_check.py")
# Libraries that are imported in one place.
LIBRARIES: dict[str, tuple[str, ...]] = {
    "pynvml": ("gpu/nvml_driver.py",),
    # The metrics themselves, and the two places where they join vLLM's registries.
    "prometheus_client": ("server/metrics.py", "server/stats.py", "engine/plugin.py"),
    # vLLM brings it: only what runs in its API server may need it.
    "fastapi": ("server/routes.py", "server/control_service.py"),
    "vllm": ("engine/", "simulate/", "server/stats.py", *COMMANDS, *EMULATED_EXECUTOR),
    "torch": ("engine/", "simulate/", *COMMANDS, *EMULATED_EXECUTOR),
}
# A schedule in calendar time needs the wall clock; nothing else does.
WALL_CLOCK = frozenset({PACKAGE / "ipc" / "wall_clock.py"})
# "About 300": this is where "about" ends.
MAX_FILE_LINES = 360
MAX_FUNCTION_LINES = 60
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def imports(path: Path) -> Iterator[str]:
    """Absolute names of what a file imports, wherever in it the import stands; imports for
    the type checker alone are left out."""
    tree = ast.parse(path.read_text())
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped.update(inner for statement in node.body for inner in ast.walk(statement))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's statements, with those of the functions and classes inside it and
    without its docstring: what its arguments are may take its room to say."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", sorted((PACKAGE / "core").rglob("*.py")), ids=name_of)
def test_the_core_imports_numpy_and_itself(path: Path) -> None:
    """No I/O, clock, thread or chance, and no library but numpy, in `shaper/core/`."""
    for name in imports(path):
        top = name.split(".")[0]
        if top == "shaper":
            assert name.startswith(("shaper.core", "shaper.errors")), name
        else:
            assert top == "numpy" or top in sys.stdlib_module_names, name
            assert top not in NOT_IN_CORE, name


def test_the_table_of_packages_is_whole_and_has_no_circle() -> None:
    """Every package is in it, stands below those that import it, and nothing is loose."""
    folders = {path.name for path in PACKAGE.iterdir() if any(path.glob("*.py"))}
    assert folders == set(PACKAGES)
    assert {path.stem for path in PACKAGE.glob("*.py")} == TOP
    seen: set[str] = set()
    for name, allowed in PACKAGES.items():
        assert allowed <= seen, f"{name} stands above {sorted(allowed - seen)}"
        seen.add(name)


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_stands_below_them(package: str) -> None:
    """Data flows upwards through them, and so do imports."""
    allowed = {package} | FREE | PACKAGES[package]
    for path in sorted((PACKAGE / package).rglob("*.py")):
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "shaper" and len(parts) > 1:
                assert parts[1] in allowed, f"{name_of(path)} imports {name}"


@pytest.mark.parametrize("part", CORE_PARTS)
def test_parts_of_the_core_import_only_what_stands_below_them(part: str) -> None:
    """The controller joins them; none of them knows it."""
    allowed = {part} | CORE_FREE | CORE_PARTS[part]
    for path in sorted((PACKAGE / "core" / part).rglob("*.py")):
        for name in imports(path):
            parts = name.split(".")
            if parts[:2] == ["shaper", "core"] and len(parts) > 2:
                assert parts[2] in allowed, f"{name_of(path)} imports {name}"


@pytest.mark.parametrize("library", LIBRARIES)
def test_each_outside_library_has_its_place(library: str) -> None:
    """A change of its API is then a change of one place here."""
    for path in SOURCES:
        inside = path.relative_to(PACKAGE).as_posix()
        if not inside.startswith(LIBRARIES[library]):
            used = [name for name in imports(path) if name.split(".")[0] == library]
            assert not used, f"{name_of(path)} imports {used}"


@pytest.mark.parametrize("path", ALL_SOURCES, ids=name_of)
def test_files_and_functions_are_short(path: Path) -> None:
    """When they can't be, the design is telling something."""
    text = path.read_text()
    line_count = len(text.splitlines())
    assert line_count <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, FUNCTIONS):
            lines = body_lines(node)
            assert lines <= MAX_FUNCTION_LINES, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_is_swallowed(path: Path) -> None:
    """A broad `except` handles what it catches; the wall clock is read in its one place."""
    clocks = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler) and all(isinstance(s, ast.Pass) for s in node.body):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in {"everything", "Exception", "BaseException"}, node.lineno
        if isinstance(node, ast.Call):
            name = ".".join(ast.unparse(node.func).split(".")[-2:])
            assert name not in clocks or path in WALL_CLOCK, node.lineno


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("test_*.py")), ids=name_of)
def test_every_test_says_what_it_shows(path: Path) -> None:
    """One sentence in its docstring."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, FUNCTIONS) and node.name.startswith("test_"):
            assert ast.get_docstring(node), node.name
