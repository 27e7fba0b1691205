"""`shaper fit`: makes a GPU profile of a recording.

The recording is what an engine writes with `--record FILE` (`shaper.recording.format` has the
format). The profile that comes out names the one it started from and gives only the
numbers that the recording decided, each with its 95% interval.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shaper.cli.arguments import Parser
from shaper.core.model.shape import ModelShape
from shaper.core.model.work import WorkCoefficients
from shaper.emulator.shapes import load_shape
from shaper.errors import ConfigError, TraceError
from shaper.files.outputs import check_output, check_package
from shaper.files.text import shown
from shaper.fitting import FitResult, fit_recording
from shaper.gpu.profiles import load_profile
from shaper.recording.format import read_recording


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `shaper fit`."""
    parser = Parser(prog="shaper fit", description=__doc__, allow_abbrev=False)
    parser.add_argument("recording", type=Path, help="a .csv or .parquet written by --record")
    parser.add_argument("--gpu", help="profile to start from; by default the recording's own")
    parser.add_argument(
        "--model", help="built-in shape or config directory; by default the recording's own"
    )
    parser.add_argument("--tp", type=int, help="GPUs of the engine; by default the recording's own")
    parser.add_argument("--output", type=Path, metavar="FILE.toml", help="write the profile here")
    parser.add_argument("--name", help="of the new profile; by default the output's file name")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Raises:
        ConfigError: a wrong argument, or SciPy is missing.
        TraceError: the recording can't be read or holds too little.
    """
    arguments = build_parser().parse_args(argv)
    check_output(arguments.output, "--output", ".toml")
    check_package("scipy", "shaper fit")
    recording = read_recording(arguments.recording)
    base = arguments.gpu or recording.meta.get("gpu")
    if not base:
        raise ConfigError("the recording does not say which GPU it is of: give --gpu")
    profile = load_profile(str(base))
    shape = _shape(arguments.model, recording.meta)
    tensor_parallel = arguments.tp
    if tensor_parallel is None:
        tensor_parallel = recording.meta.get("tensor_parallel", 1)
    if isinstance(tensor_parallel, bool) or not isinstance(tensor_parallel, int):
        raise TraceError(
            f"the recording's tensor_parallel is {shown(tensor_parallel)}, no number of GPUs: give "
            "--tp"
        )
    try:
        coefficients = WorkCoefficients.from_shape(shape, tensor_parallel)
    except ValueError as error:
        raise ConfigError(f"--tp: {error}") from error
    result = fit_recording(recording, profile, coefficients)
    if arguments.json:
        print(json.dumps(as_dict(result), indent=2))
    else:
        print(summary(result, str(base)))
    if arguments.output is not None:
        name = arguments.name or arguments.output.stem
        text = profile_text(result, str(base), name, arguments.recording.name)
        try:
            arguments.output.write_text(text)
        except OSError as error:
            raise ConfigError(f"--output {arguments.output}: {error}") from error
        load_profile(str(arguments.output))
        if not arguments.json:
            print(f"wrote {arguments.output}")
    return 0


def _shape(model: str | None, meta: Mapping[str, Any]) -> ModelShape:
    if model is not None:
        return load_shape(model)
    config = meta.get("model_config")
    if not isinstance(config, Mapping):
        raise ConfigError("the recording does not say which model it is of: give --model")
    try:
        return ModelShape.from_hf_config(config, method=meta.get("quantization"))
    except ValueError as error:
        raise TraceError(f"the recording's model: {error}") from error


def as_dict(result: FitResult) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "steps": result.steps,
        "windows": result.windows,
        "seconds_error": result.seconds_error,
        "joules_error": result.joules_error,
        "parameters": {
            one.name: {
                "value": one.value,
                "profile_value": one.profile_value,
                "low": one.low,
                "high": one.high,
                "identified": one.identified,
                "reason": one.reason,
            }
            for one in result.parameters
        },
    }


def summary(result: FitResult, base: str) -> str:
    """The outcome as a table, and what could not be identified."""
    energy = "no energy windows"
    if result.joules_error is not None:
        energy = f"{result.windows} energy windows, median error {result.joules_error:.2%}"
    lines = [
        f"{result.steps} steps, median error of their seconds {result.seconds_error:.2%}; {energy}",
        f"{'parameter':<36} {base:>12} {'fitted':>12}   95% interval",
    ]
    for one in result.parameters:
        if one.identified and one.low is not None and one.high is not None:
            lines.append(
                f"{one.name:<36} {one.profile_value:>12.4g} {one.value:>12.4g}   "
                f"{one.low:.4g} to {one.high:.4g}"
            )
    unknown = [one for one in result.parameters if not one.identified]
    if unknown:
        lines.append("not identified, the profile's value is kept:")
        lines += [f"  {one.name:<36} {one.value:>10.4g}   {one.reason}" for one in unknown]
    return "\n".join(lines)


def profile_text(result: FitResult, base: str, name: str, source: str) -> str:
    """The TOML of a profile that gives what was fitted and takes the rest from `base`."""
    lines = [f"name = {json.dumps(name)}", f"base = {json.dumps(base)}", "nvml_names = []"]
    values: dict[str, dict[str, tuple[float, str]]] = {}
    for one in result.parameters:
        if one.identified and one.low is not None and one.high is not None:
            group, key = one.name.split(".")
            fitted = float(getattr(getattr(result.profile, group), key))
            interval = f"fitted: {source}, 95% interval {one.low:.4g} to {one.high:.4g}"
            values.setdefault(group, {})[key] = (fitted, interval)
    idle = result.profile.power.idle_watts
    if idle != load_profile(base).power.idle_watts:
        values.setdefault("power", {})["idle_watts"] = (idle, "fitted: not above the context")
    order = [field.name for field in dataclasses.fields(result.profile)]
    for group in sorted(values, key=order.index):
        lines += ["", f"[{group}]"]
        lines += [
            f"{key} = {{ value = {value:.6g}, source = {json.dumps(text)} }}"
            for key, (value, text) in values[group].items()
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
