"""The route of recordings, over engines whose recorders tick beside it."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from shaper.config.model import build_config
from shaper.ipc.control_file import ControlFile
from shaper.ipc.recording_state import RecordingPhase, RecordingState
from shaper.server import routes
from tests.controlled import run
from tests.server.test_routes import Served

__all__ = ["run"]

RECORD = "/v1/shaper/record"


class Recording(Served):
    """Engines that say of each order what the test wants."""

    says: tuple[RecordingPhase, RecordingPhase] = (RecordingPhase.RECORDING,) * 2
    number = 0

    def clock(self) -> float:
        for control, writer, phase in zip(self.engines, self.writers, self.says, strict=True):
            order = control.record_order
            if order is not None:
                number = order.origin.sequence
                state = RecordingState(number, phase, error_number=self.number)
                writer.write("recording", state.values())
        return super().clock()


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The server's recording directory."""
    config = build_config({"record_directory": str(tmp_path)})
    monkeypatch.setattr(routes, "_config", lambda scope: config)
    return tmp_path


def code(answer: tuple[int, Any]) -> tuple[int, str]:
    return answer[0], answer[1]["error"]["code"]


def test_one_recording_at_a_time(run: str, directory: Path) -> None:
    """The answer has each engine's file; a second waits; after the end there is room again."""
    served = Recording(run)
    status, answer = served.ask("PUT", RECORD, {"file": "run.csv", "for": "30s"})
    assert status == 200, answer
    files = [engine["recording"]["file"] for engine in answer["engines"]]
    assert files == [str(directory / "run.csv"), str(directory / "run.rank1.csv")]
    assert 0 < answer["asked"]["record"]["seconds_left"] <= 30
    assert code(served.ask("PUT", RECORD, {"file": "other.csv"})) == (409, "busy")
    served.says = (RecordingPhase.ENDED,) * 2
    assert served.ask("DELETE", RECORD)[0] == 200
    served.says = (RecordingPhase.RECORDING,) * 2
    for writer in served.writers:
        writer.write("recording", RecordingState(1, RecordingPhase.ENDED).values())
    assert served.ask("PUT", RECORD, {"file": "other.csv"})[0] == 200


@pytest.mark.parametrize(
    ("number", "says"), [(errno.ENOSPC, "No space"), (errno.EBUSY, "--record")]
)
def test_what_one_engine_can_not_do_none_does(
    run: str, directory: Path, number: int, says: str
) -> None:
    """The order is withdrawn, with the reason to who asked."""
    served = Recording(run)
    served.says, served.number = (RecordingPhase.RECORDING, RecordingPhase.FAILED), number
    status, answer = served.ask("PUT", RECORD, {"file": "run.csv"})
    assert (status, answer["error"]["code"]) == (409, "not_recorded")
    assert says in answer["error"]["message"]
    assert ControlFile(run).read().record is None


def test_a_recording_changes_no_budget(run: str, directory: Path) -> None:
    """A budget stands through a recording, and one that comes later does not end it."""
    served = Recording(run)
    assert served.ask("PUT", "/v1/shaper/budget", {"limits": ["400W@1s"]})[0] == 200
    assert served.ask("PUT", RECORD, {"file": "run.csv"})[0] == 200
    assert served.ask("PUT", "/v1/shaper/budget", {"limits": ["410W@1s"]})[0] == 200
    record = ControlFile(run).read()
    assert record.record is not None
    assert record.budget is not None
    assert {engine.state.budget.limits[0].watts for engine in served.engines} == {410.0}


@pytest.mark.parametrize(
    "file",
    [
        *("../a.csv", "/etc/a.csv", "a/b.csv", "a", "a.txt", ".a.csv", "a.csv\n", "a\0.csv"),
        *("a.CSV", "x" * 300 + ".csv", "a.partial.csv", "-rf.csv", "~.csv", "a b.csv", "", None, 7),
    ],
)
def test_a_name_is_all_that_can_be_said(run: str, directory: Path, file: object) -> None:
    """No path, no hidden file, no other ending."""
    assert code(Recording(run).ask("PUT", RECORD, {"file": file})) == (422, "invalid_value")
    assert ControlFile(run).read().record is None


def test_where_it_can_not_be_written_is_said_before(
    run: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what to do; nothing reaches the engines."""
    served = Recording(run)
    (directory / "run.rank1.parquet").write_text("mine")
    (directory / "old.partial.csv").write_text("mine")
    for name in ("run.parquet", "old.parquet"):
        assert code(served.ask("PUT", RECORD, {"file": name})) == (409, "exists")
    gone = build_config({"record_directory": str(directory / "gone")})
    monkeypatch.setattr(routes, "_config", lambda scope: gone)
    status, answer = served.ask("PUT", RECORD, {"file": "run.csv"})
    assert (status, answer["error"]["code"]) == (409, "not_writable")
    assert "SHAPER_RECORD_DIRECTORY" in answer["error"]["message"]
    assert ControlFile(run).read().record is None


def test_without_the_key_nothing_is_recorded(run: str, directory: Path) -> None:
    """Nor said."""
    served = Recording(run)
    answer = served.ask("PUT", RECORD, {"file": "run.csv"}, headers=[])
    assert code(answer) == (401, "invalid_admin_key")
