"""Stands in for `pynvml` in a process of its own.

Put this folder first on PYTHONPATH and the root of the checkout behind it, and name a
script (JSON, see `tests/gpu/fake_nvml.py`) in FAKE_NVML_SCRIPT (not SHAPER_...:
the shaper refuses variables of that kind that it does not know). Constants and errors are
the real binding's, which is found behind this folder.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent

_kept = list(sys.path)
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _HERE]
del sys.modules["pynvml"]
try:
    importlib.invalidate_caches()
    importlib.import_module("pynvml")
    from tests.gpu.fake_nvml import fake_from
finally:
    sys.path[:] = _kept

_path = os.environ.get("FAKE_NVML_SCRIPT") or os.environ["SHAPER_FAKE_NVML"]
_script = json.loads(Path(_path).read_text())
sys.modules["pynvml"] = fake_from(_script)  # type: ignore[assignment]
