"""The built-in model shapes: published dimensions, no weights, no tokenizer.

Each `NAME.json` beside this file is a Hugging Face `config.json` of the same
dimensions as the published model. Gemma 3 is its text model alone.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from shaper.core.work import ModelShape
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
    path = path / "config.json" if path.is_dir() else path
    if path.suffix != ".json" or not path.is_file():
        raise UnknownModelError(
            f"model {name_or_path!r} is neither a built-in shape ({', '.join(known_models())}) "
            "nor a directory with a config.json"
        )
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UnknownModelError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise UnknownModelError(f"{path} holds no JSON object")
    return config


def load_shape(name_or_path: str) -> ModelShape:
    """The dimensions of a built-in shape or of a Hugging Face config directory.

    Raises:
        UnknownModelError: nothing of that name, or a config this project can't describe.
    """
    config = load_model_config(name_or_path)
    label = Path(name_or_path).name
    try:
        return ModelShape.from_hf_config(config, label)
    except ValueError as error:
        raise UnknownModelError(str(error)) from error
