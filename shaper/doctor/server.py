"""A running server: its metrics, its control routes, and what they say.

Two or three GET requests, each with a deadline on the whole of it: a server that sends a byte now
and then hangs nobody. No proxy and no redirect is followed, so that the key goes to the
server that was named and nowhere else; what it answers is shown only in part.
"""

from __future__ import annotations

import http.client
import math
import queue
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from shaper.config.sources import ADMIN_KEY_VARIABLE, admin_key
from shaper.doctor.findings import Checks, Finding, json_object, plain
from shaper.errors import ConfigError

DEFAULT_URL = "http://127.0.0.1:8000"
_CHECKS = Checks("Server")
# vLLM's metrics of many engines take some hundred kilobytes.
_MOST_BYTES = 4 * 2**20
# The longest line of ours has some hundred characters; a hostile one must not take long.
_MOST_LINE = 2048
_SAMPLE = re.compile(r"(shaper_\w+)(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'\b(\w++)="((?:[^"\\]|\\.)*)"')
# The sampler reads 50 times a second; beyond a second the controller goes by prediction.
_FRESH_SECONDS = 1.0
_START = (
    "start it with shaper serve, or with --power-shaper-config and vLLM's other flags; if it "
    "was, see its log, and VLLM_PLUGINS above"
)


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: a status of HTTP and a body, or why there is none."""

    status: int = 0
    body: bytes = b""
    error: str = ""
    refused: bool = False
    """Nobody listens there."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample of a metric."""

    name: str
    labels: Mapping[str, str]
    value: float


def check_url(url: str) -> str:
    """A server's address as it is asked, without a path.

    Raises:
        ConfigError: it is none, or has a password in it, which is not repeated.
    """
    try:
        parts = urlsplit(url)
        port, known = parts.port, parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError as error:
        raise ConfigError(f"--url is no URL of a server; write {DEFAULT_URL}") from error
    if "@" in parts.netloc:
        raise ConfigError("--url has a user or password in it: leave them out")
    if not known or parts.path.rstrip("/") not in ("", "/v1") or parts.query or parts.fragment:
        raise ConfigError(f"--url {plain(url, 80)!r} is no URL of a server; write {DEFAULT_URL}")
    host = f"[{parts.hostname}]" if ":" in str(parts.hostname) else parts.hostname
    return f"{parts.scheme}://{host}" + ("" if port is None else f":{port}")


def ask(url: str, path: str, key: str | None, timeout_seconds: float) -> Answer:
    """One GET request, answered within the time or not at all."""
    answers: queue.Queue[Answer] = queue.Queue()

    def body() -> None:
        answers.put(_get(url, path, key, timeout_seconds))

    # A thread, because a socket's own timeout starts again with each byte.
    threading.Thread(target=body, daemon=True).start()
    try:
        return answers.get(timeout=timeout_seconds)
    except queue.Empty:
        return Answer(error=f"no whole answer within {timeout_seconds:g} s")


def _get(url: str, path: str, key: str | None, timeout_seconds: float) -> Answer:
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(str(parts.hostname), parts.port, timeout=timeout_seconds)
    try:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return Answer(answer.status, answer.read(_MOST_BYTES))
    except ConnectionRefusedError:
        return Answer(error="connection refused", refused=True)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Answer(error=plain(error, 120) or type(error).__name__)
    finally:
        connection.close()


def samples(text: str) -> list[Sample]:
    """The shaper's samples of a page of metrics; broken lines are left out."""
    found = []
    for line in text.splitlines():
        match = _SAMPLE.fullmatch(line.strip()) if len(line) <= _MOST_LINE else None
        if match is None:
            continue
        try:
            value = float(match[3])
        except ValueError:
            continue
        found.append(Sample(match[1], dict(_LABEL.findall(match[2] or "")), value))
    return found


def server_findings(
    url: str | None, environ: Mapping[str, str], timeout_seconds: float
) -> list[Finding]:
    """All of this module's.

    Args:
        url: of the server, from `check_url`; None: the usual one, where none may be.
        environ: the key is read from it.
        timeout_seconds: for each request.
    """
    base = url or DEFAULT_URL
    page = ask(base, "/metrics", None, timeout_seconds)
    if page.refused and url is None:
        found = f"none at {base}; --url names one elsewhere"
        return [_CHECKS.ok("server.answers", found, url=base, up=False)]
    if page.error:
        advice = "is it up and done with loading? Is this its address?"
        said = f"{base} does not answer: {page.error}"
        if url is None:
            return [_CHECKS.warn("server.answers", said, advice, url=base, up=False)]
        return [_CHECKS.fail("server.answers", said, advice, url=base, up=False)]
    if page.status != 200:
        said = f"{base} answers, and /metrics with {page.status}"
        advice = "this is no vLLM server: give its address with --url"
        make = _CHECKS.warn if url is None else _CHECKS.fail
        return [make("server.answers", said, advice, url=base, up=True)]
    shown = samples(page.body.decode(errors="replace"))
    answers = _CHECKS.ok("server.answers", f"{base} is up", url=base, up=True)
    return [answers, *metric_findings(shown), *route_findings(base, environ, timeout_seconds)]


def metric_findings(found: Sequence[Sample]) -> list[Finding]:
    """What the shaper's metrics say."""
    engines = [sample for sample in found if sample.name == "shaper_info"]
    if not engines:
        said = "/metrics has none of the shaper's: this server is not shaped"
        return [_CHECKS.fail("server.metrics", said, _START, engines=0)]
    shown = engines[0].labels
    runs = f"shaper {shown.get('version', '?')}, {shown.get('gpu', '?')}, {shown.get('model', '?')}"
    count = f"{len(engines)} engine{'s' if len(engines) > 1 else ''}"
    metrics = _CHECKS.ok(
        "server.metrics",
        f"the shaper's are there: {count}, {plain(runs, 120)}",
        engines=len(engines),
    )
    return [metrics, _mode(found), _fresh(found), _well(found)]


def _of(found: Sequence[Sample], name: str) -> dict[str, float]:
    """The values of a metric by engine."""
    values = {s.labels.get("engine", "?"): s.value for s in found if s.name == name}
    return {plain(engine, 10): value for engine, value in values.items()}


_LIMITS = {"shaper_power_limit_watts": "", "shaper_group_limit_watts": " with its power group"}


def _mode(found: Sequence[Sample]) -> Finding:
    modes = {
        plain(s.labels.get("engine", "?"), 10): plain(s.labels.get("mode", "?"), 10)
        for s in found
        if s.name == "shaper_mode" and s.value == 1.0
    }
    limits = sorted(
        (
            plain(s.labels.get("engine"), 10),
            plain(s.labels.get("window_seconds"), 10) + " s" + _LIMITS[s.name],
            s.value,
        )
        for s in found
        if s.name in _LIMITS
    )
    held = ", ".join(f"{w:g} W over {window}" for _, window, w in limits[:4]) or "no limit"
    said = ", ".join(f"engine {engine} is {mode}" for engine, mode in sorted(modes.items()))
    data = {"modes": modes, "limits": len(limits)}
    if any(mode != "on" for mode in modes.values()):
        return _CHECKS.warn(
            "server.mode",
            f"{said} ({held})",
            "nothing is held back in shadow or off; shaper mode on switches it on",
            **data,
        )
    return _CHECKS.ok("server.mode", f"{said or 'not said'} ({held})", **data)


def _fresh(found: Sequence[Sample]) -> Finding:
    ages = {
        "sample": _of(found, "shaper_sample_age_seconds"),
        "heartbeat": _of(found, "shaper_heartbeat_age_seconds"),
    }
    lost = [engine for engine, value in _of(found, "shaper_sensor_lost").items() if value]
    oldest = max((v for each in ages.values() for v in each.values()), default=math.nan)
    data = {"oldest_seconds": oldest, "sensor_lost": lost}
    stale = {
        engine: age
        for each in ages.values()
        for engine, age in each.items()
        if not age <= _FRESH_SECONDS
    }
    if stale or lost:
        parts = [f"engine {e} by {age:.1f} s" for e, age in sorted(stale.items())]
        said = f"readings are stale: {', '.join(parts)}" if parts else "readings are not believed"
        said += f"; sensor lost: engine {', '.join(sorted(lost))}" if lost else ""
        return _CHECKS.fail(
            "server.readings",
            said,
            "the engine goes by prediction and keeps more free; see the GPUs above, and the first "
            "warning of each kind in the server's log",
            **data,
        )
    if not ages["sample"]:
        return _CHECKS.warn(
            "server.readings",
            "no reading yet",
            "fine right after the start; with sensor none it stays so, and the engine goes by "
            "prediction alone. Else see the server's log",
            **data,
        )
    return _CHECKS.ok("server.readings", f"fresh, the oldest {oldest:.2f} s", **data)


_PROBLEMS = {
    "shaper_errors_total": "failures inside the shaper",
    "shaper_supervisor_errors_total": "failures of the supervisor",
    "shaper_sample_read_errors_total": "failed reads of the GPUs",
    "shaper_control_refused_total": "refused changes of the budget",
    "shaper_group_errors_total": "failures of the group's heartbeat",
    "shaper_flex_errors_total": "failures of deferral",
    "shaper_budget_infeasible": "budget below what serving needs",
    "shaper_group_detached": "group's file was removed",
    "shaper_model_disagrees": "the model disagrees with the meter",
    "shaper_meter_disagrees": "a GPU's energy counter disagrees with its own power reading",
}
_PART_ERRORS = "shaper_part_errors_total"


def _well(found: Sequence[Sample]) -> Finding:
    sums = {name: sum(v for v in _of(found, name).values() if v > 0) for name in _PROBLEMS}
    said = [f"{_PROBLEMS[name]} ({name} {value:g})" for name, value in sums.items() if value]
    parts: dict[str, float] = {}
    for sample in found:
        if sample.name == _PART_ERRORS and sample.value > 0:
            part = plain(sample.labels.get("part", "?"), 30)
            parts[part] = parts.get(part, 0.0) + sample.value
    failed = [f"{part} {count:g}" for part, count in sorted(parts.items())]
    if failed:
        said.append(f"failures of single parts ({_PART_ERRORS}: {', '.join(failed)})")
    if said:
        return _CHECKS.warn(
            "server.counters",
            "; ".join(said),
            "see the server's log for when and why (docs/operating.md says what each means)",
            **sums,
            **{_PART_ERRORS: parts},
        )
    return _CHECKS.ok("server.counters", "no failure is counted", **sums, **{_PART_ERRORS: parts})


def route_findings(base: str, environ: Mapping[str, str], timeout_seconds: float) -> list[Finding]:
    """Whether the control routes are there, and what the state says where a key is at hand."""
    try:
        key = admin_key(environ)
    except ConfigError:
        key = None  # `host.admin_key` says so
    # The key goes only to who wants it as the shaper does.
    answer = ask(base, "/v1/shaper/state", None, timeout_seconds)
    if key is not None and _wants_key(answer):
        answer = ask(base, "/v1/shaper/state", key, timeout_seconds)
    said = json_object(answer.body)
    if answer.error:
        text = f"/v1/shaper/state does not answer: {answer.error}"
        return [_CHECKS.fail("server.routes", text, "see the server's log", up=False)]
    if _wants_key(answer):
        if key is None:
            text = f"they answer, and want a key; with {ADMIN_KEY_VARIABLE} set here more is shown"
            return [_CHECKS.ok("server.routes", text, up=True, authorised=False)]
        return [
            _CHECKS.fail(
                "server.routes",
                f"they refuse the key of {ADMIN_KEY_VARIABLE}",
                f"set {ADMIN_KEY_VARIABLE} to what the server was started with",
                up=True,
                authorised=False,
            )
        ]
    engines = said.get("engines")
    if answer.status == 200 and isinstance(engines, list):
        return [_state(said, [engine for engine in engines if isinstance(engine, dict)])]
    return [
        _CHECKS.warn(
            "server.routes",
            f"there are none (/v1/shaper/state answers with {answer.status})",
            f"to change the budget while it runs, start the server with {ADMIN_KEY_VARIABLE} set",
            up=False,
        )
    ]


def _wants_key(answer: Answer) -> bool:
    detail = json_object(answer.body).get("error")
    code = detail.get("code") if isinstance(detail, dict) else None
    return answer.status == 401 and code == "invalid_admin_key"


def _state(state: Mapping[str, Any], engines: Sequence[Mapping[str, Any]]) -> Finding:
    asked = state.get("asked")
    asked = asked if isinstance(asked, dict) else {}
    data = {"up": True, "authorised": True, "engines": len(engines)}
    if "error" in asked:
        return _CHECKS.fail(
            "server.routes",
            "they answer, and the control file is not believed",
            "clear the budget and set it again; see the server's log",
            **data,
        )
    behind = [
        plain(engine.get("engine"), 10)
        for engine in engines
        if engine.get("acknowledged_sequence") != engine.get("followed_sequence")
    ]
    if behind:
        return _CHECKS.warn(
            "server.routes",
            f"they answer; engine {', '.join(behind)} has not followed the last change",
            "shaper budget show says what holds; if it stays so, see the server's log",
            **data,
        )
    change = (
        "a change is in force"
        if asked.get("budget") or asked.get("mode")
        else "no change was asked for"
    )
    return _CHECKS.ok("server.routes", f"they answer with the key; {change}", **data)
