"""The built-in model shapes: published dimensions, no weights, no tokenizer.

Each `NAME.json` beside this file is a Hugging Face `config.json` of the same
dimensions as the published model. Gemma 3 is its text model alone.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from shaper.core.model.shape import ModelShape
from shaper.emulator.shapes.defaults import filled_in
from shaper.errors import UnknownModelError


def known_models() -> tuple[str, ...]:
    """The names of the built-in shapes, sorted."""
    folder = resources.files(__package__)
    return tuple(sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".json")))


def load_model_config(name_or_path: str) -> dict[str, Any]:
    """The Hugging Face config of a built-in shape, or of a directory with `config.json`.

    Raises:
        UnknownModelError: neither is there, or the file is not a JSON object.
    """
    if name_or_path in known_models():
        text = resources.files(__package__).joinpath(f"{name_or_path}.json").read_text("utf-8")
        loaded: dict[str, Any] = json.loads(text)
        return loaded
    path = Path(name_or_path)
    try:
        path = path / "config.json" if path.is_dir() else path
        found = path.suffix == ".json" and path.is_file()
    except (OSError, ValueError):
        found = False
    if not found:
        raise UnknownModelError(
            f"model {name_or_path!r} is neither a built-in shape ({', '.join(known_models())}) "
            "nor a directory with a config.json"
        )
    return _json_object(path)


def load_shape(name_or_path: str, *, method: str | None = None) -> ModelShape:
    """The dimensions of a built-in shape or of a Hugging Face config directory.

    What a published file leaves out is taken from transformers' class of that model,
    where it is installed; how weights are stored also from a `hf_quant_config.json`.

    Args:
        method: that a server quantises weights with when it loads them.

    Raises:
        UnknownModelError: nothing of that name, or a config this project can't describe.
    """
    config = load_model_config(name_or_path)
    label = Path(name_or_path).name or name_or_path
    quantisation = None
    beside = Path(name_or_path) / "hf_quant_config.json"
    if name_or_path not in known_models() and beside.is_file():
        quantisation = _json_object(beside)
    try:
        return ModelShape.from_hf_config(
            filled_in(config), label, quantisation=quantisation, method=method
        )
    except ValueError as error:
        raise UnknownModelError(str(error)) from error


def _json_object(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnknownModelError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise UnknownModelError(f"{path} holds no JSON object")
    return config
