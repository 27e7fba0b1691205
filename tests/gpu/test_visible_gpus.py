"""Which GPUs are this engine's."""

from __future__ import annotations

import pytest

from shaper.errors import GpuUnavailableError
from shaper.gpu.nvml import visible_gpus


@pytest.mark.parametrize(
    ("variable", "world_size", "rank", "expected"),
    [
        (None, 1, 0, (0,)),
        (None, 2, 3, (6, 7)),
        ("3", 1, 0, (3,)),
        ("7, 5,3,1", 2, 0, (7, 5)),
        ("7,5,3,1", 2, 1, (3, 1)),
        ("GPU-8932f937,GPU-11", 1, 1, ("GPU-11",)),
        ("2,-1,3", 1, 0, (2,)),
    ],
)
def test_follows_cuda_visible_devices(
    variable: str | None, world_size: int, rank: int, expected: tuple[int | str, ...]
) -> None:
    """The engine's share of the list, in the list's order."""
    environ = {} if variable is None else {"CUDA_VISIBLE_DEVICES": variable}
    assert visible_gpus(environ, world_size, rank) == expected


@pytest.mark.parametrize("variable", ["", "-1", "0", "0,-1,1", "0,,1"])
def test_too_few_visible_gpus_are_an_error_that_says_so(variable: str) -> None:
    """CUDA's list ends at the first entry that names no GPU."""
    with pytest.raises(GpuUnavailableError, match=r"CUDA_VISIBLE_DEVICES=.*needs"):
        visible_gpus({"CUDA_VISIBLE_DEVICES": variable}, 2)


def test_a_mig_slice_is_refused_by_name() -> None:
    """The driver meters whole GPUs, so a slice has no power of its own."""
    with pytest.raises(GpuUnavailableError, match=r"MIG-1234.*not supported"):
        visible_gpus({"CUDA_VISIBLE_DEVICES": "MIG-1234"}, 1)
