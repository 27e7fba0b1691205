"""A group is one user's: whoever comes second as another one is refused, in one line."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shaper.errors import FleetError
from shaper.group import HostGroup, apart, check_group, cleanup_groups, shared_file
from shaper.group import presence as presences
from shaper.group.presence import Presence, presence_path
from tests.group import members
from tests.group.members import LIMITS

OTHER = 61234
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def join(base: Path, name: str = "g") -> HostGroup:
    return members.join(base / "own", name=name)


@pytest.fixture
def stranger(tmp_path: Path):
    """An engine of another user in a group of the same name."""
    presence = Presence("g", tmp_path, OTHER)
    yield presence
    presence.close()


def test_a_group_of_another_user_s_is_refused(tmp_path, stranger):
    """Before vLLM is loaded, and at the join; nothing of this user's is left behind."""
    for ask in (lambda: join(tmp_path), lambda: check_group("g", LIMITS, directory=tmp_path / "o")):
        with pytest.raises(FleetError) as caught:
            ask()
        line = str(caught.value)
        assert f"user {OTHER}" in line
        assert "as one user" in line
        assert "\n" not in line
    stranger.close()
    join(tmp_path).leave()
    assert [path.name for path in tmp_path.glob("vllm-shaper-group-*")] == [stranger.path.name]


def test_other_names_and_dead_engines_are_no_obstacle(tmp_path, stranger):
    """A file that a killed engine left says nothing; a name that ends alike is another one."""
    join(tmp_path, "other-g").leave()
    join(tmp_path, "gg").leave()
    stranger.close()
    assert stranger.path.exists()
    join(tmp_path).leave()


def test_it_is_there_as_long_as_one_engine_lives(tmp_path):
    """Of two engines the last takes the file away; a sweep does where both were killed."""
    one, two = join(tmp_path), join(tmp_path)
    path = presence_path("g", tmp_path)
    assert path.stat().st_mode & 0o777 == 0o644
    one.leave()
    with pytest.raises(FleetError):
        Presence("g", tmp_path, OTHER)
    two.leave()
    assert not path.exists()
    process = multiprocessing.get_context("fork").Process(target=_die_inside, args=(tmp_path,))
    process.start()
    process.join()
    assert path.exists()
    Presence("g", tmp_path, OTHER).close()
    cleanup_groups(time.monotonic(), "g", directory=tmp_path / "own")
    assert not path.exists()


def _die_inside(base: Path) -> None:
    group = join(base)
    assert group.limits
    os._exit(9)


def test_a_forked_child_does_not_keep_it(tmp_path):
    """The engine's own lock is the one that counts."""
    group = join(tmp_path)
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    process.start()
    try:
        group.leave()
        Presence("g", tmp_path, OTHER).close()
    finally:
        process.kill()
        process.join()


@pytest.fixture
def base() -> Iterator[Path]:
    """Where any user may go: pytest's own folders are closed to others."""
    with tempfile.TemporaryDirectory(prefix="shaper-presence-") as name:
        yield Path(name)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_root_and_another_user_on_a_real_host(base):
    """Each way round, with files as the kernel guards them: a sticky directory that all share."""
    base.chmod(0o1777)
    program = (
        "import os, sys, time; from pathlib import Path; "
        "from shaper.group.presence import Presence; "
        "{become}Presence('g', Path(sys.argv[1])); print('in', flush=True); time.sleep(60)"
    )
    root = str(Path(presences.__file__).parents[2])
    told: dict[str, Any] = {
        "env": os.environ | {"PYTHONPATH": root},
        "stdout": subprocess.PIPE,
        "text": True,
    }
    become = "os.setgid(65534); os.setuid(65534); "
    for first, second in (("", become), (become, "")):
        commands = [
            [sys.executable, "-c", program.format(become=each), base] for each in (first, second)
        ]
        holder = subprocess.Popen(commands[0], **told)
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == "in\n"
            done = subprocess.run(
                commands[1], **told, stderr=subprocess.PIPE, check=False, timeout=60
            )
            assert "can't share their limit" in done.stderr
        finally:
            holder.kill()
            holder.wait()
            holder.stdout.close()


HOST = "24 30 0:22 / /dev/shm rw,nosuid,nodev shared:4 - tmpfs tmpfs rw\n"


@pytest.mark.parametrize(
    ("ipc", "own", "says"),
    [
        ("ipc:[4026531839]", HOST, None),
        ("ipc:[4026532201]", HOST, "--ipc=host"),
        ("ipc:[4026531839]", HOST + "99 24 0:51 / /dev/shm rw - tmpfs tmpfs rw\n", "mounts over"),
        ("ipc:[4026531839]", "99 24 0:22 /private /dev/shm rw - tmpfs tmpfs rw\n", "mounts over"),
        (None, HOST, None),
    ],
)
def test_what_can_not_be_noticed_is_said(tmp_path, ipc, own, says):
    """Of a container, and of a service with a mount of its own over the memory that all share."""
    (tmp_path / "self" / "ns").mkdir(parents=True)
    (tmp_path / "1").mkdir()
    if ipc is not None:
        (tmp_path / "self/ns/ipc").symlink_to(ipc)
    (tmp_path / "self/mountinfo").write_text(own)
    (tmp_path / "1/mountinfo").write_text(HOST)
    found = apart(tmp_path)
    assert found is None if says is None else says in (found or "")


def test_without_shared_memory_no_group_begins(monkeypatch, tmp_path):
    """The directory for temporary files, which a service may have to itself, is no place."""
    monkeypatch.setattr(shared_file, "_MEMORY", tmp_path / "missing")
    with pytest.raises(FleetError, match=r"can't be written here, and it is where"):
        check_group("g", LIMITS)
