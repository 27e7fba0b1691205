"""`python -m bench.control`: the controller's figures, each beside its aim, in virtual time.

No server and no GPU: vLLM's real scheduler, the shaper and an emulated H200 run faster
than the clock, in two processes. Prints Markdown; `--write` makes
`docs/control-figures.md` of it. A figure that misses its aim is marked, with the case
that is worst.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.acceptance import cost, exact, heat, policy_comparison, recovery, slack, step
from bench.harness.aims import Job, Section, Verdict, section_text, verdict_text, verdicts
from bench.harness.machine import describe
from bench.harness.options import one_line
from shaper.cli.arguments import Parser
from shaper.engine.compat import vllm_version
from shaper.engine.preflight import check_vllm_imports
from shaper.files.outputs import check_output

Results = list[dict[str, Any]]

PROCESSES = 2
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "control-figures.md"
HEADER = """# The controller's figures

`python -m bench.control --write` made this file on {date} (vLLM {vllm}; {machine}). It runs
vLLM's real scheduler, the shaper and one emulated H200 SXM that serves Llama-3.1-8B's shape,
in virtual time: no figure depends on how fast the machine is or what else it does.
Prediction is perfect here, the model that predicts is the emulated GPU's own; what becomes of
budgets where it is not, `python -m bench.studies.learning` prints. No real GPU was measured.

Power is true power on a grid of 1 ms; a limit is judged at every window that begins at a
millisecond. "Unshaped" is vLLM with 8,192 batched tokens and 1,024 sequences, asynchronous
scheduling, the same requests at the same times. The first table has each aim beside the worst
of its cases; what is not judged has no aim. [baselines.md](baselines.md) describes the
policies of the last tables.
"""


@dataclass(frozen=True, slots=True)
class Proof:
    """One part of the report: its lists of runs, and the tables made of their results."""

    jobs: Callable[[bool], list[list[Job]]]
    sections: Callable[[list[Results], bool], list[Section]]


PROOFS: dict[str, Proof] = {
    "step": Proof(
        lambda quick: [step.jobs(quick), step.steady_jobs(quick)],
        lambda results, quick: step.sections(*results),
    ),
    "slack": Proof(
        lambda quick: [slack.jobs(quick)], lambda results, quick: slack.sections(*results)
    ),
    "cost": Proof(
        lambda quick: [cost.demand_jobs(quick), cost.saturated_jobs(quick)],
        lambda results, quick: cost.sections(*results),
    ),
    "exact": Proof(
        lambda quick: [exact.jobs(quick)], lambda results, quick: exact.sections(*results)
    ),
    "recovery": Proof(
        lambda quick: [recovery.jobs(quick)],
        lambda results, quick: recovery.sections(quick, results[0]),
    ),
    "heat": Proof(lambda quick: [heat.jobs(quick)], lambda results, quick: heat.sections(*results)),
    "baselines": Proof(
        lambda quick: [policy_comparison.jobs(quick)],
        lambda results, quick: policy_comparison.sections(*results),
    ),
}


def _start_worker() -> None:
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    # Two processes share the cores; a pool of threads in each would only get in the way.
    os.environ["OMP_NUM_THREADS"] = "1"


def _timed(job: Job) -> tuple[dict[str, Any], float]:
    began = time.process_time()
    return job.call(*job.arguments), time.process_time() - began


def run(names: Sequence[str], quick: bool, processes: int) -> list[Section]:
    """Run these proofs and hand back their tables, in order."""
    work = {name: PROOFS[name].jobs(quick) for name in names}
    places: dict[Future[tuple[dict[str, Any], float]], tuple[str, int, int]] = {}
    answers: dict[tuple[str, int, int], dict[str, Any]] = {}
    seconds = dict.fromkeys(names, 0.0)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start_worker) as pool:
        for name, lists in work.items():
            for index, jobs in enumerate(lists):
                for place, job in enumerate(jobs):
                    places[pool.submit(_timed, job)] = (name, index, place)
        for done, future in enumerate(as_completed(places), 1):
            name, index, place = places[future]
            answers[name, index, place], spent = future.result()
            seconds[name] += spent
            print(f"\r{done} of {len(places)} runs", end="", file=sys.stderr, flush=True)
    spent_text = ", ".join(f"{name} {spent:.0f} s" for name, spent in seconds.items())
    print(f"; processor time: {spent_text}", file=sys.stderr)
    found: list[Section] = []
    for name, lists in work.items():
        results = [
            [answers[name, index, place] for place in range(len(jobs))]
            for index, jobs in enumerate(lists)
        ]
        found += PROOFS[name].sections(results, quick)
    return found


def report(sections: Sequence[Section], judged: Sequence[Verdict]) -> str:
    """All of it as Markdown: the aims, then each table."""
    met = sum(verdict.met for verdict in judged)
    parts = [f"{met} of {len(judged)} aims met.\n", verdict_text(judged) + "\n"]
    return "\n".join(parts + [section_text(section) for section in sections])


def _document(text: str) -> str:
    date = datetime.now(UTC).date().isoformat()
    return HEADER.format(date=date, vllm=vllm_version(), machine=describe()) + "\n" + text


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report.

    Returns:
        0 when every aim is met, 1 when one is missed, 2 when something could not run.
    """
    return one_line("bench.control", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="python -m bench.control", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs")
    parser.add_argument(
        "--only", nargs="+", choices=sorted(PROOFS), metavar="PROOF", help=", ".join(PROOFS)
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures, unrounded")
    parser.add_argument("--processes", type=int, default=PROCESSES, help="default: %(default)s")
    parser.add_argument("--write", action="store_true", help=f"write docs/{DOCUMENT.name}")
    options = parser.parse_args(argv)
    if options.processes < 1:
        parser.error("--processes: give 1 or more")
    if options.write and (options.quick or options.only):
        parser.error("--write: the document has all proofs at full length; drop --quick and --only")
    check_output(options.json, "--json")
    check_vllm_imports()
    began = time.monotonic()
    sections = run(options.only or list(PROOFS), options.quick, options.processes)
    judged = [verdict for section in sections for verdict in verdicts(section)]
    missed = [verdict for verdict in judged if not verdict.met]
    text = report(sections, judged)
    print(text, end="")
    if options.write:
        DOCUMENT.write_text(_document(text))
    print(f"{time.monotonic() - began:.0f} s for all runs.", file=sys.stderr)
    if options.json:
        data = {
            "quick": options.quick,
            "aims": [asdict(verdict) for verdict in judged],
            "sections": [asdict(section) for section in sections],
        }
        options.json.write_text(json.dumps(data, indent=1))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
