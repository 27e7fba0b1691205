"""The report of a comparison: one self-contained HTML page."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from bench.harness.aims import Section as FigureTable
from bench.harness.aims import verdicts
from bench.racks import policies
from bench.racks.outcome import Outcome, Singles, stack_seconds
from bench.racks.plan import Comparison
from bench.racks.rows import TRIED_COLUMNS, Entry, aimed, figures, table
from shaper.report.distributions import distribution
from shaper.report.html import Block, Plot, Section, checks, definitions, paragraph, render
from shaper.report.power import LimitLine
from shaper.report.stacked import StackedPower, stacked_power
from shaper.report.style import COLOURS, base

# The limit at which power and latencies are drawn, if it is there: the first aim's.
_DRAWN_RATIO = 0.70
# Those that the comparison is about are solid and thick, in colours of their own.
_SHARED_COLOURS, _OTHER_COLOURS = COLOURS[:3], COLOURS[3:]
_DASHES = ("dash", "dot")


def table_block(shown: FigureTable) -> Block:
    """A section of figures as an HTML table."""
    head = "".join(
        f'<th scope="col" class=n>{html.escape(column.heading)}</th>' for column in shown.columns
    )
    body = "".join(
        f'<tr><th scope="row">{html.escape(case.name)}</th>'
        + "".join(f"<td class=n>{html.escape(c.text(case))}</td>" for c in shown.columns)
        + "</tr>"
        for case in shown.cases
    )
    return Block(
        f'<div class="scroll"><table aria-label="{html.escape(shown.title)}"><thead><tr>'
        f'<th scope="col">policy</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _drawn(comparison: Comparison) -> list[Entry]:
    """The rows at the limit that is drawn: that nearest to `_DRAWN_RATIO`, the first seed's."""
    seed = min(comparison.references)
    rows = [x for x in comparison.entries if x.seed == seed and not math.isnan(x.limit_ratio)]
    nearest = min((x.limit_ratio for x in rows), key=lambda r: abs(r - _DRAWN_RATIO))
    return [x for x in rows if x.limit_ratio == nearest and x.outcome is not None]


def _stack(name: str, outcome: Outcome) -> StackedPower:
    watts = outcome.arrays.stack.astype(np.float64)
    engines = tuple(f"engine {index}" for index in range(len(watts)))
    return StackedPower(name, engines, stack_seconds(outcome), watts)


def _power(comparison: Comparison, drawn: Sequence[Entry]) -> Plot:
    unshaped = comparison.references[min(comparison.references)].unshaped
    shared = [x for x in drawn if x.policy.startswith(policies.SHARED)]
    runs = [_stack(policies.UNSHAPED, unshaped)]
    runs += [_stack(x.policy, x.outcome) for x in shared if x.outcome is not None]
    limit = drawn[0].limit_watts
    return Plot(
        f"Power by engine, stacked; limit {drawn[0].limit_ratio:.2f}",
        stacked_power(runs, [LimitLine("limit", limit)]),
        "Means of 100 ms of the emulated GPUs' true power. Of each stretch of time the moment "
        f"with the highest sum is drawn; dashed: the limit of {limit:,.0f} W.",
        240 * len(runs),
    )


def _latency(comparison: Comparison, drawn: Sequence[Entry]) -> list[Plot]:
    reference = comparison.references[min(comparison.references)]
    named: list[tuple[str, Outcome]] = [(policies.UNSHAPED, reference.unshaped)]
    kept = (policies.CAP, policies.CLOCK, policies.ALONE)
    named += [
        (x.policy, x.outcome)
        for x in drawn
        if x.outcome is not None and (x.policy.startswith(policies.SHARED) or x.policy in kept)
    ]
    named = named[: len(COLOURS)]
    names = [name for name, _ in named]

    def samples(values: Sequence[Singles]) -> list[np.ndarray]:
        return [1e3 * each[each > 0.0].astype(np.float64) for each in values]

    ttft = samples([x.arrays.ttft_seconds for _, x in named])
    itl = samples([x.arrays.itl_seconds for _, x in named])
    return [
        Plot(
            "TTFT",
            distribution(names, ttft, "time to first token (ms)"),
            height_pixels=460,
            wide=False,
        ),
        Plot(
            "ITL, the tail",
            distribution(names, itl, "between two tokens (ms)", tail=True),
            height_pixels=460,
            wide=False,
        ),
    ]


def _line(policy: str) -> dict[str, Any]:
    """Colour, width and dash of a policy's curve."""
    shared = [name for name in policies.ORDER if name.startswith(policies.SHARED)]
    if policy in shared:
        return {"color": _SHARED_COLOURS[shared.index(policy)], "width": 3}
    others = [name for name in policies.ORDER if name not in shared]
    dash, colour = divmod(others.index(policy), len(_OTHER_COLOURS))
    return {"color": _OTHER_COLOURS[colour], "width": 1.5, "dash": _DASHES[dash]}


def curves(comparison: Comparison, key: str, title: str) -> go.Figure:
    """A figure of each policy over the limit; hollow: the policy does not keep the limit."""
    figure = go.Figure()
    rows = [
        (x, figures(x, comparison.references[x.seed]))
        for x in comparison.entries
        if x.outcome is not None and not math.isnan(x.limit_ratio)
    ]
    for policy in policies.ORDER:
        own = [(x, found) for x, found in rows if x.policy == policy]
        if not own:
            continue
        symbols = ["circle-open" if f["over_metered_share"] > 0.0 else "circle" for _, f in own]
        figure.add_trace(
            go.Scatter(
                x=[x.limit_ratio for x, _ in own],
                y=[found[key] for _, found in own],
                mode="lines+markers",
                name=policy,
                line=_line(policy),
                marker={"size": 9, "symbol": symbols, "line": {"width": 2}},
                hovertemplate="%{x:.2f}: %{y:.3f}",
            )
        )
    base(figure, "limit / unshaped peak", title)
    limits = [x.limit_ratio for x, _ in rows]
    # From the easy limit to the hard one.
    figure.update_xaxes(range=[max(limits) + 0.02, min(limits) - 0.02])
    # A legend of that many names needs a place of its own.
    figure.update_layout(legend={"orientation": "v", "x": 1.02, "y": 1.0, "yanchor": "top"})
    return figure


def _curve_plots(comparison: Comparison) -> list[Plot]:
    note = "Hollow: some window is metered more than 0.5% above the limit."
    ttft = curves(comparison, "ttft_p99_ratio", "p99 TTFT / unshaped")
    ttft.update_yaxes(type="log")
    throughput = curves(comparison, "throughput_ratio", "tokens per second / unshaped")
    return [
        Plot("What a limit costs in p99 TTFT", ttft, note, 460),
        Plot("What a limit costs in throughput", throughput, note, 460),
    ]


def rack_page(
    title: str,
    lead: str,
    comparison: Comparison,
    about: Sequence[tuple[str, str]],
    notes: Sequence[str] = (),
) -> str:
    """The whole page.

    Args:
        title: of the page.
        lead: a sentence or two under it.
        comparison: at least one row with a limit.
        about: what was run, as names and values.
        notes: shown under the setup.
    """
    drawn = _drawn(comparison)
    shown = table("figures", comparison.entries, comparison.references, comparison.columns)
    aims = aimed(comparison.entries, comparison.references)
    parts = [
        Section("Setup", (definitions(list(about)), *(paragraph(x, "note") for x in notes))),
        Section("Figures", (table_block(shown), paragraph(shown.note, "note"))),
    ]
    if aims:
        lines: list[tuple[bool | None, str]] = [
            (v.met, f"{v.section}: {v.figure} {v.aim}; worst {v.worst_text} ({v.case})")
            for section in aims
            for v in verdicts(section)
        ]
        parts.append(Section("Aims", (checks(lines),)))
    if len(comparison.references) == 1:
        parts.append(Section("Cost", tuple(_curve_plots(comparison))))
    if any(x.policy.startswith(policies.SHARED) for x in drawn):
        parts.append(Section("Power", (_power(comparison, drawn),)))
        parts.append(Section("Latency", tuple(_latency(comparison, drawn))))
    if comparison.tried:
        tried = table("tried", comparison.tried, comparison.references, TRIED_COLUMNS)
        parts.append(Section("What the searches tried", (table_block(tried),)))
    return render(title, lead, parts)
