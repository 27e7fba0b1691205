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
        from shaper.core.types import UNLIMITED, Reason

        options = self.options(view.load)
        if not options or self.random.random() < 0.1:
            return Plan(UNLIMITED, Reason.UNCONSTRAINED)
        # Every other time the one that fired least: some can be pulled at few steps only.
        rarest = self.random.random() < 0.5
        lever = min(options, key=self.fired.get) if rarest else self.random.choice(list(options))  # type: ignore[arg-type]
        self.fired[lever] += 1
        return Plan(options[lever], Reason.UNCONSTRAINED)

    def options(self, load):
        """The levers that would bite now, each with limits drawn at random."""
        from shaper.core.types import StepLimits

        draw = self.random.randint
        wanted, decodes = load.batch().prefill_tokens, load.decode_requests
        everyone = load.running_requests + load.waiting_requests
        found = {}
        if wanted or decodes:
            found["pause"] = StepLimits(run=False)
        if wanted > 1:
            found["chunk"] = StepLimits(prefill_tokens=draw(1, min(24, wanted - 1)))
        if wanted and decodes:
            found["no_prefill"] = StepLimits(prefill_tokens=0)
        if decodes > 1:
            found["hold"] = StepLimits(decode_requests=draw(1, decodes - 1))
        if load.waiting_requests and everyone > 1:
            found["running"] = StepLimits(running_requests=draw(1, everyone - 1))
        if "chunk" in found and "hold" in found:
            found["together"] = StepLimits(
                prefill_tokens=found["chunk"].prefill_tokens,
                decode_requests=found["hold"].decode_requests,
                running_requests=draw(1, everyone),
            )
        return found


def main() -> None:
    mode, directory = sys.argv[1:3]
    if not os.path.exists(os.path.join(directory, "config.json")):
        make_model(directory)
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    arguments = {}
    policies: list[RandomLevers] = []
    if mode == "shaped":
        from shaper.engine import build

        def policy() -> RandomLevers:
            policies.append(RandomLevers())
            return policies[-1]

        build.POLICIES["predictive"] = policy  # type: ignore[attr-defined]
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
