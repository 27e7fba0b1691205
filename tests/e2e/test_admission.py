"""Classes and admission on a real server: what each client gets while a flood lasts, and after."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.conftest import MODEL, Server, running_server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

BATCH_KEY = "sk-nightly-batch"
# Just above the floor: a few long prompts a second are more than it carries.
LIMITS = ["400W@1s", "500W@100ms"]
BUDGETS: dict[str, dict[str, Any]] = {
    "limit": {"limits": LIMITS},
    "group": {"power_group": f"flex-{os.getpid()}", "group_limits": LIMITS},
}
SETTINGS = {
    "ttft_target_seconds": 0.5,
    "api_key_classes": {f"sha256:{hashlib.sha256(BATCH_KEY.encode()).hexdigest()}": "flex"},
}
FLEX: dict[str, Any] = {"service_tier": "flex"}


@pytest.fixture(scope="module", params=BUDGETS)
def tight_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server whose budget a flood of prompts exceeds: its own, or its power group's alone."""
    pytest.importorskip("vllm")
    directory = tmp_path_factory.mktemp("tight-server")
    flags = (
        "--max-model-len",
        "8192",
        "--power-shaper-config",
        json.dumps(SETTINGS | BUDGETS[request.param]),
    )
    with running_server(directory, *flags) as started:
        yield started


def client(server: Server, key: str = "none") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


async def prompt(
    to: openai.AsyncOpenAI, number: int, length: int = 6000, tokens: int = 2, **extra: Any
) -> openai.types.Completion:
    """A completion of a prompt of its own, one token a character."""
    text = f"{number:6d}" + "x" * (length - 6)
    return await to.completions.create(model=MODEL, prompt=text, max_tokens=tokens, **extra)  # type: ignore[no-any-return]


async def until_state(server: Server, state: float) -> None:
    """The engine says that it is in this state, by its index."""

    def there() -> bool:
        return server.metric("shaper_admission_state") == state

    await asyncio.to_thread(server.wait_for, f"admission state {state:g}", there, 60.0)


async def refusal(answer: Any) -> openai.RateLimitError:
    """The 429 that the call must end with."""
    with pytest.raises(openai.RateLimitError) as caught:
        await answer
    return caught.value


def check_refusal(error: openai.RateLimitError) -> None:
    assert error.code == "resource_unavailable"
    assert error.type == "rate_limit_error"
    assert 1 <= int(error.response.headers["retry-after"]) <= 120
    assert error.response.headers["x-shaper-state"] == "shed"
    assert set(error.response.json()) == {"error"}


async def flooded(server: Server) -> None:
    chat: list[Any] = [{"role": "user", "content": "hello"}]
    async with client(server) as people, client(server, BATCH_KEY) as batch:
        early = asyncio.create_task(prompt(people, 1, tokens=5, extra_body=FLEX))
        await early  # nothing presses yet
        flood = [asyncio.create_task(prompt(people, 100 + index)) for index in range(120)]
        await until_state(server, 3)
        # Refused, whatever the route and however it says so, streamed or not, one or more.
        calls = [
            prompt(people, 2, 20, extra_body=FLEX),
            prompt(people, 3, 20, extra_body=FLEX, n=3, temperature=1.0),
            prompt(people, 4, 20, extra_body=FLEX, stream=True),
            prompt(people, 5, 20, extra_body={"vllm_xargs": {"shaper_class": "flex"}}),
            prompt(batch, 6, 20),
            people.chat.completions.create(
                model=MODEL, messages=chat, max_tokens=2, service_tier="flex"
            ),
            people.chat.completions.create(
                model=MODEL, messages=chat, max_tokens=2, service_tier="flex", stream=True
            ),
        ]
        for call in calls:
            check_refusal(await refusal(call))
        assert server.metric("shaper_requests_refused_total") == len(calls)
        with pytest.raises(openai.BadRequestError, match="felx"):
            await prompt(people, 7, 20, extra_body={"vllm_xargs": {"shaper_class": "felx"}})
        # Interactive work enters, and all of the flood is served.
        raw = await people.with_raw_response.completions.create(
            model=MODEL, prompt="in time", max_tokens=2
        )
        assert raw.status_code == 200
        assert "x-shaper-state" in raw.headers
        done = await asyncio.gather(*flood)
        assert all(each.choices[0].finish_reason == "length" for each in done)
        await until_state(server, 0)
    # And flex runs again, over new connections: the server closes those that were idle for 5 s.
    async with client(server) as people, client(server, BATCH_KEY) as batch:
        late = [prompt(people, 200 + index, 500, extra_body=FLEX) for index in range(20)]
        late.append(prompt(batch, 300, 500))
        late.append(prompt(people, 301, 500, extra_body=FLEX, n=3, temperature=1.0))
        answers = await asyncio.gather(*late)
        assert [len(each.choices) for each in answers] == [1] * 21 + [3]


def test_flex_is_refused_in_a_flood_and_runs_after_it(tight_server: Server) -> None:
    """429 with Retry-After in OpenAI's form, in both routes; interactive requests run."""
    asyncio.run(flooded(tight_server))


async def overdue(server: Server) -> None:
    async with client(server) as people:
        flood = [asyncio.create_task(prompt(people, 400 + index)) for index in range(120)]
        await until_state(server, 2)
        # By its age the oldest is let in, alone: it then stands in vLLM's queue.
        oldest = asyncio.create_task(prompt(people, 1, 500, extra_body=FLEX))
        await asyncio.to_thread(
            server.wait_for, "deferral", lambda: server.metric("shaper_flex_deferred_requests") > 0
        )
        whole = asyncio.create_task(prompt(people, 2, 500, extra_body=FLEX))
        chat = people.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=2,
            service_tier="flex",
        )
        talk = asyncio.create_task(chat)
        stream = await people.completions.create(
            model=MODEL, prompt="a stream", max_tokens=5, stream=True, extra_body=FLEX
        )
        with pytest.raises(openai.APIError, match="Internal server error"):
            _ = [piece async for piece in stream]
        for choice in ((await whole).choices[0], (await talk).choices[0]):
            assert choice.finish_reason == "abort"  # type: ignore[comparison-overlap]
            assert choice.model_dump()["stop_reason"] == "flex_wait_exceeded"
        assert (await oldest).choices[0].finish_reason == "length"
        for each in flood:
            each.cancel()  # hangs up; vLLM aborts it
        await asyncio.gather(*flood, return_exceptions=True)
    assert server.metric("shaper_flex_refused_total") == 3
    await asyncio.to_thread(server.wait_until_idle)


def test_flex_that_waited_its_bound_is_told_so(tmp_path: Path) -> None:
    """Where the operator has it refused: no text and `abort`, or an error in the stream."""
    pytest.importorskip("vllm")
    settings = (
        SETTINGS
        | BUDGETS["limit"]
        | {
            "ttft_target_seconds": 20,  # eight seconds of waiting defer, sixteen shed
            "flex_max_wait_seconds": 2,
            "flex_on_timeout": "refuse",
        }
    )
    flags = ("--max-model-len", "8192", "--power-shaper-config", json.dumps(settings))
    with running_server(tmp_path, *flags) as server:
        asyncio.run(overdue(server))
