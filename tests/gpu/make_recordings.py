"""Write tests/gpu/data/*.csv: what the meters of emulated GPUs show under a load that moves.

python -m tests.gpu.make_recordings
"""

from __future__ import annotations

import csv
import random
from dataclasses import asdict, fields
from pathlib import Path

from shaper.core.model.power_model import StepModel
from shaper.core.model.work import WorkCoefficients
from shaper.core.types import GpuSample, StepBatch
from shaper.emulator.shapes import load_shape
from shaper.emulator.silicon import EmulatedGpus
from shaper.gpu.profiles import load_profile

DATA = Path(__file__).parent / "data"
TICK_SECONDS = 0.02
RECORDINGS = (
    # Name, profile, seconds, columns that this GPU does not report.
    ("h200_load.csv", "h200-sxm", 9.0, ()),
    ("a100_load.csv", "a100-sxm-80gb", 3.0, ("average_watts",)),
)


def batch(chance: random.Random) -> StepBatch:
    """A decode of some requests, and now and then a prompt."""
    requests = chance.randint(8, 128)
    step = StepBatch(requests, requests, requests * 800)
    if chance.random() < 0.4:
        tokens = chance.randint(256, 4096)
        step = StepBatch(
            requests, requests, requests * 800, 1, tokens, tokens, tokens**2, tokens**2
        )
    return step


def record(name: str, profile_name: str, seconds: float, absent: tuple[str, ...]) -> None:
    """Two seconds of work, one of rest, and so on."""
    profile = load_profile(profile_name)
    model = StepModel(profile, WorkCoefficients.from_shape(load_shape("llama-3.1-8b"), 1))
    gpus = EmulatedGpus(profile, model, start_seconds=0.0)
    chance = random.Random(3)
    names = [field.name for field in fields(GpuSample)]
    free = 0.0
    with (DATA / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for tick in range(round(seconds / TICK_SECONDS)):
            now = tick * TICK_SECONDS
            while now % 3.0 < 2.0 and free <= now:
                free = gpus.launch(batch(chance), max(now, free)).end_seconds
            for sample in gpus.sample(now):
                row = asdict(sample) | {"clock_event_reasons": int(sample.clock_event_reasons)}
                known = {k: v for k, v in row.items() if v is not None and k not in absent}
                writer.writerow({k: round(v, 3) for k, v in known.items()})


if __name__ == "__main__":
    for one in RECORDINGS:
        record(*one)
