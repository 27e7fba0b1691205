"""Records an emulated GPU under varied steps, as an engine with `--record` would."""

from __future__ import annotations

import random

from shaper.core.model.power_model import StepModel
from shaper.core.model.profile import GpuProfile
from shaper.core.model.work import WorkCoefficients
from shaper.core.types import GpuSample, StepBatch
from shaper.emulator.silicon import EmulatedGpus
from shaper.recording.format import RecordedStep, Recording

_SAMPLE_SECONDS = 0.05


def varied_batch(draw: random.Random) -> StepBatch:
    """Decodes of any number and context, with or without a prefill chunk, or one alone."""
    requests = draw.choice([1, 4, 8, 16, 32, 64, 128, 200, 256])
    context = min(draw.choice([200, 500, 1000, 2000, 4000]), 330_000 // requests)
    tokens = draw.choice([0, 0, 0, 64, 256, 512, 1024, 2048])
    if draw.random() < 0.25:
        requests, tokens = 0, draw.choice([128, 256, 512, 2048, 4096, 8192])
    return decode_and_prefill(requests, context, tokens)


def decode_and_prefill(requests: int, context: int, tokens: int, returned: int = 0) -> StepBatch:
    """A step of `requests` decodes and one prompt of `tokens`."""
    return StepBatch(
        decode_requests=requests,
        decode_tokens=requests,
        decode_context_tokens=requests * context,
        prefill_requests=int(tokens > 0),
        prefill_tokens=tokens,
        prefill_context_tokens=tokens,
        prefill_token_context_product=tokens * tokens,
        prefill_squared_tokens=tokens * tokens,
        returned_requests=returned,
    )


def record(
    profile: GpuProfile,
    coefficients: WorkCoefficients,
    *,
    seconds: float,
    seed: int = 0,
    noise_ratio: float = 0.01,
    only: StepBatch | None = None,
) -> Recording:
    """Bursts of equal steps, back to back or with gaps, idle time in between.

    With `only`, every step is that one.
    """
    draw = random.Random(seed)
    device = EmulatedGpus(
        profile,
        StepModel(profile, coefficients),
        start_seconds=0.0,
        seed=seed,
        step_noise_ratio=noise_ratio,
        exact_meter=True,
    )
    steps: list[RecordedStep] = []
    samples: list[GpuSample] = []
    now = 0.0
    while now < seconds:
        if draw.random() < 0.12:
            now += draw.uniform(0.5, 2.0)
        batch = only or varied_batch(draw)
        gap = draw.choice([0.0, 0.0, 0.002, 0.01, 0.02])
        for _ in range(draw.randint(20, 60)):
            returned = draw.choice([0, 0, 0, batch.decode_requests // 2])
            step = decode_and_prefill(
                batch.decode_requests,
                batch.decode_context_tokens // max(1, batch.decode_requests),
                batch.prefill_tokens,
                0 if only else returned,
            )
            run = device.launch(step, now)
            while len(samples) * _SAMPLE_SECONDS < run.end_seconds:
                samples.extend(device.sample(len(samples) / profile_gpus(device) * _SAMPLE_SECONDS))
            steps.append(RecordedStep(run.start_seconds, run.end_seconds, step))
            now = run.end_seconds + gap
    meta = {"gpu": profile.name, "tensor_parallel": coefficients.tensor_parallel}
    return Recording(meta, tuple(steps), tuple(samples))


def profile_gpus(device: EmulatedGpus) -> int:
    """GPUs of the device: samples come in groups of that many."""
    return device.gpu_count
