"""Open-loop load over HTTP streaming: each request leaves when it is due,
whether or not earlier ones have finished.

The definitions are those of `vllm bench serve`: a token's time is that of the
stream's chunk that carried it, the end-to-end latency ends with the last token,
and the prompt leaves as token ids, so that lengths are exact. Times are
`CLOCK_MONOTONIC` seconds, which also stamps the emulated GPU's power trace.

The client shares the machine with the server, so it does as little as it can
per token, and measures what it costs.
"""

from __future__ import annotations

import asyncio
import gc
import json
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import aiohttp
import numpy as np
from numpy.typing import NDArray

from bench.harness.stream import StreamError, TokenStream
from shaper.traffic.workload import TimedRequest, Workload, prompt_token_ids

# A request that leaves this much after it was due makes the load lighter than
# the trace's: counted and shown.
LATE_SECONDS = 0.020
_LAG_PROBE_SECONDS = 0.050


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """Where the load goes and what bounds it."""

    url: str
    model: str
    max_in_flight: int = 2048
    drain_seconds: float = 120.0
    """How long requests may still run after the last arrival."""


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """What became of one request; times are monotonic seconds.

    `token_seconds` [chunks] holds the time of each chunk with a token.
    `output_tokens` is what the server counted; it exceeds the chunks where the
    server put several tokens into one. `error` is None for a finished request.
    """

    request: TimedRequest
    due_seconds: float
    sent_seconds: float
    token_seconds: NDArray[np.float64]
    output_tokens: int
    error: str | None = None

    @property
    def late_seconds(self) -> float:
        """How much later than due it left."""
        return max(0.0, self.sent_seconds - self.due_seconds)


@dataclass(frozen=True, slots=True)
class Replay:
    """A workload as it was replayed, and what the replay itself cost."""

    records: tuple[RequestRecord, ...]
    started_seconds: float
    finished_seconds: float
    client_cpu_seconds: float
    max_loop_lag_seconds: float

    @property
    def duration_seconds(self) -> float:
        """From the start to the last token."""
        return self.finished_seconds - self.started_seconds

    @property
    def late_sends(self) -> int:
        """Requests that left more than `LATE_SECONDS` after they were due."""
        return sum(record.late_seconds > LATE_SECONDS for record in self.records)


@dataclass(frozen=True, slots=True)
class ReplayProgress:
    """How far a replay is, for whoever draws the progress."""

    elapsed_seconds: float
    sent: int
    finished: int
    total: int


ProgressCallback = Callable[[ReplayProgress], None]


def request_body(request: TimedRequest, index: int, seed: int, model: str) -> bytes:
    """The JSON body of `/v1/completions` for one request."""
    ids = ",".join(map(str, prompt_token_ids(request, index, seed)))
    settings = {
        "model": model,
        "max_tokens": request.output_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return f'{json.dumps(settings)[:-1]}, "prompt": [{ids}]}}'.encode()


async def _send(
    session: aiohttp.ClientSession,
    url: str,
    body: bytes,
    request: TimedRequest,
    due_seconds: float,
) -> RequestRecord:
    stream = TokenStream(request.output_tokens, array("d"))
    clock = time.monotonic
    error: str | None = None
    sent = clock()
    try:
        async with session.post(url, data=body) as response:
            if response.status != 200:
                text = (await response.content.read(2000)).decode("utf-8", "replace")
                error = f"HTTP {response.status}: {text.strip()[:300]}"
            else:
                async for data in response.content.iter_any():
                    stream.feed(data, clock())
                if not stream.finished:
                    error = "the stream ended before its end mark"
    except (aiohttp.ClientError, OSError, StreamError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    except asyncio.CancelledError:
        error = "not finished when the replay's time was over"
    if error is None and not stream.token_seconds:
        error = "no token came"
    times = np.frombuffer(stream.token_seconds, dtype=np.float64).copy()
    tokens = len(times) if stream.usage_tokens is None else stream.usage_tokens
    return RequestRecord(request, due_seconds, sent, times, tokens, error)


@dataclass(slots=True)
class _LagProbe:
    """Measures how late the client's own event loop runs."""

    max_lag_seconds: float = 0.0

    async def run(self, report: Callable[[], None]) -> None:
        """Probe until cancelled; call `report` about four times a second."""
        beats = 0
        while True:
            due = time.monotonic() + _LAG_PROBE_SECONDS
            await asyncio.sleep(_LAG_PROBE_SECONDS)
            self.max_lag_seconds = max(self.max_lag_seconds, time.monotonic() - due)
            beats += 1
            if beats % 5 == 0:
                report()


async def _replay(
    workload: Workload, options: ClientOptions, progress: ProgressCallback | None
) -> Replay:
    url = f"{options.url.rstrip('/')}/v1/completions"
    tasks: list[asyncio.Task[RequestRecord]] = []
    refused: list[RequestRecord] = []
    in_flight = 0

    def done(_: asyncio.Task[RequestRecord]) -> None:
        nonlocal in_flight
        in_flight -= 1

    def report() -> None:
        if progress is not None:
            elapsed = time.monotonic() - start
            finished = len(tasks) - in_flight
            progress(ReplayProgress(elapsed, len(tasks), finished, len(workload.requests)))

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30.0)
    # Shorter than the 5 s after which vLLM's server closes an idle connection.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=3.0)
    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, headers=headers, auto_decompress=False
    ) as session:
        probe = _LagProbe()
        cpu_before = time.process_time()
        # Room to build the first body before it is due.
        start = time.monotonic() + 0.05
        probing = asyncio.create_task(probe.run(report))
        try:
            for index, request in enumerate(workload.requests):
                body = request_body(request, index, workload.seed, options.model)
                due = start + request.arrival_seconds
                # Yields even when late, so that tokens are read in between.
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                if probing.done():
                    probing.result()
                if in_flight >= options.max_in_flight:
                    error = f"not sent: {in_flight} requests in flight"
                    now = time.monotonic()
                    refused.append(RequestRecord(request, due, now, np.empty(0), 0, error))
                    continue
                in_flight += 1
                task = asyncio.create_task(_send(session, url, body, request, due))
                task.add_done_callback(done)
                tasks.append(task)
            if tasks:
                _, pending = await asyncio.wait(tasks, timeout=options.drain_seconds)
                for task in pending:
                    task.cancel()
            records = [*await asyncio.gather(*tasks), *refused]
        finally:
            probing.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(probing, *tasks, return_exceptions=True)
    report()
    return _result(records, start, time.process_time() - cpu_before, probe.max_lag_seconds)


def _result(
    records: list[RequestRecord], start: float, cpu_seconds: float, lag_seconds: float
) -> Replay:
    records.sort(key=lambda record: record.due_seconds)
    ends = [record.token_seconds[-1] for record in records if len(record.token_seconds)]
    end = float(max(ends, default=time.monotonic()))
    return Replay(tuple(records), start, end, cpu_seconds, lag_seconds)


def replay(
    workload: Workload, options: ClientOptions, progress: ProgressCallback | None = None
) -> Replay:
    """Replay a workload against a running server, and wait for it to finish.

    Args:
        workload: what to send.
        options: where to, and the bounds.
        progress: called about four times a second from the event loop; what it
            raises ends the replay. None: not called.
    """
    return replay_together([(workload, options)], progress)[0]


def replay_together(
    loads: Sequence[tuple[Workload, ClientOptions]], progress: ProgressCallback | None = None
) -> list[Replay]:
    """Replay several workloads at the same time, each against a server of its own.

    Args:
        loads: what to send, and where to; all clocks start within a millisecond or so.
        progress: as for `replay`, with the sums of all.

    Returns:
        One replay each. The CPU seconds and the lag of the client are those of all together.
    """
    states: dict[int, ReplayProgress] = {}

    def watch(index: int) -> ProgressCallback | None:
        if progress is None:
            return None

        def report(state: ReplayProgress) -> None:
            states[index] = state
            seen = states.values()
            progress(
                ReplayProgress(
                    max(each.elapsed_seconds for each in seen),
                    sum(each.sent for each in seen),
                    sum(each.finished for each in seen),
                    sum(len(workload.requests) for workload, _ in loads),
                )
            )

        return report

    async def all_of_them() -> list[Replay]:
        return await asyncio.gather(
            *(_replay(workload, options, watch(i)) for i, (workload, options) in enumerate(loads))
        )

    gc.collect()
    # A collection of the parent's heap would stop the loop for milliseconds.
    gc.freeze()
    try:
        return asyncio.run(all_of_them())
    finally:
        gc.unfreeze()
