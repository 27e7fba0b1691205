"""What the doctor's tests share: a small HTTP server, and the command in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KEY = "0123456789abcdef0123456789abcdef"
METRICS = """\
# HELP shaper_info What this engine's shaper runs with.
vllm:num_requests_running{engine="0"} 3.0
shaper_info{engine="0",version="0.1.0",gpu="h200-sxm",model="llama-3.1-8b",policy="windowed"} 1.0
shaper_mode{engine="0",mode="on"} 1.0
shaper_mode{engine="0",mode="shadow"} 0.0
shaper_power_limit_watts{engine="0",window_seconds="1"} 560.0
shaper_sample_age_seconds{engine="0"} 0.011
shaper_heartbeat_age_seconds{engine="0"} 0.011
shaper_sensor_lost{engine="0"} 0.0
shaper_errors_total{engine="0"} 0.0
"""
STATE: dict[str, Any] = {
    "asked": {},
    "configured": None,
    "engines": [{"engine": 0, "acknowledged_sequence": 3, "followed_sequence": 3}],
}


@dataclass
class FakeServer:
    """What it answers; the requests that came."""

    metrics: str | None = METRICS
    state: Mapping[str, Any] | None = field(default_factory=lambda: dict(STATE))
    key: str = KEY
    drips: bool = False
    """It sends its headers, then nothing."""
    url: str = ""
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def answer(self, path: str, authorization: str | None) -> tuple[int, str]:
        """Status and body."""
        if path == "/metrics" and self.metrics is not None:
            return 200, self.metrics
        if path == "/v1/shaper/state" and self.state is not None:
            if authorization != f"Bearer {self.key}":
                return 401, json.dumps({"error": {"code": "invalid_admin_key", "message": "no"}})
            return 200, json.dumps(self.state)
        return 404, "not found"


@contextlib.contextmanager
def serving(server: FakeServer) -> Iterator[FakeServer]:
    """Serves on a free port of 127.0.0.1 until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            authorization = self.headers.get("Authorization")
            server.asked.append((self.path, authorization))
            status, body = server.answer(self.path, authorization)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) + 10 * server.drips))
            self.end_headers()
            self.wfile.write(body.encode())
            if server.drips:
                self.wfile.flush()
                server.ended.wait(30.0)

        def log_message(self, *args: Any) -> None:
            """Nothing on stderr."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        server.url = f"http://127.0.0.1:{http.server_address[1]}"
        try:
            yield server
        finally:
            server.ended.set()
            http.shutdown()
            thread.join()


def run_doctor(
    *arguments: str, environ: Mapping[str, str] | None = None, gpus: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """`shaper doctor --quick ...`, without this process's SHAPER_ variables.

    Args:
        arguments: after `--quick`.
        environ: more variables.
        gpus: a script of the fake driver; None: no NVIDIA driver is faked.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SHAPER_", "VLLM_", "CUDA_"))}
    if gpus is not None:
        path = (str(ROOT / "tests" / "gpu" / "fake_pynvml"), str(ROOT))
        kept |= {"PYTHONPATH": os.pathsep.join(path), "FAKE_NVML_SCRIPT": str(gpus)}
    return subprocess.run(
        [sys.executable, "-m", "shaper", "doctor", "--quick", *arguments],
        env=kept | dict(environ or {}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def findings_of(result: subprocess.CompletedProcess[str]) -> dict[tuple[str, str], dict[str, Any]]:
    """The findings of `--json`, by check and subject."""
    found = json.loads(result.stdout)["findings"]
    return {(one["check"], one["subject"] or ""): one for one in found}
