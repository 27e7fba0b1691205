"""A running server's recording, as an operator asks for it, and its readings played again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from shaper.emulator.playback import recorded_readings
from shaper.recording.format import Recording, read_recording
from tests.e2e.conftest import MODEL, Server, running_server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

KEY = "an-admin-key-of-a-test"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server records, its file to play in it."""
    return tmp_path_factory.mktemp("recordings")


@pytest.fixture(scope="module")
def played(directory: Path) -> Path:
    """A second of readings of two GPUs at powers that no step of the test draws."""
    path = directory / "played.csv"
    header = "read_seconds,gpu_index,instant_watts,average_watts,energy_joules\n"
    rows = [
        f"{100 + 0.02 * n},{gpu},{300 + gpu + n % 7},{310 + gpu + n % 5},{6.2 * n}\n"
        for n in range(51)
        for gpu in (0, 1)
    ]
    path.write_text(header + "".join(rows))
    return path


@pytest.fixture(scope="module")
def server(directory: Path, played: Path) -> Iterator[Server]:
    """Two data-parallel ranks that play a recording and may write others."""
    pytest.importorskip("vllm")
    flags = ["--emulate", f"replay:{played}", "--gpu-profile", "h200-sxm"]
    flags += ["--power-limit", "560W@1s", "--max-model-len", "4096", "--data-parallel-size", "2"]
    environment = {"SHAPER_ADMIN_KEY": KEY, "SHAPER_RECORD_DIRECTORY": str(directory)}
    with running_server(directory, *flags, environment=environment) as started:
        yield started


def recorder(server: Server, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "shaper", "record", *arguments, "--url", server.url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"SHAPER_ADMIN_KEY": KEY},
    )


def ask(server: Server, count: int = 4) -> None:
    """Some completions at once, all of which are answered."""
    answered = []

    def one(number: int) -> None:
        body = {"model": MODEL, "prompt": f"{number} " + "power " * 200, "max_tokens": 30}
        request = urllib.request.Request(
            f"{server.url}/v1/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as found:
            answered.append(found.status)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answered == [200] * count


def put(server: Server, **body: object) -> tuple[int, str]:
    """Status and error code of a request for a recording."""
    request = urllib.request.Request(
        f"{server.url}/v1/shaper/record",
        data=json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {KEY}"},
        method="PUT",
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as found:
            return int(found.status), ""
    except urllib.error.HTTPError as error:
        with error:
            return error.code, str(json.load(error)["error"]["code"])


def phases(server: Server) -> set[str]:
    """How the last recording goes, of all engines."""
    request = urllib.request.Request(
        f"{server.url}/v1/shaper/state", headers={"Authorization": f"Bearer {KEY}"}
    )
    with urllib.request.urlopen(request, timeout=30) as found:
        return {each["recording"]["phase"] for each in json.load(found)["engines"]}


def test_each_engine_writes_its_steps_and_the_readings_that_are_played(
    server: Server, directory: Path
) -> None:
    """Ended by its client's Ctrl-C; meanwhile a second recorder is turned away."""
    client = recorder(server, "run.parquet", "--duration", "10min")
    assert client.stdout is not None
    first = [client.stdout.readline() for _ in range(2)]
    assert [line.split()[1:2] for line in first] == [["0"], ["1"]], first
    for _ in range(2):
        ask(server, 8)
    assert put(server, file="other.csv") == (409, "busy")
    client.send_signal(signal.SIGINT)
    said, errors = client.communicate(timeout=60)
    assert client.returncode == 0, said + errors
    readings = recorded_readings(directory / "played.csv")
    steps = 0
    for rank, name in enumerate(("run.parquet", "run.rank1.parquet")):
        recording: Recording = read_recording(directory / name)
        assert recording.meta["gpu"] == "h200-sxm"
        steps += len(recording.steps)
        known = {reading[rank].instant_watts for reading in readings}
        assert {sample.instant_watts for sample in recording.samples} <= known
        joules = [s.energy_joules for s in recording.samples if s.energy_joules is not None]
        assert joules == sorted(joules)
    assert steps > 60
    fitted = subprocess.run(
        [sys.executable, "-m", "shaper", "fit", str(directory / "run.parquet")],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (fitted.returncode, fitted.stderr) == (0, "")
    assert "memory.gemm_ratio" in fitted.stdout
    assert not list(directory.glob("*.partial.csv"))


def test_it_ends_by_itself_when_its_client_is_killed(server: Server, directory: Path) -> None:
    """The time is the engines', not the client's; `shaper fit` can read what they wrote."""
    client = recorder(server, "alone.csv", "--duration", "4s")
    assert client.stdout is not None
    client.stdout.readline()
    client.kill()
    client.communicate(timeout=60)
    ask(server)
    server.wait_for("the end", lambda: put(server, file="next.csv", **{"for": "1s"})[0] == 200)
    assert len(read_recording(directory / "alone.csv").samples) > 20
    server.wait_for("the end of that", lambda: phases(server) == {"ended"})
    assert put(server, file="next.csv") == (409, "exists")


def test_no_file_is_written_over_and_no_path_is_taken(server: Server, directory: Path) -> None:
    """What is there stays byte by byte, links lead nowhere, and nothing is begun."""
    secret = directory / "secret.txt"
    secret.write_text("mine")
    (directory / "link.csv").symlink_to(secret)
    (directory / "there.rank1.csv").write_text("mine")
    for name in ("link.csv", "there.csv"):
        assert put(server, file=name) == (409, "exists")
    names = ("../up.csv", "/tmp/abs.csv", "a.txt", ".csv", ".x.csv", "a.partial.csv", "a\n.csv", "")
    for name in names:
        assert put(server, file=name) == (422, "invalid_value"), name
    for time in ("0s", "2h", "nan"):
        assert put(server, file="time.csv", **{"for": time})[0] == 422
    assert secret.read_text() == (directory / "there.rank1.csv").read_text() == "mine"
    assert not (directory / "there.csv").exists()
    assert not (directory / "time.csv").exists()
    ask(server)
    assert "Traceback" not in server.log.read_text()
