"""Runs vLLM's EngineCore over the emulated executor and prints what each request got.

A process of its own: vLLM picks its platform once per process. Usage:
`engine_run.py '{"max_num_batched_tokens": 64, ...}'`; the keys are EngineArgs', and
`blocks` cuts the KV cache so that requests are preempted.
"""

import json
import os
import random
import sys

os.environ["SHAPER_EMULATE"] = "h200-sxm"
os.environ["SHAPER_EMULATE_TIME_SCALE"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"


def requests_of(seed: int) -> list[tuple[list[int], int]]:
    generator = random.Random(seed)
    return [
        (
            [generator.randrange(256) for _ in range(generator.randint(1, 300))],
            generator.randint(1, 60),
        )
        for _ in range(40)
    ]


def main() -> None:
    settings = json.loads(sys.argv[1])
    blocks = settings.pop("blocks", None)
    model = settings.pop("model", "llama-3.1-8b")
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.request import Request

    from shaper.emulator.executor import EmulatedExecutor, emulated_reader
    from shaper.emulator.models import model_directory

    arguments = {"max_model_len": 512, "max_num_batched_tokens": 8192, "max_num_seqs": 64}
    arguments |= {"async_scheduling": True} | settings
    config = EngineArgs(
        model=str(model_directory(model)),
        distributed_executor_backend=EmulatedExecutor,
        load_format="dummy",
        num_gpu_blocks_override=blocks,
        **arguments,
    ).create_engine_config()
    core = EngineCore(config, EmulatedExecutor, log_stats=False)
    reader = emulated_reader(core.vllm_config)
    assert reader is not None
    for index, (prompt, length) in enumerate(requests_of(1)):
        core.add_request(
            Request(
                request_id=f"r{index}",
                prompt_token_ids=prompt,
                sampling_params=SamplingParams(max_tokens=length, ignore_eos=True),
                pooling_params=None,
                block_hasher=core.request_block_hasher,
            )
        )
    requests = dict(core.scheduler.requests)
    tokens: dict[str, list[int]] = {name: [] for name in requests}
    steps = 0
    while core.scheduler.has_requests() or core.batch_queue:
        outputs, executed = core.step_fn()
        core.post_step(executed)
        steps += 1
        assert steps < 100_000
        for batch in (outputs or {}).values():
            for output in batch.outputs:
                tokens[output.request_id].extend(output.new_token_ids)
    manager = core.scheduler.kv_cache_manager
    found = {
        "tokens": tokens,
        "wanted": {f"r{i}": length for i, (_, length) in enumerate(requests_of(1))},
        "steps": steps,
        "preemptions": sum(request.num_preemptions for request in requests.values()),
        "kv_usage": manager.usage,
        "tracked": len(core.model_executor._tracker),
        "gpus": [gpu.name for gpu in reader.gpus],
        "kv_groups": len(core.scheduler.kv_cache_config.kv_cache_groups),
    }
    print(json.dumps(found))
    core.shutdown()


if __name__ == "__main__":
    main()
