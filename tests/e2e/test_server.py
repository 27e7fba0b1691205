"""The real vLLM server over an emulated GPU, spoken to with the `openai` client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import openai
import pytest

from tests.e2e.conftest import MODEL, Server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.fixture
def client(shaped_server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{shaped_server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def user(text: str) -> list[openai.types.chat.ChatCompletionMessageParam]:
    return [{"role": "user", "content": text}]


def complete(client: openai.OpenAI, prompt: str, max_tokens: int) -> str:
    answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=max_tokens)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == max_tokens
    return answer.choices[0].text


def test_a_chat_streams_what_it_answers(client: openai.OpenAI) -> None:
    """The same text at once and in pieces, as many tokens as asked for; a client that names no
    limit gets a finished answer. The model has its own name, not the path behind it."""
    assert [model.id for model in client.models.list()] == [MODEL]
    asked = {"model": MODEL, "messages": user("Grüße"), "max_tokens": 30}
    whole = client.chat.completions.create(**asked)  # type: ignore[call-overload]
    assert whole.usage.completion_tokens == 30
    assert whole.choices[0].finish_reason == "length"
    pieces = client.chat.completions.create(**asked, stream=True)  # type: ignore[call-overload]
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert text == whole.choices[0].message.content
    assert text.isprintable()
    answer = client.chat.completions.create(model=MODEL, messages=user("Hello"))
    assert answer.choices[0].finish_reason == "stop"


def test_a_completion_streams_what_it_answers(client: openai.OpenAI) -> None:
    """One token per character of the prompt, and the usage at the end says so."""
    prompt = "Tell me about power. " * 20
    whole = complete(client, prompt, 40)
    text, usage = "", None
    for piece in client.completions.create(
        model=MODEL,
        prompt=prompt,
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    ):
        text += "".join(choice.text for choice in piece.choices)
        usage = piece.usage or usage
    assert text == whole
    assert usage is not None
    assert usage.prompt_tokens == len(prompt)


def test_stop_strings_and_choices(client: openai.OpenAI) -> None:
    """`stop` cuts the text before it; `n` gives that many answers."""
    full = complete(client, "abc", 60)
    stop = full[20:23]
    answer = client.completions.create(model=MODEL, prompt="abc", max_tokens=60, stop=[stop])
    assert answer.choices[0].text == full[: full.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    many = client.completions.create(model=MODEL, prompt="abc", max_tokens=5, n=3, temperature=1.0)
    assert len(many.choices) == 3


def test_structured_output_obeys_its_grammar(client: openai.OpenAI) -> None:
    """A JSON schema and a choice, each ended by the grammar."""
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 3},
            "watts": {"type": "integer"},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2},
        },
        "required": ["name", "watts", "tags"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=MODEL,
        messages=user("x"),
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "gpu", "schema": schema, "strict": True},
        },
    )
    assert answer.choices[0].finish_reason == "stop"
    value = json.loads(answer.choices[0].message.content or "")
    assert len(value["name"]) >= 3
    assert isinstance(value["watts"], int)
    assert set(value["tags"]) <= {"a", "b"}
    choice = client.chat.completions.create(
        model=MODEL,
        messages=user("x"),
        extra_body={"structured_outputs": {"choice": ["red", "green"]}},
    )
    assert choice.choices[0].message.content in ("red", "green")


def test_a_request_longer_than_the_context_is_refused(
    client: openai.OpenAI, shaped_server: Server
) -> None:
    """400 with the limit in it; an answer that would be longer ends there; others are served."""
    with pytest.raises(openai.BadRequestError, match="4096"):
        client.completions.create(model=MODEL, prompt="a" * 5000, max_tokens=5)
    cut = client.completions.create(model=MODEL, prompt="a" * 4080, max_tokens=4000)
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage is not None
    assert cut.usage.total_tokens == 4096
    complete(client, "a" * 4000, 96)
    shaped_server.wait_until_idle()


def test_a_wrong_request_is_the_client_s_fault(client: openai.OpenAI) -> None:
    """A 4xx, never a 500."""
    wrong: list[tuple[dict[str, object], type[openai.APIStatusError]]] = [
        ({"model": "nobody", "prompt": "a"}, openai.NotFoundError),
        ({"model": MODEL, "prompt": "a", "max_tokens": 0}, openai.BadRequestError),
        ({"model": MODEL, "prompt": "a", "logprobs": 1000}, openai.BadRequestError),
        ({"model": MODEL, "prompt": [1, 999_999_999]}, openai.BadRequestError),
    ]
    for body, error in wrong:
        with pytest.raises(error):
            client.post("/completions", body=body, cast_to=openai.types.Completion)


def test_a_client_that_hangs_up_leaves_nothing_behind(
    client: openai.OpenAI, shaped_server: Server
) -> None:
    """In mid-stream: its request ends, its KV blocks come back, others are served."""
    stream = client.completions.create(model=MODEL, prompt="a" * 1000, max_tokens=3000, stream=True)
    next(iter(stream))
    assert shaped_server.metric("vllm:num_requests_running") == 1
    stream.close()
    shaped_server.wait_until_idle()
    complete(client, "after", 20)


def test_two_hundred_requests_at_once_all_finish(shaped_server: Server) -> None:
    """Each gets its tokens; a quarter hang up; afterwards nothing runs, waits or holds KV."""

    async def one(client: openai.AsyncOpenAI, index: int) -> int:
        stream = await client.completions.create(
            model=MODEL,
            prompt=f"{index} " + "x" * (index * 7 % 900),
            max_tokens=20 + index % 60,
            stream=True,
        )
        count = 0
        async for piece in stream:
            count += len(piece.choices[0].text)
            if index % 4 == 0 and count > 3:
                await stream.close()
                break
        return count

    async def everyone() -> list[int]:
        async with openai.AsyncOpenAI(
            base_url=f"{shaped_server.url}/v1", api_key="none", max_retries=0, timeout=300
        ) as client:
            return list(await asyncio.gather(*(one(client, index) for index in range(200))))

    counts = asyncio.run(everyone())
    for index, count in enumerate(counts):
        assert count > 3 if index % 4 == 0 else count == 20 + index % 60
    shaped_server.wait_until_idle()
