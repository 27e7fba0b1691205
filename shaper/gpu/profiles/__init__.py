"""Profiles of real GPUs: one TOML file each, every number with its source.

    name = "h100-sxm"
    nvml_names = ["NVIDIA H100 80GB HBM3"]

    [memory]
    capacity_bytes = { value = 85899345920, source = "NVIDIA H100 datasheet" }

The groups and keys are those of `shaper.core.model.profile.GpuProfile`. A source that
begins with `estimate` or `fitted` says so; a number that may be left out has the source
`default`. `base = "h100-sxm"` takes every number that the file leaves out from another
profile. A GPU is added by adding a file, here or anywhere: `load_profile` takes a path too.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

from shaper.core.model.profile import GpuProfile
from shaper.errors import ConfigError, UnknownGpuError

__all__ = ["GpuProfile", "known_profiles", "load_profile", "profile_for_device", "profile_sources"]

_GROUPS: dict[str, Any] = {
    name: hint
    for name, hint in get_type_hints(GpuProfile).items()
    if dataclasses.is_dataclass(hint)
}


def known_profiles() -> tuple[str, ...]:
    """The names of the profiles that ship with the package, sorted."""
    folder = resources.files(__package__)
    return tuple(sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".toml")))


def load_profile(name_or_path: str) -> GpuProfile:
    """The profile of that name, or in that TOML file.

    Raises:
        UnknownGpuError: no such profile; the message lists the known ones.
        ConfigError: the file has a wrong key or number; the message names it.
    """
    return _load(str(name_or_path))[0]


def profile_sources(name_or_path: str) -> dict[str, str]:
    """Where each number of a profile comes from, by `group.key`.

    Raises:
        UnknownGpuError, ConfigError: as `load_profile`.
    """
    return dict(_load(str(name_or_path))[1])


def profile_for_device(nvml_device_name: str) -> GpuProfile | None:
    """The profile of the GPU that the driver calls `nvml_device_name`, if there is one.

    Drivers spell one board in several ways: with or without the maker, its socket, its kind
    and size of memory. A word more that says another board (PCIe, NVL, MIG) or a size of
    memory that is not the profile's is another GPU.
    """
    model, sizes = _words(nvml_device_name)
    for name in known_profiles():
        profile = load_profile(name)
        capacity = profile.memory.capacity_bytes
        for known in profile.nvml_names:
            known_model, known_sizes = _words(known)
            # A size need not be said of a board that comes with one.
            if model == known_model and (
                sizes == known_sizes
                or (not known_sizes and all(_is_size(size, capacity) for size in sizes))
            ):
                return profile
    return None


def _words(device_name: str) -> tuple[frozenset[str], frozenset[int]]:
    """What a device name says of the model, and the sizes of memory in it, in GB."""
    found = set(re.findall(r"[a-z0-9]+", device_name.casefold()))
    sizes = {word for word in found if re.fullmatch(r"\d+g[bi]?b?", word)}
    told = {word for word in found if re.fullmatch(r"nvidia|tesla|hbm\d\w*|sxm\d*", word)}
    return frozenset(found - sizes - told), frozenset(int(re.sub(r"\D", "", s)) for s in sizes)


def _is_size(size: int, capacity_bytes: float) -> bool:
    return any(abs(size * unit / capacity_bytes - 1.0) < 0.05 for unit in (1e9, 2.0**30))


@cache
def _load(name_or_path: str) -> tuple[GpuProfile, dict[str, str]]:
    label, raw = _read(name_or_path)
    numbers: dict[str, dict[str, float]] = {group: {} for group in _GROUPS}
    sources: dict[str, str] = {}
    base = raw.get("base")
    if base is not None:
        parent, parent_sources = _load(str(base))
        for group in _GROUPS:
            numbers[group] = dataclasses.asdict(getattr(parent, group))
        sources.update(parent_sources)
    for group, table in raw.items():
        if group in ("name", "nvml_names", "base"):
            continue
        if group not in _GROUPS or not isinstance(table, Mapping):
            raise ConfigError(f"{label}: unknown group [{group}]{_nearest(group, _GROUPS)}")
        keys = {field.name for field in dataclasses.fields(_GROUPS[group])}
        for key, entry in table.items():
            if key not in keys:
                raise ConfigError(f"{label}: unknown key {group}.{key}{_nearest(key, keys)}")
            numbers[group][key], sources[f"{group}.{key}"] = _entry(label, f"{group}.{key}", entry)
    for group, kind in _GROUPS.items():
        for field in dataclasses.fields(kind):
            if field.default is not dataclasses.MISSING and field.name not in numbers[group]:
                numbers[group][field.name] = float(field.default)
                sources[f"{group}.{field.name}"] = "default: off"
    return _build(label, raw, numbers), sources


def _read(name_or_path: str) -> tuple[str, dict[str, Any]]:
    try:
        if name_or_path in known_profiles():
            label = f"profile {name_or_path}"
            text = resources.files(__package__).joinpath(f"{name_or_path}.toml").read_text("utf-8")
        elif name_or_path.endswith(".toml") and Path(name_or_path).is_file():
            label, text = name_or_path, Path(name_or_path).read_text("utf-8")
        else:
            known = known_profiles()
            raise UnknownGpuError(
                f"unknown GPU {name_or_path!r}{_nearest(name_or_path, known)}; known: "
                f"{', '.join(known)}, or the path of a profile's .toml file"
            )
        return label, tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{name_or_path}: not a readable TOML file: {error}") from error


def _entry(label: str, key: str, entry: object) -> tuple[float, str]:
    if not isinstance(entry, Mapping) or set(entry) != {"value", "source"}:
        raise ConfigError(f'{label}: {key} must be {{ value = number, source = "where from" }}')
    value, source = entry["value"], entry["source"]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{label}: {key}.value is {value!r}, not a number")
    if not isinstance(source, str) or not source.strip():
        raise ConfigError(f'{label}: {key} has no source; write "estimate: ..." for a guess')
    return float(value), source


def _build(
    label: str, raw: Mapping[str, Any], numbers: Mapping[str, Mapping[str, float]]
) -> GpuProfile:
    name, nvml_names = raw.get("name"), raw.get("nvml_names", [])
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{label}: name is missing")
    if not isinstance(nvml_names, list) or not all(isinstance(item, str) for item in nvml_names):
        raise ConfigError(f"{label}: nvml_names must be a list of strings")
    groups: dict[str, Any] = {}
    for group, kind in _GROUPS.items():
        missing = [
            field.name for field in dataclasses.fields(kind) if field.name not in numbers[group]
        ]
        if missing:
            raise ConfigError(
                f"{label}: [{group}] lacks {', '.join(missing)}; "
                'give them, or name a profile to take them from: base = "..."'
            )
        try:
            groups[group] = kind(**numbers[group])
        except ValueError as error:
            raise ConfigError(f"{label}: [{group}] {error}") from error
    try:
        return GpuProfile(name=name, nvml_names=tuple(nvml_names), **groups)
    except ValueError as error:
        raise ConfigError(f"{label}: {error}") from error


def _nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
