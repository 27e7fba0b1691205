"""Which of the host's GPUs are one engine's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile

from shaper.errors import GpuUnavailableError


def visible_gpus(
    environ: Mapping[str, str], world_size: int, data_parallel_rank: int = 0
) -> tuple[int | str, ...]:
    """The GPUs of one engine, as indices or (beginnings of) UUIDs.

    Args:
        environ: `CUDA_VISIBLE_DEVICES` is read from it as CUDA reads it: a list that
            ends at the first negative entry. Unset means all GPUs in the driver's order,
            which is CUDA's order where the GPUs are alike (or `CUDA_DEVICE_ORDER=PCI_BUS_ID`).
        world_size: GPUs per engine (tensor times pipeline parallel).
        data_parallel_rank: which of the engines of this host, from 0.

    Raises:
        GpuUnavailableError: fewer GPUs are visible than the engine needs, one is named
            twice, or MIG slices are named, whose power the driver does not meter.
    """
    first, last = data_parallel_rank * world_size, (data_parallel_rank + 1) * world_size
    variable = environ.get("CUDA_VISIBLE_DEVICES")
    if variable is None:
        return tuple(range(first, last))
    names: list[int | str] = []
    for entry in _entries(variable):
        if entry.upper().startswith("MIG"):
            raise GpuUnavailableError(
                f"CUDA_VISIBLE_DEVICES names {entry}: MIG slices are not supported, because the "
                "driver meters the power of whole GPUs only; use a GPU with MIG off"
            )
        names.append(int(entry) if entry.isascii() and entry.isdigit() else entry)
    if len(names) < last:
        raise GpuUnavailableError(
            f"CUDA_VISIBLE_DEVICES={variable!r} shows {len(names)} GPUs, and this engine needs "
            f"those at positions {first} to {last - 1}"
        )
    own = tuple(names[first:last])
    if len(set(own)) < len(own):
        raise GpuUnavailableError(
            f"CUDA_VISIBLE_DEVICES={variable!r} names a GPU of this engine twice"
        )
    return own


def visible_count(environ: Mapping[str, str]) -> int | None:
    """How many GPUs `CUDA_VISIBLE_DEVICES` names; None where it is not set, and all are visible."""
    variable = environ.get("CUDA_VISIBLE_DEVICES")
    return None if variable is None else len(_entries(variable))


def _entries(variable: str) -> list[str]:
    entries = (part.strip() for part in variable.split(","))
    return list(takewhile(lambda entry: entry and not entry.startswith("-"), entries))


def dealt_gpus(
    assigned: Sequence[int | str], world_size: int, data_parallel_rank: int = 0
) -> tuple[int | str, ...]:
    """The GPUs of one engine where vLLM holds a list of physical ones.

    The list is this engine's own, or the whole one of `--device-ids` for all ranks of the host.
    """
    if len(assigned) <= world_size:
        return tuple(assigned)
    return tuple(assigned[data_parallel_rank * world_size :][:world_size])


def device_order_warning(
    environ: Mapping[str, str], selectors: Sequence[int | str], names: Sequence[str]
) -> str | None:
    """What to say where CUDA may count the GPUs in another order than the driver.

    Args:
        environ: of the engine.
        selectors: as `visible_gpus` returns.
        names: of all GPUs that the driver shows.
    """
    if environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len(set(names)) < 2:
        return None
    if not any(isinstance(selector, int) for selector in selectors):
        return None
    return (
        "the GPUs of this host are not alike, and CUDA counts the fastest first: the power that "
        "is read may be another GPU's. Set CUDA_DEVICE_ORDER=PCI_BUS_ID, or name the GPUs by "
        "UUID in CUDA_VISIBLE_DEVICES"
    )
