"""Racks in virtual time: vLLM's real scheduler and the shaper over emulated GPUs."""

from __future__ import annotations

import os

# vLLM chooses its platform at import, once per process.
os.environ["SHAPER_EMULATE"] = "h200-sxm"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

pytest.importorskip("vllm", reason="these tests run vLLM's own scheduler: make setup")
