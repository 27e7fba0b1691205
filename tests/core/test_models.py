"""Model directories: described right, or refused with the key that is not understood.

`model_configs.json` holds `config.json` files as public repositories carry them, with
published parameter counts, KV KiB a token at bf16 of the layers that cache the whole
context, and bytes a weight in the quantised matrices (MODELS: counted by hand).
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shaper.core.model.model_keys import KNOWN_TYPES
from shaper.core.model.shape import ModelShape
from shaper.core.model.work import WorkCoefficients
from shaper.emulator.shapes import load_model_config, load_shape
from shaper.errors import UnknownModelError

CASES: dict[str, Any] = json.loads(Path(__file__).with_name("model_configs.json").read_text())
# Needs transformers, for what the file leaves out.
SHORT = "gemma-3-4b-it"
LLAMA = load_model_config("llama-3.1-8b")


def directory(path: Path, config: Any, beside: Any = None) -> str:
    (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if beside is not None:
        (path / "hf_quant_config.json").write_text(json.dumps(beside))
    return str(path)


@pytest.mark.parametrize("name", [name for name in CASES if "refused" not in CASES[name]])
def test_a_directory_is_described_right(tmp_path: Path, name: str) -> None:
    """Parameters and KV bytes a token within 1%, bytes a weight within 5%."""
    if name == SHORT:
        pytest.importorskip("transformers")
    case = CASES[name]
    shape = load_shape(directory(tmp_path, case["config"], case.get("hf_quant_config")))
    if "parameters_billions" in case:
        assert shape.parameters / 1e9 == pytest.approx(case["parameters_billions"], rel=0.01)
    if "kv_kibibytes_per_token" in case:
        coefficients = WorkCoefficients.from_shape(shape)
        kibibytes = coefficients.kv_bytes_per_token_full / 1024
        assert kibibytes == pytest.approx(case["kv_kibibytes_per_token"], rel=0.01)
        assert shape.kv_bytes_per_token_full / 1024 == pytest.approx(kibibytes)
    if "bytes_per_weight" in case:
        assert shape.weight_bytes_per_value == pytest.approx(case["bytes_per_weight"], rel=0.05)


@pytest.mark.parametrize("name", [name for name in CASES if "refused" in CASES[name]])
def test_a_directory_is_refused_with_the_key(tmp_path: Path, name: str) -> None:
    """What is not modelled is named by the key of the config that says so."""
    with pytest.raises(UnknownModelError, match=f"config key '{CASES[name]['refused']}'"):
        load_shape(directory(tmp_path, CASES[name]["config"]))


@pytest.mark.parametrize(
    "key",
    [
        *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"),
        *("head_dim", "intermediate_size", "vocab_size", "max_position_embeddings"),
        *("tie_word_embeddings", "torch_dtype", "model_type"),
    ],
)
@pytest.mark.parametrize("value", ["32", -1, 0.5, [32], {"a": 1}, 10**400, True], ids=str)
def test_a_value_that_is_no_size_names_its_key(tmp_path: Path, key: str, value: Any) -> None:
    """Strings for numbers, lists, fractions: one line that names the key."""
    if key == "tie_word_embeddings" and value is True:
        return
    with pytest.raises(UnknownModelError, match=key) as caught:
        load_shape(directory(tmp_path, {**LLAMA, key: value}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "null", "3", "{}", '{"model_type": 3}', "[" * 100_000],
    ids=range(8),
)
def test_a_file_that_is_no_config_is_one_line(tmp_path: Path, text: str) -> None:
    """Broken JSON, an empty file, a list, nothing but a number: never a traceback."""
    with pytest.raises(UnknownModelError) as caught:
        load_shape(directory(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_broken_file_of_quantisation_is_named(tmp_path: Path) -> None:
    """`hf_quant_config.json` is read, and named when it can't be."""
    path = directory(tmp_path, LLAMA)
    (tmp_path / "hf_quant_config.json").write_text("[1]")
    with pytest.raises(UnknownModelError, match="hf_quant_config"):
        load_shape(path)


@pytest.mark.parametrize(
    "key",
    [
        *("num_kv_shared_layers", "n_head", "num_moe_experts", "local_attention_window"),
        *("mamba_d_state", "index_topk", "cross_attention_layers", "layer_block_type"),
        *("num_global_key_value_heads", "dual_chunk_attention_config", "hc_mult"),
    ],
)
def test_a_spelling_that_is_not_known_is_named(key: str) -> None:
    """A key that may change the work is an error, never "no experts"; off, it says nothing."""
    with pytest.raises(ValueError, match=f"config key '{key}'"):
        ModelShape.from_hf_config({**LLAMA, key: 4})
    assert ModelShape.from_hf_config({**LLAMA, key: None}).layers == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["full_attention"] * 31}, "layer_types"),
        ({"layer_types": ["linear_attention"] * 32}, "linear_attention"),
        (
            {"model_type": "gemma3_text", "layer_types": ["sliding_attention"] * 32},
            "sliding_window",
        ),
        ({"num_experts": 8}, "num_experts_per_tok"),
        ({"num_experts": 8, "num_local_experts": 9}, "contradict"),
        ({"num_key_value_heads": 5}, "num_key_value_heads"),
        ({"sliding_window": 128, "model_type": "granite"}, "layer_types"),
    ],
)
def test_keys_that_do_not_fit_each_other_are_named(change: dict[str, Any], message: str) -> None:
    """Half of a description is no description."""
    with pytest.raises(ValueError, match=message):
        ModelShape.from_hf_config({**LLAMA, **change})


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 10**12),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.one_of(st.integers(0, 2), st.text(max_size=2)), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@given(data=st.data(), name=st.sampled_from(sorted(CASES)))
def test_junk_is_refused_and_never_raises_anything_else(data: st.DataObject, name: str) -> None:
    """Any value at any key gives a shape or a ValueError."""
    config = copy.deepcopy(CASES[name]["config"])
    parts = [config, *(x for x in config.values() if isinstance(x, dict) and x)]
    for _ in range(data.draw(st.integers(1, 3))):
        part = data.draw(st.sampled_from(parts))
        part[data.draw(st.sampled_from(sorted(part)))] = data.draw(JUNK)
    try:
        shape = ModelShape.from_hf_config(config)
    except ValueError:
        return
    assert shape.parameters > 0
    assert shape.weight_bytes > 0


LINEAR = {"targets": ["Linear"]}
SCHEMES: list[tuple[str, dict[str, Any], float]] = [
    ("awq", {"quant_method": "awq", "bits": 4, "group_size": 128}, 0.5 + 2.5 / 128),
    ("gptq of 8 bits", {"quant_method": "gptq", "bits": 8, "group_size": -1}, 1.0),
    ("gptq g32", {"quant_method": "gptq", "bits": 4, "group_size": 32}, 0.5 + 2.5 / 32),
    ("auto-round", {"quant_method": "auto-round", "bits": 2, "group_size": 64}, 0.25 + 2.25 / 64),
    ("fp8", {"quant_method": "fp8", "activation_scheme": "static"}, 1.0),
    ("bitsandbytes of 8 bits", {"quant_method": "bitsandbytes", "load_in_8bit": True}, 1.0),
    (
        "bitsandbytes twice",
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
        0.5 + 1 / 64,
    ),
    ("modelopt", {"quant_method": "modelopt", "quant_algo": "FP8"}, 1.0),
    ("modelopt MXFP8", {"quant_method": "modelopt", "quant_algo": "MXFP8"}, 1 + 1 / 32),
    (
        "compressed int4 g128",
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "a": {**LINEAR, "weights": {"num_bits": 4, "type": "int", "group_size": 128}}
            },
        },
        0.5 + 2 / 128,
    ),
    (
        "compressed nvfp4",
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "a": {**LINEAR, "weights": {"num_bits": 4, "type": "float", "group_size": 16}}
            },
        },
        0.5625,
    ),
]


@pytest.mark.parametrize(("config", "width"), [row[1:] for row in SCHEMES], ids=lambda x: None)
def test_bytes_a_weight_by_scheme(config: dict[str, Any], width: float) -> None:
    """Every decoder matrix in the format's bytes, scales included; the unembedding in 16 bits."""
    weights = ModelShape.from_hf_config({**LLAMA, "quantization_config": config}).weights
    assert weights.quantised == pytest.approx(width)
    assert [weights.attention, weights.output, weights.gate_up, weights.down] == [
        pytest.approx(width)
    ] * 4
    assert weights.head == 2.0


@pytest.mark.parametrize(
    ("pattern", "attention", "down"),
    [
        ("model.layers.0.mlp.down_proj", 1.0, 1.0 + 1 / 32),
        ("self_attn", 2.0, 1.0),
        ("model.layers.*.self_attn", 2.0, 1.0),
        ("re:.*self_attn.*", 2.0, 1.0),
        ("*.mlp.down_proj", 1.0, 2.0),
        ("language_model.model.layers.0.self_attn.qkv_proj", 1.0 + 1 / 32, 1.0),
        ("vision_tower.layers.0.self_attn.q_proj", 1.0, 1.0),
        ("model.layers.40.mlp.down_proj", 1.0, 1.0),
        ("model.layers.3.input_layernorm", 1.0, 1.0),
    ],
)
def test_modules_left_alone(pattern: str, attention: float, down: float) -> None:
    """Names, patterns and expressions of modules that stay in 16 bits."""
    config = {"quant_method": "fp8", "modules_to_not_convert": ["lm_head", pattern]}
    weights = ModelShape.from_hf_config({**LLAMA, "quantization_config": config}).weights
    assert weights.attention == pytest.approx(attention)
    assert weights.down == pytest.approx(down)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "aqlm"}, "quant_method"),
        ({"quant_method": "modelopt", "quant_algo": "W3"}, "quant_algo"),
        ({"quant_method": "awq"}, "bits"),
        ({"quant_method": "fp8", "modules_to_not_convert": ["layers.1.mixer.in_proj"]}, "in_proj"),
        ({"quant_method": "fp8", "ignore": 3}, "ignore"),
        ({"quant_method": "compressed-tensors"}, "config_groups"),
        ({"quant_method": "bitsandbytes"}, "load_in_4bit"),
        ({"bits": 4}, "quant_method"),
    ],
)
def test_a_format_that_is_not_understood_is_named(config: dict[str, Any], message: str) -> None:
    """Never the bytes of another format."""
    with pytest.raises(ValueError, match=message):
        ModelShape.from_hf_config({**LLAMA, "quantization_config": config})


def test_some_modules_in_another_format() -> None:
    """GPTQModel's `dynamic` and modelopt's mixed precision give bytes by module."""
    gptq = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": -1,
        "dynamic": {r"-:.*\.self_attn\..*": {}, r"+:.*\.down_proj": {"bits": 8}},
    }
    weights = ModelShape.from_hf_config({**LLAMA, "quantization_config": gptq}).weights
    assert (weights.attention, weights.gate_up, weights.down) == (2.0, 0.5, 1.0)
    layers = {f"model.layers.{i}.mlp.up_proj": {"quant_algo": "FP8"} for i in range(32)}
    mixed = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    weights = ModelShape.from_hf_config({**LLAMA, "quantization_config": mixed}).weights
    assert (weights.attention, weights.gate_up) == (2.0, 1.5)


COUNTED = (
    *("llama", "phi3", "gemma3_text", "cohere2", "glm4", "mixtral", "qwen2_moe", "glm4_moe"),
    *("gpt_oss", "minimax_m2", "ernie4_5_moe", "granitemoeshared"),
)


@pytest.mark.parametrize("kind", COUNTED)
def test_parameters_are_those_that_transformers_makes(kind: str) -> None:
    """A small model of the kind, on the meta device, has the counted weights."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    mapping = transformers.CONFIG_MAPPING
    if kind not in mapping:
        pytest.skip("this transformers does not know the kind")
    assert kind in KNOWN_TYPES
    known = mapping[kind]()
    sizes: dict[str, Any] = {
        "num_hidden_layers": 8,
        "hidden_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 512,
        "vocab_size": 1000,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    experts = {
        **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 16),
        **{"moe_num_experts": 16, "num_experts_per_tok": 4, "moe_k": 4, "n_shared_experts": 1},
        **{"shared_expert_intermediate_size": 256, "moe_intermediate_size": 128},
    }
    sizes |= {key: value for key, value in experts.items() if hasattr(known, key)}
    if hasattr(known, "layer_types"):
        sizes["layer_types"] = None
    config = mapping[kind](**sizes)
    shape = ModelShape.from_hf_config(config.to_dict())
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert shape.parameters == pytest.approx(count, rel=0.01)
