"""Runs that are done, one file each, so that a comparison that was stopped goes on.

A run's name is a hash of all that its result follows from: the rack, the traffic, the files
that a rack names, the package's code, and the versions of vLLM and numpy. A change of any of
them is another run.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import fields
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import shaper
from bench import baselines
from bench.harness.runner import Runner, Told
from bench.racks import outcome as outcome_module
from bench.racks.outcome import Arrays, Outcome, run_one
from shaper.engine.compat import vllm_version
from shaper.errors import ConfigError
from shaper.simulate.setup import RackSetup
from shaper.traffic.workload import Workload

_PACKAGE = Path(shaper.__file__).resolve().parent
_CODE = frozenset({".py", ".toml", ".json"})
# No run depends on how it is drawn.
_NOT_OF_A_RUN = _PACKAGE / "report"
_ARRAYS = tuple(field.name for field in fields(Arrays))


@cache
def code_version() -> str:
    """A hash of the code that a run's figures come from."""
    found = hashlib.sha256(f"{vllm_version()} {version('numpy')}".encode())
    for path in [
        *sorted(_PACKAGE.rglob("*")),
        *sorted(Path(str(baselines.__file__)).parent.glob("*.py")),
        Path(str(outcome_module.__file__)),
    ]:
        if path.suffix in _CODE and _NOT_OF_A_RUN not in path.parents:
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def plant_text(value: object) -> str:
    """The same for the same functions and arguments, in every process."""
    if isinstance(value, partial):
        named = {name: plant_text(each) for name, each in sorted(value.keywords.items())}
        return f"{plant_text(value.func)}{[plant_text(x) for x in value.args]}{named}"
    name = getattr(value, "__qualname__", None)
    return repr(value) if name is None else f"{getattr(value, '__module__', '')}.{name}"


def _file_text(name: str) -> str:
    """What a profile or a model that is given as a path holds; nothing of one built in."""
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    try:
        return path.read_text() if path.is_file() else ""
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error}") from error


def run_name(setup: RackSetup, workload: Workload) -> str:
    """Hexadecimal; see the module."""
    parts: list[Any] = [getattr(setup, each.name) for each in fields(setup) if each.name != "plant"]
    parts += [plant_text(setup.plant), _file_text(setup.gpu), _file_text(setup.model)]
    found = hashlib.sha256(repr(parts).encode())
    found.update(_traffic_hash(workload).encode() + code_version().encode())
    return found.hexdigest()[:32]


@cache
def _traffic_hash(workload: Workload) -> str:
    return hashlib.sha256(repr(workload).encode()).hexdigest()


class Store:
    """A folder of outcomes. Mutable state: the files.

    Args:
        folder: made if need be.

    Raises:
        ConfigError: it can't be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{folder} can't be made: {error}") from error

    def load(self, name: str) -> Outcome | None:
        """What is kept under a name; None where there is nothing, or a broken file."""
        path = self.folder / f"{name}.npz"
        try:
            # Opened here: numpy leaves a file open that turns out to be torn.
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                figures = json.loads(str(file["figures"]))
                return Outcome(**figures, arrays=Arrays(*(file[key] for key in _ARRAYS)))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            # A machine that went down while it wrote; the run is done again and replaces it.
            return None

    def save(self, name: str, found: Outcome) -> None:
        """Keep an outcome; a file is whole or not there.

        Raises:
            ConfigError: it can't be written.
        """
        figures = {
            field.name: getattr(found, field.name)
            for field in fields(found)
            if field.name != "arrays"
        }
        path = self.folder / f"{name}.npz"
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            with part.open("wb") as file:
                np.savez_compressed(
                    file,
                    figures=np.array(json.dumps(figures)),
                    **{key: getattr(found.arrays, key) for key in _ARRAYS},
                )
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise ConfigError(f"{path} can't be written: {error}") from error

    def clear(self) -> None:
        """Forget all runs."""
        for path in self.folder.glob("*.npz"):
            path.unlink()


def rack_runner(
    workload: Workload,
    store: Store,
    processes: int,
    tell: Callable[[Told], None] = lambda told: None,
) -> Runner:
    """Runs racks under one workload: of a `RackSetup` it makes an `Outcome`."""
    return Runner(
        partial(run_one, workload=workload),
        partial(run_name, workload=workload),
        processes,
        store.load,
        store.save,
        tell,
    )
