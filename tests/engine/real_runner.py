"""Runs the real CPU model runner on a tiny Llama, plain or with random levers; prints JSON.

A program of its own, because vLLM picks its platform once per process. Used by
`test_real_tokens.py`:  python real_runner.py plain|shaped MODEL_DIRECTORY
"""

from __future__ import annotations

import json
import os
import random
import sys

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_USE_V2_MODEL_RUNNER="0",
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
)

VOCABULARY, PROMPTS = 512, 40


def make_model(directory: str) -> None:
    """A Llama of two layers, with weights spread enough that tokens depend on the context."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=1024,
        initializer_range=0.35,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(directory)


LEVERS = ("pause", "chunk", "no_prefill", "hold", "running", "together")


class RandomLevers:
    """A policy that pulls each lever at random, and counts what really bit.

    `hold` leaves some decodes out, which take turns; `running` stops entries; `together`
    is a chunk beside held decodes and stopped entries.
    """

    def __init__(self) -> None:
        self.random = random.Random(1)
        self.fired = dict.fromkeys(LEVERS, 0)

    def plan(self, view):
        from shaper.core.policy import Plan
        from shaper.core.types import UNLIMITED, Reason, StepLimits

        load, choice = view.load, self.random.random()
        limits, lever = UNLIMITED, None
        wanted, decodes = load.batch().prefill_tokens, load.decode_requests
        everyone = load.running_requests + load.waiting_requests
        if choice < 0.15 and (decodes or wanted):
            limits, lever = StepLimits(run=False), "pause"
        elif choice < 0.4 and wanted > 1:
            tokens = self.random.randint(1, min(24, wanted - 1))
            limits, lever = StepLimits(prefill_tokens=tokens), "chunk"
        elif choice < 0.55 and wanted and decodes:
            limits, lever = StepLimits(prefill_tokens=0), "no_prefill"
        elif choice < 0.7 and load.waiting_requests and everyone > 1:
            cap = self.random.randint(1, everyone - 1)
            limits, lever = StepLimits(running_requests=cap), "running"
        elif choice < 0.8 and wanted > 1 and decodes > 1:
            limits = StepLimits(
                prefill_tokens=self.random.randint(1, min(24, wanted - 1)),
                decode_requests=self.random.randint(1, decodes - 1),
                running_requests=self.random.randint(1, everyone),
            )
            lever = "together"
        elif choice < 0.95 and decodes > 1:
            cap = self.random.randint(1, decodes - 1)
            limits, lever = StepLimits(decode_requests=cap), "hold"
        if lever:
            self.fired[lever] += 1
        return Plan(limits, Reason.UNCONSTRAINED)


def main() -> None:
    mode, directory = sys.argv[1:3]
    if not os.path.exists(os.path.join(directory, "config.json")):
        make_model(directory)
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    arguments = {}
    policies: list[RandomLevers] = []
    if mode == "shaped":
        from shaper.engine import startup

        def policy() -> RandomLevers:
            policies.append(RandomLevers())
            return policies[-1]

        startup.POLICIES["predictive"] = lambda config: policy()
        settings = {
            "limits": [{"watts": 500, "window_seconds": 1.0}],
            "sensor": "none",
            "gpu_profile": "h200-sxm",
        }
        arguments = {
            "scheduler_cls": "shaper.PowerScheduler",
            "additional_config": {"power_shaper": settings},
        }
    llm = LLM(
        directory,
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_num_seqs=16,
        max_num_batched_tokens=128,
        disable_log_stats=True,
        **arguments,
    )
    rng = random.Random(7)
    prompts = [
        TokensPrompt(
            prompt_token_ids=[rng.randrange(VOCABULARY) for _ in range(rng.randint(3, 300))]
        )
        for _ in range(PROMPTS)
    ]
    sampling = [
        SamplingParams(
            temperature=0.0, max_tokens=rng.randint(8, 60), ignore_eos=True, detokenize=False
        )
        for _ in prompts
    ]
    answers = llm.generate(prompts, sampling, use_tqdm=False)
    shaper = getattr(llm.llm_engine.engine_core.engine_core.scheduler, "shaper", None)
    result = {
        "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
        "fired": policies[-1].fired if policies else {},
        "controllers": len(policies),
        "errors": shaper.counters.errors if shaper else 0,
    }
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
