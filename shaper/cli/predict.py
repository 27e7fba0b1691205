"""`shaper predict`: seconds, joules and watts of one engine step, and what they are made of.

It asks the step model that the controller and the emulated GPU use. A step that would
draw more than the power limit is given the clock at which it draws just that.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shaper.cli.arguments import Parser
from shaper.cli.step_spec import StepAnswer, StepSpec, answer
from shaper.emulator.shapes import known_models
from shaper.errors import ConfigError
from shaper.files.outputs import check_output, check_package
from shaper.gpu.profiles import known_profiles

_SWEPT = {
    "decode-requests": "decode_requests",
    "context-tokens": "context_tokens",
    "prefill-tokens": "prefill_tokens",
    "sm-clock-hertz": "sm_clock_hertz",
    "power-cap-watts": "power_cap_watts",
    "tp": "tensor_parallel",
}


def sweep_values(text: str) -> tuple[str, list[float]]:
    """Reads `name=1..512` (doubling), `name=0..4096:256` (even steps) or `name=1,8,64`.

    Raises:
        ConfigError: another form, or a name that can't be swept.
    """
    name, found, values = text.partition("=")
    if not found or name not in _SWEPT:
        raise ConfigError(f"--sweep {text!r}: want NAME=1..512, NAME one of {', '.join(_SWEPT)}")
    try:
        if ".." not in values:
            return name, [float(value) for value in values.split(",")]
        ends, _, by = values.partition(":")
        first, last = (float(end) for end in ends.split(".."))
        step = float(by) if by else None
    except ValueError as error:
        raise ConfigError(f"--sweep {text!r}: not numbers") from error
    if last < first or first < 0 or (step is not None and step <= 0):
        raise ConfigError(f"--sweep {text!r}: the range runs backwards")
    grid = [first]
    while grid[-1] < last and len(grid) < 10_000:
        following = grid[-1] + step if step is not None else max(grid[-1] * 2.0, 1.0)
        grid.append(min(following, last))
    return name, grid


def with_value(question: StepSpec, name: str, value: float) -> StepSpec:
    """The question with one swept setting replaced; `name` is that of the flag."""
    field = _SWEPT[name]
    kind = float if field in ("sm_clock_hertz", "power_cap_watts") else int
    changes: dict[str, Any] = {field: kind(value)}
    return dataclasses.replace(question, **changes)


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from error
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is below 0")
    return value


def _clock(text: str) -> float | None:
    try:
        return None if text == "max" else float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor max") from error


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `shaper predict`."""
    parser = Parser(prog="shaper predict", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--gpu", default="h200-sxm", help=f"{', '.join(known_profiles())}, or a profile's file"
    )
    parser.add_argument(
        "--model",
        default="llama-3.1-8b",
        help=f"{', '.join(known_models())}, or a directory with a Hugging Face config.json",
    )
    parser.add_argument(
        "--tp", dest="tensor_parallel", type=_count, default=1, help="GPUs of the engine"
    )
    parser.add_argument("--decode-requests", type=_count, default=0)
    parser.add_argument("--context-tokens", type=_count, default=1024, help="of each decode")
    parser.add_argument("--prefill-tokens", type=_count, default=0, help="tokens of the chunk")
    parser.add_argument(
        "--prefill-before-tokens", type=_count, default=0, help="context before the chunk"
    )
    parser.add_argument(
        "--returned-requests", type=_count, default=0, help="that come back after being held"
    )
    parser.add_argument("--sm-clock-hertz", type=_clock, default=None, help="a number or max")
    parser.add_argument("--temperature-celsius", type=float, default=None, help="of the die")
    parser.add_argument("--power-cap-watts", type=float, default=None, help="of each GPU")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--sweep", metavar="NAME=1..512", help="print a table")
    parser.add_argument("--plot", type=Path, metavar="FILE.html", help="draw the sweep")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Raises:
        ConfigError: a wrong argument or an impossible step.
    """
    arguments = build_parser().parse_args(argv)
    question = StepSpec(
        **{field.name: getattr(arguments, field.name) for field in dataclasses.fields(StepSpec)}
    )
    if arguments.plot is not None and arguments.sweep is None:
        raise ConfigError("--plot draws a sweep: give --sweep too")
    if arguments.plot is not None:
        check_output(arguments.plot, "--plot", ".html")
        check_package("plotly", "--plot")
    if arguments.sweep is None:
        _print_one(answer(question), as_json=arguments.json)
        return 0
    name, values = sweep_values(arguments.sweep)
    values, answers = _answer_all(question, name, values)
    if arguments.json:
        print(json.dumps([one.as_dict() for one in answers], indent=2))
    else:
        _print_table(name, values, answers)
    if arguments.plot is not None:
        _plot(arguments.plot, name, values, answers)
    return 0


def _answer_all(
    question: StepSpec, name: str, values: Sequence[float]
) -> tuple[list[float], list[StepAnswer]]:
    """The values that are possible, with their answers; the others are said on stderr."""
    possible: list[float] = []
    answers: list[StepAnswer] = []
    refused: list[tuple[float, ConfigError]] = []
    for value in values:
        try:
            answers.append(answer(with_value(question, name, value)))
            possible.append(value)
        except ConfigError as error:
            refused.append((value, error))
    if not answers:
        raise refused[0][1]
    for value, why in refused:
        print(f"left out: {name}={value:.10g}: {why}", file=sys.stderr)
    return possible, answers


def _print_one(one: StepAnswer, *, as_json: bool) -> None:
    found = one.as_dict()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    print(f"{found['model']} on {one.gpu_count} x {found['gpu']}, bound by {one.bound_by}")
    print(
        f"  {found['parameters'] / 1e9:.2f} G parameters, {found['bytes_per_weight']:.3g} bytes "
        f"a weight, {found['kv_bytes_per_token'] / 1024:.4g} KiB of KV cache a token"
    )
    print(
        f"  {found['seconds'] * 1e3:.2f} ms  {found['joules']:.2f} J  "
        f"{found['watts_per_gpu']:.0f} W per GPU at {one.sm_clock_hertz / 1e6:.0f} MHz  "
        f"{found['tokens_per_second']:.0f} tokens/s  {found['tokens_per_joule']:.2f} tokens/J"
    )
    for name, term in found["terms"].items():
        print(
            f"  {name:<16} {term['seconds'] * 1e3:8.2f} ms {term['seconds_share']:6.1%}"
            f" {term['joules']:9.2f} J {term['joules_share']:6.1%}"
        )


def _print_table(name: str, values: Sequence[float], answers: Sequence[StepAnswer]) -> None:
    print(f"{name:>16} {'ms':>9} {'J':>9} {'W/GPU':>7} {'tokens/s':>10} {'tokens/J':>9}  bound by")
    for value, one in zip(values, answers, strict=True):
        found = one.as_dict()
        print(
            f"{value:>16.10g} {found['seconds'] * 1e3:>9.2f} {found['joules']:>9.2f} "
            f"{found['watts_per_gpu']:>7.0f} {found['tokens_per_second']:>10.0f} "
            f"{found['tokens_per_joule']:>9.2f}  {one.bound_by}"
        )


def _plot(path: Path, name: str, values: Sequence[float], answers: Sequence[StepAnswer]) -> None:
    from plotly import graph_objects, subplots

    found = [one.as_dict() for one in answers]
    figure = subplots.make_subplots(rows=1, cols=3)
    for column, (key, label) in enumerate(
        (
            ("seconds", "seconds"),
            ("watts_per_gpu", "watts per GPU"),
            ("tokens_per_joule", "tokens/J"),
        ),
        start=1,
    ):
        line = graph_objects.Scatter(x=list(values), y=[one[key] for one in found], name=label)
        figure.add_trace(line, row=1, col=column)
        figure.update_xaxes(title_text=name, row=1, col=column)
        figure.update_yaxes(title_text=label, rangemode="tozero", row=1, col=column)
    first = answers[0].question
    figure.update_layout(title=f"{first.model} on {first.gpu}", showlegend=False)
    try:
        figure.write_html(path, include_plotlyjs=True)
    except OSError as error:
        raise ConfigError(f"--plot {path}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
