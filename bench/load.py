"""`python -m bench.load --url URL`: replays traffic at a server that already runs.

Prints TTFT, inter-token and end-to-end latency and throughput, with the
definitions of `vllm bench serve`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench.client import ClientOptions, Replay, ReplayProgress, check_url, replay
from bench.latency import GoodputTargets, LatencyFigures, bench_serve_keys, latency_figures
from bench.options import add_workload_options, count, seconds, workload
from bench.progress import Phase, PhaseProgress
from bench.servers import served_model
from bench.tables import latency_rows, throughput_rows, without_nan
from shaper.cli.arguments import Parser
from shaper.errors import ConfigError, ShaperError
from shaper.report.table import Row, Table, to_text
from shaper.traffic.workload import Workload

DEFAULT_SECONDS = 60.0
_TARGETS = ("ttft", "tpot", "e2el")


def main(argv: Sequence[str] | None = None) -> int:
    """Replay, print the table.

    Returns:
        0; 1 if a request failed; 2 for wrong input; 130 after Ctrl-C.
    """
    try:
        return _run(_parser().parse_args(argv))
    except ShaperError as error:
        print(f"bench.load: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench.load: interrupted", file=sys.stderr)
        return 130


def _parser() -> Parser:
    parser = Parser(prog="python -m bench.load", description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="default: %(default)s")
    parser.add_argument("--model", help="name in the requests (default: the first it serves)")
    parser.add_argument(
        "--allow-remote", action="store_true", help="put a server elsewhere under load"
    )
    parser.add_argument(
        "--max-in-flight",
        type=count,
        default=2048,
        metavar="N",
        help="requests beyond this many at once fail unsent (default: %(default)s)",
    )
    parser.add_argument(
        "--drain",
        type=seconds,
        default=120.0,
        metavar="TIME",
        help="how long to wait after the last arrival (default: 120s)",
    )
    parser.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MILLISECONDS",
        help="targets of the goodput, such as ttft:500 tpot:30 e2el:10000",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    add_workload_options(parser, None)
    return parser


def goodput_targets(words: Sequence[str]) -> GoodputTargets:
    """Targets from words like `ttft:500` (milliseconds, as in `vllm bench serve`).

    Raises:
        ConfigError: a word that is none.
    """
    found: dict[str, float] = {}
    for word in words:
        name, _, number = word.partition(":")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if name not in _TARGETS or not value > 0:
            raise ConfigError(
                f"--goodput {word!r} is not NAME:MILLISECONDS with a name of {', '.join(_TARGETS)}"
            )
        found[f"{name}_seconds"] = value / 1e3
    return GoodputTargets(**found)


def _run(options: argparse.Namespace) -> int:
    targets = goodput_targets(options.goodput)
    client = ClientOptions(
        options.url, "", options.max_in_flight, options.drain, options.allow_remote
    )
    check_url(client)
    load = workload(options, None, DEFAULT_SECONDS)
    model = options.model or served_model(options.url)
    client = ClientOptions(
        options.url, model, options.max_in_flight, options.drain, options.allow_remote
    )
    replayed = _replay(load, client)
    figures = latency_figures(replayed, targets)
    print(to_text(table(figures)))
    for message, times in figures.errors[:5]:
        print(f"{times} requests failed: {message}")
    if options.json is not None:
        data = {
            "traffic": load.name,
            "seed": load.seed,
            "latency": asdict(figures),
            "bench_serve": bench_serve_keys(figures),
        }
        options.json.write_text(json.dumps(without_nan(data), indent=1, allow_nan=False) + "\n")
    return 1 if figures.requests_failed else 0


def _replay(load: Workload, client: ClientOptions) -> Replay:
    with PhaseProgress([Phase(f"replaying {load.name}", load.span_seconds + 5.0)]) as progress:
        progress.next()

        def watch(state: ReplayProgress) -> None:
            progress.update(f"{state.sent}/{state.total} sent, {state.finished} finished")

        return replay(load, client, watch)


def table(figures: LatencyFigures) -> Table:
    """The figures of one replay."""
    rows = [
        *latency_rows([figures]),
        Row("TPOT p50", "ms", (1e3 * figures.tpot_seconds.p50,), 2),
        Row("TPOT p99", "ms", (1e3 * figures.tpot_seconds.p99,), 2),
        *throughput_rows([figures]),
        Row("requests per second", "1/s", (figures.requests_per_second,), 2),
        Row("goodput", "1/s", (figures.goodput_per_second,), 2),
        Row("requests sent over 20 ms late", "", (float(figures.late_sends),), 0),
    ]
    return Table("latency", ("value",), tuple(rows))


if __name__ == "__main__":
    sys.exit(main())
