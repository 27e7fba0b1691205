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
    names = named_gpus(environ)
    if len(names) < last:
        raise GpuUnavailableError(
            f"CUDA_VISIBLE_DEVICES={variable!r} shows {len(names)} GPUs, and this engine needs "
            f"those at positions {first} to {last - 1}"
        )
    # Of all engines, not of this one alone: two on a GPU would each count its power as their own.
    folded = [name if isinstance(name, int) else name.casefold() for name in names]
    if len(set(folded)) < len(folded):
        raise GpuUnavailableError(f"CUDA_VISIBLE_DEVICES={variable!r} names a GPU twice")
    return tuple(names[first:last])


def named_gpus(environ: Mapping[str, str]) -> list[int | str]:
    """All that `CUDA_VISIBLE_DEVICES` names, as indices or UUIDs; none where it is not set.

    Raises:
        GpuUnavailableError: it names a MIG slice.
    """
    names: list[int | str] = []
    for entry in _entries(environ.get("CUDA_VISIBLE_DEVICES", "")):
        refuse_slice(entry, "CUDA_VISIBLE_DEVICES names")
        names.append(int(entry) if entry.isascii() and entry.isdigit() else entry)
    return names


def refuse_twice(selectors: Sequence[int | str], host: Mapping[int, str]) -> None:
    """Refuse a GPU that two selectors name, by index and by UUID say: it would count twice.

    Args:
        selectors: of one engine or of all engines of a server.
        host: the UUID of each GPU by its index. Selectors of no or several GPUs are passed over.

    Raises:
        GpuUnavailableError: there is one.
    """
    by_uuid: dict[str, list[str]] = {}
    for selector in selectors:
        if isinstance(selector, int):
            found = [uuid for index, uuid in host.items() if index == selector]
        else:
            found = [u for u in host.values() if u.casefold().startswith(selector.casefold())]
        if len(found) == 1:
            by_uuid.setdefault(found[0], []).append(str(selector))
    for uuid, names in by_uuid.items():
        if len(names) > 1:
            raise GpuUnavailableError(
                f"{' and '.join(names)} name the same GPU ({uuid}), whose power would count "
                "twice: name each GPU once, in CUDA_VISIBLE_DEVICES or --device-ids"
            )


def refuse_slice(selector: int | str, who_names: str) -> None:
    """Refuse a slice of a GPU by its name.

    Raises:
        GpuUnavailableError: it is one.
    """
    if str(selector).upper().startswith("MIG"):
        raise GpuUnavailableError(
            f"{who_names} {selector}: MIG slices are not supported, because the "
            "driver meters the power of whole GPUs only; use a GPU with MIG off"
        )


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
