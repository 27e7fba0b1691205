"""Model directories and the byte-level tokenizer."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from shaper.emulator.activate import EMULATE_VARIABLE, PLATFORM_CLASS_PATH, platform_class_path
from shaper.emulator.models import (
    cache_directory,
    has_tokenizer,
    model_directory,
    tokenizer_directory,
)
from shaper.emulator.shapes import known_models, load_model_config
from shaper.emulator.tokenizer import (
    END_TOKEN,
    END_TOKEN_ID,
    SPECIAL_TOKENS,
    VOCABULARY_SIZE,
    byte_characters,
    tokenizer_json,
)
from shaper.errors import UnknownModelError


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_str(tokenizer_json())


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", known_models())
def test_a_built_in_shape_becomes_a_servable_directory(name: str) -> None:
    """Its published config is kept whole, and a tokenizer stands beside it."""
    directory = model_directory(name)
    assert directory.name == name
    assert json.loads((directory / "config.json").read_text()) == load_model_config(name)
    assert has_tokenizer(directory)
    generation = json.loads((directory / "generation_config.json").read_text())
    assert generation["eos_token_id"] == END_TOKEN_ID < load_model_config(name)["vocab_size"]


def test_a_directory_is_written_once(own_cache: Path) -> None:
    """A second call finds what the first one wrote and leaves nothing else behind."""
    first = model_directory("qwen3-8b")
    (first / "config.json").write_text("{}")
    assert model_directory("qwen3-8b") == first
    assert (first / "config.json").read_text() == "{}"
    assert [path.name for path in first.parent.iterdir()] == ["qwen3-8b"]
    assert own_cache in first.parents
    assert cache_directory().is_dir()


def test_many_at_once_write_one_directory() -> None:
    """Whoever comes second uses the first one's directory."""
    with ThreadPoolExecutor(8) as pool:
        directories = set(pool.map(model_directory, ["llama-3.1-8b"] * 16))
    assert len(directories) == 1
    (only,) = directories
    assert [path.name for path in only.parent.iterdir()] == ["llama-3.1-8b"]


def test_a_config_directory_is_served_as_it_is(tmp_path: Path) -> None:
    """A Hugging Face directory of the user's own is not copied."""
    (tmp_path / "config.json").write_text(json.dumps(load_model_config("qwen3-8b")))
    assert model_directory(str(tmp_path)) == tmp_path
    assert not has_tokenizer(tmp_path)
    assert has_tokenizer(tokenizer_directory())


@pytest.mark.parametrize("name", ["llama", "", "/nowhere/at/all", "org/model"])
def test_an_unknown_model_lists_the_known_ones(name: str) -> None:
    """The message says what could have been meant."""
    with pytest.raises(UnknownModelError, match=r"gemma-3-27b.*qwen3-8b"):
        model_directory(name)


def test_a_config_file_is_no_directory(tmp_path: Path) -> None:
    """vLLM needs a directory, and the message says so."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(load_model_config("qwen3-8b")))
    with pytest.raises(UnknownModelError, match="directory"):
        model_directory(str(path))


@given(st.text())
def test_text_survives_encoding_and_decoding(text: str) -> None:
    """Any UTF-8 text comes back unchanged, one token a byte."""
    if any(token in text for token in SPECIAL_TOKENS):
        return
    ids = tokenizer().encode(text).ids
    assert bytes(ids) == text.encode()
    assert tokenizer().decode(ids) == text


@given(st.binary())
def test_every_byte_sequence_decodes(data: bytes) -> None:
    """Half a character shows as a replacement character, never as an error."""
    assert tokenizer().decode(list(data)) == data.decode(errors="replace")


def test_the_vocabulary_is_the_byte_level_alphabet() -> None:
    """Bytes keep their value as token id; special tokens follow them."""
    assert set(byte_characters()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert tokenizer().get_vocab_size() == VOCABULARY_SIZE
    assert tokenizer().token_to_id(END_TOKEN) == END_TOKEN_ID
    assert tokenizer().encode(f"a{END_TOKEN}b").ids == [97, END_TOKEN_ID, 98]


def test_the_platform_is_only_used_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed shaper leaves a machine with real GPUs alone."""
    monkeypatch.delenv(EMULATE_VARIABLE, raising=False)
    assert platform_class_path() is None
    monkeypatch.setenv(EMULATE_VARIABLE, "")
    assert platform_class_path() is None
    monkeypatch.setenv(EMULATE_VARIABLE, "h200-sxm")
    assert platform_class_path() == PLATFORM_CLASS_PATH
