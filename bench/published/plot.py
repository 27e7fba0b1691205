"""Draws the published serving rows beside what the step model says of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from bench.published.rows import ServingRow, serving_rows
from bench.published.serving_fit import predict_rows
from shaper.errors import ConfigError
from shaper.files.outputs import check_package
from shaper.gpu.profiles import load_profile


def plot(data: Path, folder: Path) -> Path:
    """Draws power and latency of every row, predicted beside measured.

    Raises:
        ConfigError: plotly is missing or the folder can't be written.
    """
    check_package("plotly", "--plots")
    from plotly import graph_objects, subplots

    rows, _ = serving_rows(data)
    figure = subplots.make_subplots(rows=2, cols=2, subplot_titles=_titles(rows))
    gpus = sorted({row.gpu for row in rows}, reverse=True)
    groups = sorted({(r.gpu, r.model, r.task, r.gpu_count) for r in rows})
    for number, group in enumerate(groups):
        chosen = [r for r in rows if (r.gpu, r.model, r.task, r.gpu_count) == group]
        points = predict_rows(chosen, load_profile(group[0]))
        label = f"{group[1]} x{group[3]}" + ("" if group[2] == "lm-arena-chat" else f" {group[2]}")
        colour = f"hsl({number * 360 // len(groups)},65%,45%)"
        column = gpus.index(group[0]) + 1
        for line, measured, predicted in (
            (1, [r.watts_per_gpu for r in chosen], [p.watts_per_gpu for p in points]),
            (
                2,
                [r.median_itl_seconds * 1e3 for r in chosen],
                [p.median_itl_seconds * 1e3 for p in points],
            ),
        ):
            sizes = [r.requests for r in chosen]
            for values, mode in ((measured, "markers"), (predicted, "lines")):
                trace = graph_objects.Scatter(
                    x=sizes,
                    y=values,
                    mode=mode,
                    marker={"color": colour},
                    name=label,
                    legendgroup=label,
                    showlegend=line == 1 and mode == "lines",
                )
                figure.add_trace(trace, row=line, col=column)
    figure.update_xaxes(type="log", title_text="requests in the batch")
    figure.update_yaxes(type="log", row=2)
    figure.update_layout(title="Dots: measured. Lines: predicted.", height=900)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "fidelity.html"
        figure.write_html(path, include_plotlyjs=True)
    except OSError as error:
        raise ConfigError(f"--plots {folder}: {error}") from error
    return path


def _titles(rows: Iterable[ServingRow]) -> list[str]:
    gpus = sorted({row.gpu for row in rows}, reverse=True)
    return [f"{gpu}: {what}" for what in ("watts per GPU", "median ITL, ms") for gpu in gpus]
