"""From a name to a directory that vLLM can serve: built-in shapes and HF config directories.

A built-in shape is the published `config.json` of a model. Its directory adds
the tokenizer of `tokenizer.py`; there are no weights. Directories live in the
user's cache, named after their contents, so that another version of this
package writes another one and a half-written one is never read.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

from shaper.emulator.shapes import known_models, load_model_config
from shaper.emulator.tokenizer import END_TOKEN_ID, tokenizer_files
from shaper.errors import UnknownModelError

_TOKENIZER_NAMES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tekken.json")


def model_directory(name: str) -> Path:
    """A directory that vLLM can load `name` from: config and tokenizer, no weights.

    A built-in shape is written to the cache on first use. A directory that
    has a `config.json` is returned as it is.

    Raises:
        UnknownModelError: there is no such shape and no such directory.
    """
    config = load_model_config(name)
    if name not in known_models():
        path = Path(name)
        if not path.is_dir():
            raise UnknownModelError(f"model {name!r} is a file; give the directory it lies in")
        return path
    generation = {"eos_token_id": END_TOKEN_ID, "pad_token_id": END_TOKEN_ID}
    files = {
        "config.json": json.dumps(config, indent=2) + "\n",
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
        **tokenizer_files(),
    }
    return _cached_directory(name, files)


def tokenizer_directory() -> Path:
    """A directory with nothing but the byte-level tokenizer, for configs that bring none."""
    return _cached_directory("byte-tokenizer", tokenizer_files())


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory brings a tokenizer of its own."""
    return any((directory / name).is_file() for name in _TOKENIZER_NAMES)


def cache_directory() -> Path:
    """Where model directories are kept: `$XDG_CACHE_HOME` or `~/.cache`, `vllm-shaper`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vllm-shaper"


def _cached_directory(name: str, files: dict[str, str]) -> Path:
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]
    target = cache_directory() / "models" / digest / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    scratch.chmod(0o755)
    for file_name, text in files.items():
        (scratch / file_name).write_text(text)
    try:
        scratch.rename(target)
    except OSError:
        # Another process was first; both wrote the same contents.
        for path in scratch.iterdir():
            path.unlink()
        scratch.rmdir()
        if not target.is_dir():
            raise
    return target
