"""Drives vLLM's real CPU model runner through `EngineRunner` and prints its steps as JSON.

A program of its own, because vLLM picks its platform once per process. Usage:
`tests.studies.real_steps MODEL_DIRECTORY`.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_USE_V2_MODEL_RUNNER="0",
)


class NoMeter:
    gpus = ()

    def read(self):
        return ()

    def close(self):
        pass


def main() -> None:
    from bench.studies.gpu.engine import EngineRunner, EngineSettings

    settings = EngineSettings(
        model=sys.argv[1], max_model_len=2048, max_num_seqs=16, enforce_eager=True
    )
    runner = EngineRunner(settings, NoMeter())
    found: dict[str, Any] = {}

    def steps(name):
        runner.drain()
        found[name] = [step.batch._asdict() for step in runner.take_steps()]

    runner.start_decodes(4, 100)
    runner.take_steps()
    for _ in range(5):
        runner.step()
        runner.drain()
    steps("decodes")
    runner.start_chunks(256, 128, 6)
    runner.take_steps()
    while runner.step():
        pass
    steps("chunks")
    runner.start_decodes(2, 50)
    runner.clear()
    found["left"] = runner.step()
    runner.close()
    runner.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
