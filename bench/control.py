"""`python -m bench.control`: the controller's figures, each beside its aim, in virtual time.

No server and no GPU: vLLM's real scheduler, the shaper and an emulated H200 run faster
than the clock, in two processes. Prints Markdown; `--write` makes
`docs/control-figures.md` of it. A figure that misses its aim is marked, with the case
that is worst.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.acceptance import cost, exact, heat, policy_comparison, recovery, slack, step
from bench.harness.aims import Job, Proof, Section, Verdict, section_text, verdict_text, verdicts
from bench.harness.machine import describe
from bench.harness.options import one_line
from bench.harness.runner import Run, Runner, Told, together
from shaper.cli.arguments import Parser
from shaper.engine.compat import vllm_version
from shaper.engine.preflight import check_vllm_imports
from shaper.files.outputs import check_output

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


PROOFS: dict[str, Proof] = {
    "step": step,
    "slack": slack,
    "cost": cost,
    "exact": exact,
    "recovery": recovery,
    "heat": heat,
    "baselines": policy_comparison,
}


def _call(job: Job) -> dict[str, Any]:
    return job.call(*job.arguments)


def _tell(told: Told) -> None:
    print(f"\r{told.done} of {told.known} runs", end="", file=sys.stderr, flush=True)


def run(names: Sequence[str], quick: bool, processes: int) -> list[Section]:
    """Run these proofs and hand back their tables, in order.

    Raises:
        EngineError: a process was killed.
    """
    searches = [together([Run(name, job) for job in PROOFS[name].jobs(quick)]) for name in names]
    with Runner(_call, repr, processes, tell=_tell) as runner:
        found = runner.drive(searches)
    return [
        section
        for name, results in zip(names, found, strict=True)
        for section in PROOFS[name].sections(list(results), quick)
    ]


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
