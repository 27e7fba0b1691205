"""What the host gives this user: shared memory, device files, and the settings in force."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from shaper.config.sources import ADMIN_KEY_VARIABLE, admin_key, load_config
from shaper.core.budget import describe
from shaper.core.types import PowerBudget, PowerLimit
from shaper.doctor.blocks import other_users, own_blocks
from shaper.doctor.findings import Checks, Finding, plain
from shaper.errors import ConfigError
from shaper.group.reservations import table_bytes
from shaper.group.shared_file import CAPACITY, group_directory
from shaper.ipc.status_block import block_directory

_CHECKS = Checks("Host")
_MEBIBYTE = 2**20
# A group with limits on all of the ledger's grids; a status block takes 16 KiB.
_GROUP_BYTES = table_bytes(CAPACITY, [PowerLimit(1.0, window) for window in (0.1, 1.0, 60.0)])
_CAP_SYS_ADMIN = 21


def host_findings(environ: Mapping[str, str], shm: Path = Path("/dev/shm")) -> list[Finding]:
    """All of this module's."""
    return [
        shared_memory(shm),
        user(),
        device_files(Path("/dev")),
        power_cap(Path("/proc/self/status")),
        settings(environ),
        admin(environ),
        engines(),
    ]


def shared_memory(shm: Path) -> Finding:
    """Whether status blocks and a power group's ledger have room in memory."""
    where = str(shm)
    try:
        with tempfile.TemporaryFile(dir=shm) as file:
            os.posix_fallocate(file.fileno(), 0, 4096)
    except OSError as error:
        return _CHECKS.warn(
            "host.shared_memory",
            f"{where} can't be written ({error.strerror}): status blocks and groups go to "
            f"{tempfile.gettempdir()}",
            "make it writable for this user (a container may need --shm-size or --ipc=host): on a "
            "disk, metrics cost writes, and engines of other containers are not seen",
            writable=False,
            free_bytes=None,
            needed_bytes=_GROUP_BYTES,
        )
    free = shutil.disk_usage(shm).free
    found = f"{where} is writable, {free / _MEBIBYTE:.0f} MiB free"
    data = {"writable": True, "free_bytes": free, "needed_bytes": _GROUP_BYTES}
    if free < _GROUP_BYTES:
        return _CHECKS.fail(
            "host.shared_memory",
            f"{found}; a power group needs {_GROUP_BYTES / _MEBIBYTE:.0f} MiB",
            f"make room in {where}, or give the container a larger --shm-size",
            **data,
        )
    if free < 2 * _GROUP_BYTES:
        return _CHECKS.warn(
            "host.shared_memory",
            f"{found}; a power group takes {_GROUP_BYTES / _MEBIBYTE:.0f} MiB of it",
            f"make room in {where}: vLLM's processes use it too",
            **data,
        )
    return _CHECKS.ok("host.shared_memory", found, **data)


def user() -> Finding:
    """Server, engines, groups and this command see each other only as one user."""
    own, others = os.getuid(), other_users()
    folder = group_directory()
    data = {"uid": own, "other_uids": others}
    found = folder.lstat() if folder.is_symlink() or folder.exists() else None
    if found is not None and (found.st_uid != own or found.st_mode & 0o077):
        return _CHECKS.fail(
            "host.user",
            f"{folder} is another user's, or open to others: no power group can be joined",
            f"remove it, or chmod 700 it if it is yours: {folder}",
            **data,
        )
    if others:
        return _CHECKS.warn(
            "host.user",
            f"user {own}; engines of user {', '.join(map(str, others))} are here too, and are not "
            "seen below",
            "engines that share a budget, and this command, must run as one user",
            **data,
        )
    return _CHECKS.ok("host.user", f"user {own}; no other user's engines here", **data)


def device_files(folder: Path) -> Finding:
    """Whether this user may open the GPUs' device files."""
    files = sorted(folder.glob("nvidia[0-9]*")) + sorted(folder.glob("nvidiactl"))
    closed = [str(path) for path in files if not os.access(path, os.R_OK | os.W_OK)]
    data = {"files": len(files), "closed": closed}
    if closed:
        return _CHECKS.fail(
            "host.device_files",
            f"this user may not open {', '.join(closed)}",
            "see their group and mode (ls -l), or give the container --gpus all",
            **data,
        )
    if not files:
        return _CHECKS.ok("host.device_files", f"no GPU's device file in {folder}", **data)
    return _CHECKS.ok("host.device_files", f"{len(files)} of NVIDIA's, open to this user", **data)


def power_cap(status: Path) -> Finding:
    """Whether this user could set a hardware power cap. It is not tried: the shaper never does."""
    capable = False
    try:
        for line in status.read_text().splitlines():
            if line.startswith("CapEff:"):
                capable = bool(int(line.split()[1], 16) >> _CAP_SYS_ADMIN & 1)
    except (OSError, ValueError):
        capable = os.geteuid() == 0  # no such file: not Linux's, and root is all that is known
    words = "could be set by this user" if capable else "can't be set by this user (it takes root)"
    found = f"a hardware cap {words}; not tried: the shaper sets none and needs no root"
    return _CHECKS.ok("host.power_cap", found, possible=capable)


def settings(environ: Mapping[str, str]) -> Finding:
    """The settings that the environment gives to every engine started from here."""
    try:
        config = load_config(None, environ)
    except ConfigError as error:
        return _CHECKS.fail(
            "host.settings",
            # A message repeats what was given, and that may be a key in the wrong place.
            _without_key(str(error), environ),
            "correct the environment's SHAPER_ variables: no engine starts with them",
            valid=False,
        )
    given = sorted(config.model_fields_set)
    if not given:
        said = "no SHAPER_ variable gives any; flags and configuration files are not looked at"
        return _CHECKS.ok("host.settings", said, valid=True, given=given)
    budget = PowerBudget(config.limits)
    said = f"the environment gives {', '.join(given)} ({describe(budget)})"
    return _CHECKS.ok("host.settings", said, valid=True, given=given)


def _without_key(text: str, environ: Mapping[str, str]) -> str:
    key = environ.get(ADMIN_KEY_VARIABLE)
    return text.replace(key, "[key]") if key else text


def admin(environ: Mapping[str, str]) -> Finding:
    """Whether there is a key for the control routes. It is never shown."""
    try:
        key = admin_key(environ)
    except ConfigError as error:
        advice = "make one with: openssl rand -hex 16"
        return _CHECKS.fail("host.admin_key", str(error), advice, given=True, valid=False)
    if key is None:
        said = f"{ADMIN_KEY_VARIABLE} is not set: servers started from here have no control routes"
        return _CHECKS.ok("host.admin_key", said, given=False, valid=None)
    return _CHECKS.ok("host.admin_key", f"{ADMIN_KEY_VARIABLE} is set", given=True, valid=True)


def engines() -> Finding:
    """Engines of this user that live here, by their status blocks."""
    blocks = own_blocks()
    alive = [block for block in blocks if block.alive]
    dead = len(blocks) - len(alive)
    names = [
        f"engine {plain(b.status.info.get('engine'), 10)} of process {b.pid} "
        f"({plain(b.status.info.get('gpu'), 30)})"
        for b in alive
    ]
    found = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    data = {"alive": len(alive), "dead": dead}
    if dead:
        left = f"{dead} status block(s) of dead engines in {block_directory()}"
        return _CHECKS.warn(
            "host.engines",
            f"{found}; {left}" if found else left,
            "an engine was killed; the next start removes them. See the server's log and dmesg "
            "(out of memory?)",
            **data,
        )
    return _CHECKS.ok("host.engines", found or "no shaped engine runs as this user", **data)
