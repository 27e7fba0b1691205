"""The route of recordings, over engines whose recorders tick beside it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shaper.config.model import build_config
from shaper.ipc.control_file import ControlFile
from shaper.ipc.recording_state import RecordingPhase, RecordingState
from tests.controlled import run
from tests.server.served import Served

__all__ = ["run"]

RECORD = "/v1/shaper/record"


class Recording(Served):
    """Engines that say of each order what the test wants."""

    says: tuple[RecordingPhase, RecordingPhase] = (RecordingPhase.RECORDING,) * 2
    number = 0

    def clock(self) -> float:
        for control, said, phase in zip(self.engines, self.said, self.says, strict=True):
            order = control.record_order
            if order is not None:
                number = order.sequence
                said["recording"] = RecordingState(number, phase, error_number=self.number)
        return super().clock()


@pytest.fixture
def served(run: str, tmp_path: Path) -> Iterator[Recording]:
    """With `tmp_path` as the server's recording directory."""
    made = Recording(run, config=build_config({"record_directory": str(tmp_path)}))
    yield made
    made.close()


def code(answer: tuple[int, Any]) -> tuple[int, str]:
    return answer[0], answer[1]["error"]["code"]


def test_one_recording_at_a_time(served: Recording, tmp_path: Path) -> None:
    """The answer has each engine's file; a second waits; after the end there is room again."""
    status, answer = served.ask("PUT", RECORD, {"file": "run.csv", "for": "30s"})
    assert status == 200, answer
    files = [engine["recording"]["file"] for engine in answer["engines"]]
    assert files == [str(tmp_path / "run.csv"), str(tmp_path / "run.rank1.csv")]
    assert 0 < answer["asked"]["record"]["seconds_left"] <= 30
    assert code(served.ask("PUT", RECORD, {"file": "other.csv"})) == (409, "busy")
    served.says = (RecordingPhase.ENDED,) * 2
    assert served.ask("DELETE", RECORD)[0] == 200
    served.says = (RecordingPhase.RECORDING,) * 2
    for said in served.said:
        said["recording"] = RecordingState(1, RecordingPhase.ENDED)
    served.write()
    assert served.ask("PUT", RECORD, {"file": "other.csv"})[0] == 200


@pytest.mark.parametrize(
    ("number", "says"), [(errno.ENOSPC, "No space"), (errno.EBUSY, "--record")]
)
def test_what_one_engine_can_not_do_none_does(
    run: str, served: Recording, number: int, says: str
) -> None:
    """The order is withdrawn, with the reason to who asked."""
    served.says, served.number = (RecordingPhase.RECORDING, RecordingPhase.FAILED), number
    status, answer = served.ask("PUT", RECORD, {"file": "run.csv"})
    assert (status, answer["error"]["code"]) == (409, "not_recorded")
    assert says in answer["error"]["message"]
    assert ControlFile(run).read().record is None


def test_a_recording_changes_no_budget(run: str, served: Recording) -> None:
    """A budget stands through a recording, and one that comes later does not end it."""
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
        *(
            "a.CSV",
            "x" * 300 + ".csv",
            "a.partial.csv",
            "-rf.csv",
            "~.csv",
            "a b.csv",
            "",
            "é.csv",
            None,
            7,
        ),
    ],
)
def test_a_name_is_all_that_can_be_said(run: str, served: Recording, file: object) -> None:
    """No path, no hidden file, no other ending; said in words and not as a pattern."""
    answer = served.ask("PUT", RECORD, {"file": file})
    assert code(answer) == (422, "invalid_value")
    assert "[A-Za-z" not in answer[1]["error"]["message"]
    assert ControlFile(run).read().record is None


def test_where_it_can_not_be_written_is_said_before(
    run: str, served: Recording, tmp_path: Path
) -> None:
    """With what to do; nothing reaches the engines."""
    (tmp_path / "run.rank1.parquet").write_text("mine")
    (tmp_path / "old.partial.csv").write_text("mine")
    for name in ("run.parquet", "old.parquet"):
        assert code(served.ask("PUT", RECORD, {"file": name})) == (409, "exists")
    served.service.config = build_config({"record_directory": str(tmp_path / "gone")})
    status, answer = served.ask("PUT", RECORD, {"file": "run.csv"})
    assert (status, answer["error"]["code"]) == (409, "not_writable")
    assert "SHAPER_RECORD_DIRECTORY" in answer["error"]["message"]
    assert ControlFile(run).read().record is None


def test_without_the_key_nothing_is_recorded(served: Recording) -> None:
    """Nor said."""
    answer = served.ask("PUT", RECORD, {"file": "run.csv"}, headers=[])
    assert code(answer) == (401, "invalid_admin_key")
