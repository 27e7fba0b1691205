"""Files of groups that nobody lives in go; all others stay."""

from __future__ import annotations

import os
import time
from pathlib import Path

from shaper.group import cleanup_groups
from shaper.group.lock import MEMBERSHIP, ByteLocks
from tests.group.members import join


def killed(folder: Path, name: str = "g") -> None:
    """A member whose locks are gone, as the kernel leaves them."""
    join(folder, name=name).forked()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_the_dead_launched_stays_until_it_has_left_every_window(folder):
    """A server that starts again at once finds it; a minute later nobody needs it."""
    killed(folder)
    now = time.monotonic()
    cleanup_groups(now + 59.0, directory=folder)
    assert names(folder) == {"g.group"}
    cleanup_groups(now + 61.0, directory=folder)
    assert names(folder) == set()


def test_a_group_that_has_ended_goes_at_once_and_no_other(folder):
    """Its servers have ended in order: there is nothing in flight. Where no group ever was the
    directory is not made for it."""
    cleanup_groups(time.monotonic(), "g", directory=folder)
    assert not folder.exists()
    killed(folder)
    killed(folder, "other")
    cleanup_groups(time.monotonic(), "g", directory=folder)
    assert names(folder) == {"other.group"}


def test_a_living_group_stays(folder):
    """Also one that has said nothing for an hour, and one whose server here has ended."""
    living = join(folder)
    killed(folder)
    cleanup_groups(time.monotonic() + 3600.0, "g", directory=folder)
    assert names(folder) == {"g.group"}
    living.leave()


def test_a_group_that_somebody_joins_is_left_alone(folder):
    """And not waited for."""
    killed(folder)
    joining = ByteLocks(os.open(folder / "g.group", os.O_RDWR))
    assert joining.take(MEMBERSHIP)
    before = time.monotonic()
    cleanup_groups(before + 3600.0, "g", directory=folder)
    assert names(folder) == {"g.group"}
    joining.give(MEMBERSHIP)
    cleanup_groups(before + 3600.0, directory=folder)
    assert names(folder) == set()


def test_what_is_no_group_s_file_is_never_removed(folder):
    """A link, a directory, text, half a file: an operator decides."""
    killed(folder)
    whole = (folder / "g.group").read_bytes()
    (folder / "text.group").write_text("not ours")
    (folder / "half.group").write_bytes(whole[: len(whole) // 2])
    (folder / "link.group").symlink_to(folder / "target")
    (folder / "target").write_bytes(whole)
    (folder / "open.group").write_bytes(whole)
    for path in folder.glob("*.group"):
        if not path.is_symlink():
            path.chmod(0o644 if path.stem == "open" else 0o600)
    (folder / "room.group").mkdir()
    cleanup_groups(time.monotonic() + 3600.0, directory=folder)
    assert names(folder) == {
        *("text.group", "half.group", "link.group", "target", "open.group", "room.group")
    }
