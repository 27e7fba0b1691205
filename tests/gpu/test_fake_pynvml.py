"""The stand-in for `pynvml` that a process of its own can import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from shaper.gpu.replay import ReplayReader

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, sys
from shaper.errors import GpuError
from shaper.gpu.capabilities import describe_gpus
from shaper.gpu.nvml import NvmlReader, host_gpus
try:
    reader = NvmlReader([0])
    (found,) = describe_gpus(reader)
    (sample,) = reader.read()
    said = {"gpus": [gpu.uuid for gpu in host_gpus()], "watts": sample.instant_watts,
            "how": found.source("instant_watts").how,
            "missing": found.source("average_watts").missing}
except GpuError as error:
    said = {"error": type(error).__name__, "message": str(error)}
print(json.dumps(said))
"""


def run(tmp_path: Path, script: dict[str, Any]) -> dict[str, Any]:
    path = tmp_path / "script.json"
    path.write_text(json.dumps(script))
    environ = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'tests' / 'gpu' / 'fake_pynvml'}{os.pathsep}{ROOT}",
        "SHAPER_FAKE_NVML": str(path),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environ,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_process_reads_scripted_gpus(tmp_path: Path) -> None:
    """A recording drives the first, a fault takes its average."""
    found = run(
        tmp_path,
        {
            "gpus": [
                {"uuid": "GPU-a", "recording": "tests/gpu/data/h200_load.csv"},
                {"uuid": "GPU-b", "mig_mode": 1},
            ],
            "faults": [
                {"kind": "code", "code": "NOT_SUPPORTED", "call": "POWER_AVERAGE"},
                {"kind": "code", "code": "NO_PERMISSION", "call": "nvmlDeviceGetPowerUsage"},
            ],
        },
    )
    recording = ReplayReader(ROOT / "tests" / "gpu" / "data" / "h200_load.csv")
    assert found["gpus"] == ["GPU-a", "GPU-b"]
    assert found["watts"] in {recording.read()[0].instant_watts for _ in range(450)}
    assert found["how"] == "field POWER_INSTANT, GPU scope"
    assert found["missing"] == "no permission"


def test_a_process_without_a_driver_is_told_so(tmp_path: Path) -> None:
    """As on a machine without a GPU."""
    fault = {"kind": "code", "code": "LIBRARY_NOT_FOUND", "call": "nvmlInit"}
    found = run(tmp_path, {"gpus": [], "faults": [fault]})
    assert found["error"] == "GpuUnavailableError"
    assert "Library Not Found" in found["message"]
