"""Which GPUs are this engine's."""

from __future__ import annotations

import pytest

from shaper.errors import GpuUnavailableError
from shaper.gpu.visible import dealt_gpus, device_order_warning, visible_gpus


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


@pytest.mark.parametrize("variable", ["0,0", "GPU-a,1,GPU-a", "3,²,3"])
def test_a_gpu_that_is_named_twice_is_refused(variable: str) -> None:
    """Its power would count twice."""
    with pytest.raises(GpuUnavailableError, match="twice"):
        visible_gpus({"CUDA_VISIBLE_DEVICES": variable}, len(variable.split(",")))


@pytest.mark.parametrize(
    ("assigned", "world_size", "rank", "expected"),
    [
        ((4, 5), 2, 1, (4, 5)),
        ((4, 5, 6, 7), 2, 1, (6, 7)),
        ((4, 5, 6, 7), 1, 3, (7,)),
        ((), 2, 1, ()),
    ],
)
def test_what_vllm_has_dealt_is_one_ranks_or_the_whole_list(
    assigned: tuple[int, ...], world_size: int, rank: int, expected: tuple[int, ...]
) -> None:
    """A rank that took all of `--device-ids` for its own would see its neighbours' power."""
    assert dealt_gpus(assigned, world_size, rank) == expected


@pytest.mark.parametrize(
    ("environ", "selectors", "names", "warns"),
    [
        ({}, (0,), ("A", "B"), True),
        ({"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, (0,), ("A", "B"), True),
        ({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, (0,), ("A", "B"), False),
        ({}, (0,), ("A", "A"), False),
        ({}, ("GPU-a",), ("A", "B"), False),
    ],
)
def test_indices_among_unlike_gpus_are_warned_of(
    environ: dict[str, str], selectors: tuple[int | str, ...], names: tuple[str, ...], warns: bool
) -> None:
    """CUDA puts the fastest first, the driver counts by bus."""
    warning = device_order_warning(environ, selectors, names)
    assert (warning is not None) is warns
    assert warning is None or "CUDA_DEVICE_ORDER=PCI_BUS_ID" in warning
