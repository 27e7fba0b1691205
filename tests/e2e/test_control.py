"""A running server's budget and mode, changed under load as an operator changes them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest

from tests.e2e.conftest import MODEL, Server, running_server
from tests.e2e.test_flag import plain_vllm

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

KEY = "an-admin-key-of-a-test"
VLLM_KEY = "a-key-of-vllm"
RANKS = ("0", "1")


@pytest.fixture(scope="module")
def controlled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two data-parallel ranks behind two API servers, with vLLM's own key as well."""
    pytest.importorskip("vllm")
    flags = ["--power-limit", "690W@1s", "--max-model-len", "4096", "--api-key", VLLM_KEY]
    flags += ("--data-parallel-size", "2", "--api-server-count", "2")
    directory = tmp_path_factory.mktemp("controlled")
    with running_server(directory, *flags, environment={"SHAPER_ADMIN_KEY": KEY}) as server:
        yield server


def shaper(server: Server, *arguments: str, key: str = KEY) -> subprocess.CompletedProcess[str]:
    """The command, as an operator gives it."""
    return subprocess.run(
        [sys.executable, "-m", "shaper", *arguments, "--url", server.url],
        capture_output=True,
        text=True,
        env=os.environ | {"SHAPER_ADMIN_KEY": key},
        check=False,
        timeout=60,
    )


def state(server: Server) -> dict[str, dict[str, object]]:
    """Each engine's part of the state, by its rank."""
    done = shaper(server, "budget", "show", "--json")
    assert done.returncode == 0, done.stderr
    return {str(each["engine"]): each for each in json.loads(done.stdout)["engines"]}


def mean_watts(server: Server, seconds: float) -> dict[str, float]:
    """Metered mean power of each rank over some seconds."""

    def read() -> dict[str, float]:
        name = "shaper_energy_joules_total{"
        lines = [line for line in server.metrics().splitlines() if line.startswith(name)]
        return {line.split('"')[1]: float(line.rsplit(" ", 1)[1]) for line in lines}

    start, before = time.monotonic(), read()
    time.sleep(seconds)
    after, end = read(), time.monotonic()
    assert set(before) == set(RANKS)
    return {rank: (after[rank] - before[rank]) / (end - start) for rank in RANKS}


@contextmanager
def load(server: Server) -> Iterator[list[int]]:
    """Long prompts with short answers, as many as keep two GPUs busy on a small host; yields
    what has been answered so far."""
    stop, answered = threading.Event(), [0]

    def ask(worker: int) -> None:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=VLLM_KEY, max_retries=0)
        with client:
            while not stop.is_set():
                prompt = f"{worker} {answered[0]} " + "power " * 580
                client.completions.create(model=MODEL, prompt=prompt, max_tokens=8)
                answered[0] += 1

    threads = [threading.Thread(target=ask, args=(worker,)) for worker in range(12)]
    for thread in threads:
        thread.start()
    try:
        yield answered
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def wait_for_watts(server: Server, above: float) -> None:
    """Until both ranks draw that much; the load's own ups and downs pass."""
    server.wait_for(
        f"both ranks above {above:g} W",
        lambda: min(mean_watts(server, 1.5).values()) > above,
        seconds=60,
    )


def test_a_limit_changed_under_load_holds_without_a_restart(controlled: Server) -> None:
    """Both ranks say so at once, their meters follow, and requests go on; then back."""
    with load(controlled) as answered:
        wait_for_watts(controlled, 330)
        done = shaper(controlled, "budget", "set", "300W@1s", "--for", "10min", "--why", "test")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("300 W over 1 s (changed") == 2
        assert controlled.metric("shaper_power_limit_watts") == 600.0
        before = answered[0]
        mean_watts(controlled, 1.0)  # the longest window, in which the change takes effect
        held = mean_watts(controlled, 4.0)
        assert max(held.values()) < 300 * 1.02, held
        assert answered[0] > before
        # Off is vLLM as it is, at run time; then on again.
        assert shaper(controlled, "mode", "off").returncode == 0
        wait_for_watts(controlled, 330)
        assert {each["mode"] for each in state(controlled).values()} == {"off"}
        assert shaper(controlled, "mode", "on").returncode == 0
        mean_watts(controlled, 1.0)
        held = mean_watts(controlled, 4.0)
        assert max(held.values()) < 300 * 1.02, held
        assert shaper(controlled, "budget", "clear").returncode == 0
        wait_for_watts(controlled, 330)
    assert {each["source"] for each in state(controlled).values()} == {"configured"}
    log = controlled.log.read_text()
    changes = re.findall(r"690 W over 1 s -> 300 W over 1 s \(changed, change (\d+) by", log)
    # Both engines say it once; which number it has depends on the tests before this one.
    assert changes
    assert all(changes.count(number) == 2 for number in changes)
    assert "Traceback" not in log


def test_a_change_ends_by_itself(controlled: Server) -> None:
    """After its time its fallback holds, on every rank."""
    arguments = ("budget", "set", "400W@1s", "--for", "1s", "--fallback", "500W@1s")
    assert shaper(controlled, *arguments).returncode == 0
    controlled.wait_for(
        "the fallback on both ranks",
        lambda: controlled.metric("shaper_power_limit_watts") == 1000.0,
    )
    assert {each["source"] for each in state(controlled).values()} == {"fallback"}
    assert shaper(controlled, "budget", "clear").returncode == 0


def answer(server: Server, path: str, key: str | None) -> int:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{server.url}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as found:
            return int(found.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_each_key_opens_its_own_routes(controlled: Server) -> None:
    """vLLM's key is neither needed nor enough here, nor ours there; none is in a log."""
    assert answer(controlled, "/v1/shaper/state", None) == 401
    assert answer(controlled, "/v1/shaper/state", VLLM_KEY) == 401
    assert answer(controlled, "/v1/shaper/state", KEY) == 200
    assert answer(controlled, "/v1/models", KEY) == 401
    assert answer(controlled, "/v1/models", VLLM_KEY) == 200
    assert KEY not in controlled.log.read_text()
    wrong = shaper(controlled, "budget", "show", key="another-key-of-a-test")
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)
    assert "refuses the key" in wrong.stderr


def test_what_no_engine_can_keep_is_refused(controlled: Server) -> None:
    """With the idle power, before anything changes."""
    done = shaper(controlled, "budget", "set", "100W@1s")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "draw idle (115 W)" in done.stderr
    assert controlled.metric("shaper_power_limit_watts") == 1380.0


def test_without_a_key_there_are_no_routes(shaped_server: Server) -> None:
    """Off by default: vLLM's own 404, and a command that says why."""
    assert answer(shaped_server, "/v1/shaper/state", KEY) == 404
    done = shaper(shaped_server, "budget", "set", "400W@1s")
    assert done.returncode == 2
    assert "no control routes" in done.stderr


def test_the_key_is_on_no_command_line(controlled: Server, tmp_path: Path) -> None:
    """Of none of the server's processes."""
    group = controlled.process.pid
    lines = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(path.name)) == group:
                lines.append((path / "cmdline").read_bytes())
        except (ProcessLookupError, FileNotFoundError):
            continue
    assert len(lines) >= 5
    assert not any(KEY.encode() in line for line in lines)


def test_a_plain_vllm_has_the_routes_too(tmp_path: Path) -> None:
    """With the plug-in's flag, and the key in its file."""
    settings = tmp_path / "budget.toml"
    settings.write_text(f'admin_key = "{KEY}"\nlimits = ["560W@1s"]\n')
    with plain_vllm(tmp_path, "--power-shaper-config", str(settings)) as server:
        done = shaper(server, "budget", "set", "--ramp", "200W/s", "--why", "test")
        assert done.returncode == 0, done.stderr
        assert "560 W over 1 s, rising 200 W/s at most (changed)" in done.stdout
        assert answer(server, "/v1/shaper/state", "wrong-key-of-a-test") == 401
        assert answer(server, "/v1/models", None) == 200
        assert KEY not in server.log.read_text()
