"""`python -m bench.studies.constants`: every numeric constant of `shaper/` as one table.

Name, value, unit (by the name's ending) and what the source says of it: the comment above or the
text below. `--effects` also halves and doubles each constant of the policies and of the learner,
and runs two short scenes in virtual time with each: a rack of two engines under a group's limit,
and one engine under a limit with an ITL target. The scenes are seeded, so a constant that changes
no figure changed no decision there. `--write` makes `docs/constants.md`; without `--effects` it
keeps the effects that are in it for constants whose values have not changed.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.util
import math
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from bench.harness.options import one_line
from shaper.cli.arguments import Parser
from shaper.engine.preflight import check_vllm_imports
from shaper.errors import ShaperError

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "constants.md"
STUDIED = ("shaper/core/policy/", "shaper/core/learn/")
FACTORS = (0.5, 2.0)
# The longest ending that fits names the unit.
UNITS = {
    "_PER_SECOND": "1/s",
    "_CELSIUS_PER_SECOND": "degC/s",
    "_SECONDS": "s",
    "_MICROSECONDS": "us",
    "_WATTS": "W",
    "_JOULES": "J",
    "_CELSIUS": "degC",
    "_HERTZ": "Hz",
    "_BYTES": "bytes",
    "_TOKENS": "tokens",
    "_RATIO": "ratio",
    "_SHARE": "ratio",
}
EFFECT = 0.005
"""Relative change of a figure that is said."""
HEADER = """# Constants

`python -m bench.studies.constants --effects --write` made this page: each numeric constant of
`shaper/` with its value, its unit, and what the source says of where it comes from. Constants of
the policies and the learner were also halved and doubled, each in two seeded scenes in virtual
time; the last two columns say which figures moved by 0.5% or more (x: times the figure of the
code as it is), and "none" where no decision changed.

- **rack**: two emulated H200 under {rack}, conversation traffic, with the model's and the
  meters' errors drawn from the seed, {seconds:g} s.
- **engine**: one under {engine}, ITL target 50 ms, the same traffic and errors.
"""


class Constant(NamedTuple):
    """One numeric constant, or a tuple of numbers, of a module."""

    path: str
    name: str
    value: Any
    words: str

    @property
    def place(self) -> str:
        """The module's path in `shaper/`."""
        return self.path.removeprefix("shaper/").removesuffix(".py")

    @property
    def unit(self) -> str:
        """By the longest ending of its name that is known; a plain number has none."""
        found = [ending for ending in UNITS if f"_{self.name}".endswith(ending)]
        return UNITS[max(found, key=len)] if found else ""

    @property
    def studied(self) -> bool:
        """Whether it is halved and doubled."""
        return self.path.startswith(STUDIED) and isinstance(self.value, (int, float))


def _number(node: ast.expr) -> Any:
    """The value of an expression of numbers alone; None for any other."""
    names = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
    calls = any(isinstance(inner, ast.Call) for inner in ast.walk(node))
    if names - {"math"} or calls:
        return None
    try:
        value = eval(compile(ast.Expression(node), "", "eval"), {"math": math})
    except (TypeError, ValueError, AttributeError):
        return None
    numbers = value if isinstance(value, tuple) else (value,)
    fits = numbers and all(type(each) in (int, float) for each in numbers)
    return value if fits else None


def _assigned(node: ast.stmt) -> tuple[str, ast.expr] | None:
    target: ast.expr
    if isinstance(node, ast.Assign):
        target = node.targets[0]
    elif isinstance(node, ast.AnnAssign):
        target = node.target
    else:
        return None
    if not isinstance(target, ast.Name) or not target.id.isupper() or node.value is None:
        return None
    return target.id, node.value


def constants(root: Path = ROOT) -> Iterator[Constant]:
    """Those of `shaper/`, file by file. One that follows another without a blank line or words of
    its own shares the words of that one."""
    for path in sorted((root / "shaper").rglob("*.py")):
        source = path.read_text()
        lines = source.splitlines()
        body = ast.parse(source).body
        last_line, last_words = -1, ""
        for index, node in enumerate(body):
            found = _assigned(node)
            if found is None or (value := _number(found[1])) is None:
                continue
            first = node.lineno - 1
            while first > 0 and lines[first - 1].startswith("#"):
                first -= 1
            words = " ".join(line.lstrip("# ") for line in lines[first : node.lineno - 1])
            end = node.end_lineno or node.lineno
            words = words or lines[end - 1][node.end_col_offset :].lstrip(" #")
            after = body[index + 1] if index + 1 < len(body) else None
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                words = " ".join(str(after.value.value).split())
                end = after.end_lineno or end
            if not words and node.lineno - 1 == last_line:
                words = last_words
            last_line, last_words = end, words
            yield Constant(path.relative_to(root).as_posix(), found[0], value, words)


class _Scaled(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module with one constant multiplied, so that every use of it sees that."""

    def __init__(self, constant: Constant, factor: float) -> None:
        self.constant, self.factor = constant, factor

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self.constant.path.removesuffix(".py").replace("/", "."):
            return None
        file = ROOT / self.constant.path
        return importlib.util.spec_from_file_location(fullname, file, loader=self)

    def exec_module(self, module: ModuleType) -> None:
        file = ROOT / self.constant.path
        tree = ast.parse(file.read_bytes())
        for node in tree.body:
            found = _assigned(node)
            if found is not None and found[0] == self.constant.name:
                value = self.constant.value * self.factor
                if isinstance(self.constant.value, int):
                    value = max(1, round(value))
                changed = ast.parse(f"{found[0]} = {value!r}").body[0]
                tree.body[tree.body.index(node)] = changed
        exec(compile(tree, file, "exec", dont_inherit=True), module.__dict__)


SECONDS = 10.0
RATE_HERTZ = 11.0
RACK_WATTS, ENGINE_WATTS, WINDOW_SECONDS, ITL_SECONDS = 900.0, 450.0, 0.1, 0.05
Figures = dict[str, dict[str, float]]


def scenes() -> Figures:
    """The figures of both scenes, by scene and name; in this process, as its modules are."""
    from shaper.core.types import PowerLimit
    from shaper.simulate.figures import rack_figures
    from shaper.simulate.runs import run_rack
    from shaper.simulate.setup import RackSetup
    from shaper.traffic.synthetic import synthesise

    alone = RackSetup(engines=1, duration_seconds=SECONDS, max_num_seqs=128, seed=1)
    setups = {
        "rack": replace(alone, engines=2, group_limits=(PowerLimit(RACK_WATTS, WINDOW_SECONDS),)),
        "engine": replace(
            alone,
            limits=(PowerLimit(ENGINE_WATTS, WINDOW_SECONDS),),
            itl_target_seconds=ITL_SECONDS,
        ),
    }
    answers = {}
    for name, setup in setups.items():
        # One segment of the traffic for each engine.
        arrivals = synthesise(SECONDS * setup.engines, RATE_HERTZ, seed=1)
        group = rack_figures(run_rack(setup, arrivals)).group
        answers[name] = {
            "p99 TTFT": group.ttft_seconds.p99,
            "p99 ITL": group.itl_seconds.p99,
            "median end to end": group.e2el_seconds.p50,
            "tokens/s": group.output_tokens_per_second,
            "tokens/J": group.tokens_per_joule,
            "highest window": group.peak_watts,
        }
    return answers


def _child(changed: tuple[Constant, float] | None, pipe: Any) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "shaper"]:
        del sys.modules[name]
    if changed is not None:
        sys.meta_path.insert(0, _Scaled(*changed))
    try:
        pipe.send(scenes())
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}".splitlines()[0])


def _scenes(changed: tuple[Constant, float] | None) -> Figures | str:
    """In a process of its own, which has vLLM from this one and imports the shaper anew."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(changed, theirs))
    child.start()
    theirs.close()
    try:
        found: Figures | str = mine.recv()
    except EOFError:
        found = "died"
    child.join()
    return found


def effect(before: Figures, after: Figures | str) -> str:
    """The figures that moved, in words."""
    if isinstance(after, str):
        return after
    said = []
    for scene, figures in before.items():
        ratios = {
            name: after[scene][name] / value for name, value in figures.items() if value > 0.0
        }
        moved = [f"{name} x {r:.3g}" for name, r in ratios.items() if abs(r - 1.0) >= EFFECT]
        if moved:
            said.append(f"{scene}: {', '.join(moved)}")
        elif any(ratio != 1.0 for ratio in ratios.values()):
            said.append(f"{scene}: under 0.5%")
    return "; ".join(said) or "none"


def measured(studied: Sequence[Constant], processes: int) -> dict[Constant, list[str]]:
    """What half and twice of each constant do, in words."""
    import vllm.config
    import vllm.v1.core.sched.scheduler  # noqa: F401 - for the children

    before = _scenes(None)
    if isinstance(before, str):
        raise ShaperError(f"the scenes can't be run: {before}")
    jobs = [(constant, factor) for constant in studied for factor in FACTORS]
    found: dict[Constant, list[str]] = {}
    with ThreadPoolExecutor(processes) as pool:
        for (constant, _), after in zip(jobs, pool.map(_scenes, jobs), strict=True):
            found.setdefault(constant, []).append(effect(before, after))
            print(f"\r{len(found)} of {len(studied)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def page(effects: dict[str, list[str]]) -> str:
    """The document, with these effects by `where:name`."""
    rack, engine = (f"{w:g}W@{1e3 * WINDOW_SECONDS:g}ms" for w in (RACK_WATTS, ENGINE_WATTS))
    lines = [HEADER.format(rack=rack, engine=engine, seconds=SECONDS)]
    rows = list(constants())
    for studied, title in ((True, "Policies and learner"), (False, "All others")):
        columns = ["where", "constant", "value", "unit", "what and why"]
        columns += ["half", "twice"] if studied else []
        lines += [f"## {title}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for each in rows:
            if each.path.startswith(STUDIED) is studied:
                cells = [
                    each.place,
                    f"`{each.name}`",
                    f"{each.value}",
                    each.unit,
                    _cell(each.words),
                ]
                cells += effects.get(f"{each.place}:{each.name}", ["", ""]) if studied else []
                lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def written_effects(text: str) -> dict[str, list[str]]:
    """The effects in a document, by `where:name`, of constants whose values are as they are."""
    values = {f"{each.place}:{each.name}": str(each.value) for each in constants()}
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if line.startswith("| ") and len(cells) == 7:
            name = f"{cells[0]}:{cells[1].strip('`')}"
            if values.get(name) == cells[2]:
                found[name] = cells[5:]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the page, or write it."""
    return one_line("bench.studies.constants", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="python -m bench.studies.constants", description=__doc__)
    parser.add_argument("--effects", action="store_true", help="halve and double (15 minutes)")
    parser.add_argument("--only", default="", metavar="TEXT", help="of names that have it in them")
    parser.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--write", action="store_true", help=f"write docs/{DOCUMENT.name}")
    options = parser.parse_args(argv)
    effects = written_effects(DOCUMENT.read_text()) if DOCUMENT.exists() else {}
    if options.effects:
        check_vllm_imports()
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
        studied = [each for each in constants() if each.studied and options.only in each.name]
        for constant, words in measured(studied, options.processes).items():
            effects[f"{constant.place}:{constant.name}"] = words
    text = page(effects)
    if options.write:
        DOCUMENT.write_text(text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
