"""The published measurements in `../shared/data`, as this project reads them.

The repository carries none of these files: the serving power of ML.ENERGY v3, kernel
times of aiconfigurator, and the recording of an A100's meter (Yang et al., SC 2024).
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shaper.core.model.profile import GpuProfile
from shaper.core.model.work import WorkCoefficients
from shaper.emulator.shapes import known_models, load_shape
from shaper.errors import TraceError

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
PROFILE_OF = {
    "A100": "a100-sxm-80gb",
    "B200": "b200-sxm",
    "H100": "h100-sxm",
    "H200": "h200-sxm",
    "L40S": "l40s",
}
KERNEL_FILES = {"h100-sxm": "h100_sxm", "h200-sxm": "h200_sxm"}
_SHAPE_OF = {
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "meta-llama/Llama-3.1-70B-Instruct": "llama-3.1-70b",
    "Qwen/Qwen3-8B": "qwen3-8b",
    "Qwen/Qwen3-14B": "qwen3-14b",
    "Qwen/Qwen3-32B": "qwen3-32b",
    "google/gemma-3-27b-it": "gemma-3-27b",
    "Qwen/Qwen3-30B-A3B-Instruct-2507": "qwen3-30b-a3b",
}

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ServingRow:
    """One steady-state measurement of a model on one kind of GPU."""

    gpu: str
    """Name of a profile."""
    model: str
    """Built-in shape, or a config directory."""
    task: str
    gpu_count: int
    tensor_parallel: int
    requests: float
    output_tokens: float
    median_itl_seconds: float
    p90_itl_seconds: float
    output_tokens_per_second: float
    watts_per_gpu: float

    @property
    def engines(self) -> int:
        """Data-parallel engines; the experts of a mixture are spread over them."""
        return max(1, self.gpu_count // self.tensor_parallel)

    @property
    def mean_itl_seconds(self) -> float:
        """Requests over throughput: what a token takes on average."""
        return self.requests / self.output_tokens_per_second

    def coefficients(self) -> WorkCoefficients:
        """The work of one GPU of this row."""
        shape = load_shape(self.model)
        spread = self.engines if shape.experts else 1
        return WorkCoefficients.from_shape(shape, self.tensor_parallel, expert_parallel=spread)


@dataclass(frozen=True, slots=True)
class MeterRecording:
    """An A100 stepped between idle and load. Times are seconds since the external meter's
    start; watts are the external meter's and the driver's."""

    external_seconds: FloatArray
    external_watts: FloatArray
    driver_seconds: FloatArray
    driver_watts: FloatArray
    driver_celsius: FloatArray
    driver_clock_hertz: FloatArray


def require(path: Path) -> Path:
    """The path, if it is there.

    Raises:
        TraceError: it is not; the message says what is missing.
    """
    if not path.exists():
        raise TraceError(
            f"{path} is missing: the published measurements are not part of the repository; "
            "see docs/fidelity.md for where they come from, and --data for another folder"
        )
    return path


def serving_rows(
    data: Path = DATA, model_configs: Mapping[str, str] | None = None
) -> tuple[list[ServingRow], list[str]]:
    """The rows of the serving-power file, and what was left out.

    A model without a built-in shape needs a directory with its `config.json` in
    `model_configs`, by Hugging Face id; GPUs without a profile and weights that are not
    bfloat16 are left out.

    Raises:
        TraceError: the file is missing or a line is broken; the message says which.
    """
    path = require(data / "power" / "mlenergy_v3_serving_power.csv")
    shapes = {**_SHAPE_OF, **(model_configs or {})}
    rows: list[ServingRow] = []
    left_out: list[str] = []
    with path.open(newline="") as file:
        for number, line in enumerate(csv.DictReader(file), start=2):
            try:
                what = f"{line['model_id']} on {line['gpu_model']}, {line['weight_precision']}"
                if (
                    line["model_id"] not in shapes
                    or line["gpu_model"] not in PROFILE_OF
                    or line["weight_precision"] != "bfloat16"
                ):
                    left_out.append(what)
                else:
                    rows.append(_serving_row(line, shapes[line["model_id"]]))
            except (KeyError, TypeError, ValueError) as error:
                raise TraceError(f"{path.name}, line {number}: {error!r}") from error
    return rows, sorted(set(left_out))


def _serving_row(line: dict[str, str], shape: str) -> ServingRow:
    return ServingRow(
        gpu=PROFILE_OF[line["gpu_model"]],
        model=shape,
        task=line["task"],
        gpu_count=int(line["num_gpus"]),
        tensor_parallel=int(line["tensor_parallel"]),
        requests=float(line["avg_batch_size"]),
        output_tokens=float(line["avg_output_len"]),
        median_itl_seconds=float(line["median_itl_ms"]) / 1e3,
        p90_itl_seconds=float(line["p90_itl_ms"]) / 1e3,
        output_tokens_per_second=float(line["output_throughput_tokens_per_sec"]),
        watts_per_gpu=float(line["power_per_gpu_w"]),
    )


@dataclass(frozen=True, slots=True)
class KernelTimes:
    """Measured kernels of one GPU: what was run, and seconds. One entry per kernel.

    GEMM columns: rows, outputs, inputs. Attention columns: requests, keys of each,
    query heads, KV heads.
    """

    columns: FloatArray
    seconds: FloatArray


def _heads() -> set[tuple[int, int]]:
    return {
        (shape.attention_heads // tp, shape.kv_heads // tp)
        for shape in map(load_shape, known_models())
        for tp in (1, 2, 4, 8)
        if shape.attention_heads % tp == 0 and shape.kv_heads % tp == 0
    }


def _matrices() -> Iterator[tuple[int, int]]:
    for shape in map(load_shape, known_models()):
        for tp in (1, 2, 4, 8):
            if shape.attention_heads % tp == 0 and shape.kv_heads % tp == 0:
                for gemm in WorkCoefficients.from_shape(shape, tp).gemms:
                    yield gemm.outputs, gemm.inputs


def kernel_times(profile: GpuProfile, kind: str, data: Path = DATA) -> KernelTimes:
    """Kernels of the shapes that the built-in models use, at TP 1 to 8, in bfloat16.

    Where a matrix was not measured, the nearest one stands for it (within a factor of
    1.65 in outputs times inputs). `kind` is `gemm`, `decode` or `prefill`.

    Raises:
        TraceError: there are no measurements of this GPU or of this kind.
    """
    import pandas as pd

    stem = KERNEL_FILES.get(profile.name)
    part = {
        "gemm": "gemm",
        "decode": "generation_attention",
        "prefill": "context_attention",
    }.get(kind)
    if stem is None or part is None:
        raise TraceError(f"no {kind} kernel times of {profile.name}")
    path = require(data / "kernels" / f"{stem}__vllm__0.24.0__{part}_perf.parquet")
    table = pd.read_parquet(path)
    if kind == "gemm":
        table = table[table.gemm_dtype == "bfloat16"]
        used = _nearest(table[["n", "k"]].drop_duplicates().to_numpy(dtype=np.float64))
        keep = [(int(n), int(k)) in used for n, k in zip(table.n, table.k, strict=True)]
        table = table[keep]
        table = table[(table.m <= 8192) & (table.n >= 512) & (table.k >= 512)]
        columns = table[["m", "n", "k"]]
    else:
        table = table[(table.kv_cache_dtype == "bfloat16") & (table.head_dim == 128)]
        heads = _heads()
        pairs = zip(table.num_heads, table.num_key_value_heads, strict=True)
        table = table[[(int(q), int(kv)) in heads for q, kv in pairs]]
        table = table[table.window_size == 0]
        if kind == "decode":
            table = table[table.step <= 32768].assign(isl=lambda rows: rows.step + 1)
        else:
            table = table[(table.isl >= 16) & (table.isl * table.batch_size <= 32768)]
        columns = table[["batch_size", "isl", "num_heads", "num_key_value_heads"]]
    return KernelTimes(
        columns.to_numpy(dtype=np.float64), table.latency.to_numpy(dtype=np.float64) * 1e-3
    )


def _nearest(grid: FloatArray) -> set[tuple[int, int]]:
    used = set()
    for outputs, inputs in set(_matrices()):
        distance = np.abs(np.log(grid[:, 0] / outputs)) + np.abs(np.log(grid[:, 1] / inputs))
        best = int(distance.argmin())
        if distance[best] < 0.5:
            used.add((int(grid[best, 0]), int(grid[best, 1])))
    return used


def meter_recording(data: Path = DATA) -> MeterRecording:
    """The A100 recording: external meter and driver on one time axis.

    The external meter (ElmorLabs PMD) gives 16-bit words: a counter of 2.953 MHz, then
    voltage and current of four rails, 12 bits in the upper part of each word. Single
    samples that its USB link spoilt are removed by a median of 21.

    Raises:
        TraceError: a file of the recording is missing.
    """
    import pandas as pd
    from scipy.ndimage import median_filter

    folder = data / "meter" / "a100_transient"
    raw = np.frombuffer(require(folder / "PMD_data.bin").read_bytes(), "<u2").reshape(-1, 9)
    ticks = np.diff(raw[:, 0].astype(np.int64)) % 65536
    seconds = np.concatenate([[0], np.cumsum(ticks)]) / 2.953e6
    volts = (raw[:, 1::2] >> 4) * 0.007568
    amperes = (raw[:, 2::2] >> 4) * 0.0488
    watts = median_filter((volts * amperes).sum(axis=1), size=21)
    start = int(require(folder / "PMD_start_ts.txt").read_text()) / 1e6
    table = pd.read_csv(require(folder / "gpudata.csv"), skipinitialspace=True)
    # The driver's log is in local time, an hour ahead of the meter's UTC.
    stamps = pd.to_datetime(table["timestamp"]) - pd.Timedelta(hours=1)
    since = (stamps - pd.Timestamp(start, unit="s")).dt.total_seconds()
    return MeterRecording(
        external_seconds=seconds,
        external_watts=np.asarray(watts, dtype=np.float64),
        driver_seconds=np.asarray(since, dtype=np.float64),
        driver_watts=table["power.draw.instant [W]"].to_numpy(dtype=np.float64),
        driver_celsius=table["temperature.gpu"].to_numpy(dtype=np.float64),
        driver_clock_hertz=table["clocks.current.sm [MHz]"].to_numpy(dtype=np.float64) * 1e6,
    )
