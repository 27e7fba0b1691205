"""Prometheus itself scrapes a server that sheds, and its alerts come."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from tests.e2e.conftest import Server, free_port, running_server
from tests.e2e.test_admission import BUDGETS, FLEX, SETTINGS, client, prompt
from tests.server.test_alerts import RULES

PROMETHEUS = shutil.which("prometheus")
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    pytest.mark.skipif(PROMETHEUS is None, reason="apt-get install prometheus"),
]
EXPECTED = {"ShaperShedding", "ShaperRefusing"}


@contextlib.contextmanager
def prometheus(directory: Path, server: Server) -> Iterator[str]:
    """The deployed rules with every span a few seconds; yields the address of the alerts."""
    assert PROMETHEUS is not None
    rules = re.sub(r"\bfor: \w+", "for: 1s", RULES.read_text())
    (directory / "alerts.yml").write_text(re.sub(r"\[\w+\]", "[3s]", rules))
    configuration: dict[str, Any] = yaml.safe_load((RULES.parent / "prometheus.yml").read_text())
    configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    target = {"targets": [f"127.0.0.1:{server.port}"]}
    configuration["scrape_configs"][0]["static_configs"] = [target]
    file = directory / "prometheus.yml"
    file.write_text(yaml.safe_dump(configuration))
    address = f"127.0.0.1:{free_port()}"
    command = [PROMETHEUS, f"--config.file={file}", f"--web.listen-address={address}"]
    command.append(f"--storage.tsdb.path={directory / 'samples'}")
    with (directory / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        yield f"http://{address}/api/v1/alerts"
    finally:
        process.kill()
        process.wait()


def firing(url: str) -> set[str]:
    """Names of the alerts that fire; none while Prometheus is on its way up."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            alerts = json.load(answer)["data"]["alerts"]
    except OSError:
        return set()
    return {each["labels"]["alertname"] for each in alerts if each["state"] == "firing"}


async def shed(server: Server, url: str) -> set[str]:
    """Floods the server, asks for flex work all the while.

    Returns:
        All alerts that fired until the expected ones had.
    """
    seen: set[str] = set()
    async with client(server) as people:
        flood = [asyncio.create_task(prompt(people, 100 + index)) for index in range(120)]

        async def ask() -> None:
            while True:
                with contextlib.suppress(openai.RateLimitError):
                    await prompt(people, 1, 20, extra_body=FLEX, timeout=1.0)
                await asyncio.sleep(0.1)

        async def asking() -> None:
            while True:
                with contextlib.suppress(openai.APITimeoutError):
                    await ask()

        def come() -> bool:
            seen.update(firing(url))
            return seen >= EXPECTED

        asked = asyncio.create_task(asking())
        try:
            await asyncio.to_thread(server.wait_for, "alerts", come, 120.0)
        finally:
            for task in (asked, *flood):
                task.cancel()
            await asyncio.gather(asked, *flood, return_exceptions=True)
    return seen


def test_shedding_brings_its_alerts(tmp_path: Path) -> None:
    """By the deployed rules, with shorter spans, over really scraped samples."""
    pytest.importorskip("vllm")
    settings = json.dumps(SETTINGS | BUDGETS["limit"])
    flags = ("--max-model-len", "8192", "--power-shaper-config", settings)
    with running_server(tmp_path, *flags) as server, prometheus(tmp_path, server) as url:
        assert asyncio.run(shed(server, url)) >= EXPECTED
