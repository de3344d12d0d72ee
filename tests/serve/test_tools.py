"""Tool calls through the server: a worker that says what a test tells it stands for the model."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import pytest

from tests import tiny
from whet.chat.chat import Chat
from whet.chat.template import ChatTemplate
from whet.generate.rows import Piece
from whet.serve.app import Server
from whet.serve.models import Served

ASK = [{"role": "user", "content": "How warm is it?"}]
TOOLS = [{"type": "function", "function": {"name": "warmth", "parameters": {"type": "object"}}}]
ONE = '<tool_call>{"name": "warmth", "arguments": {"city": "Köln", "days": [1, 2]}}</tool_call>'
CALL = {"name": "warmth", "arguments": '{"city": "Köln", "days": [1, 2]}'}
PYTHON = "{% for m in messages %}{{ m.role }}: {{ m.content or m.tool_calls }}</s>{% endfor %}"


def served(says: str, chat: Chat | None = None) -> Served:
    chat = chat or tiny.chat()
    ids = [*chat.tokenizer.encode(says), chat.stop_ids[0]]

    def submit(jobs: list[Any]) -> None:
        for job in jobs:
            for i, token in enumerate(ids):
                ended = i == len(ids) - 1
                job.deliver(Piece(job.row.index, [token], [0.0], ended, [[]]))

    worker: Any = SimpleNamespace(
        context=4096,
        queue=8,
        batch_size=8,
        stop_ids=set(chat.stop_ids),
        submit=submit,
        cancel=lambda numbers: None,
    )
    return Served("one", "one", chat, worker, 0)


def answer(model: Served, **body: Any) -> httpx.Response:
    app = Server({"one": model}, None, 60.0).app()
    body = {"messages": ASK, "tools": TOOLS, **body}

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.post("/v1/chat/completions", json=body)

    # In a thread of its own: a browser test of this process may have left a loop running here.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, ask()).result()


def chunks(model: Served, **body: Any) -> list[dict[str, Any]]:
    lines = answer(model, stream=True, **body).text.split("\n\n")
    return [json.loads(line[6:])["choices"][0] for line in lines if line[6:7] == "{"]


@pytest.mark.parametrize(("before", "content"), [("", None), ("I look.\n", "I look.")])
def test_a_call_is_a_tool_call_of_the_api(before, content) -> None:
    model = served(before + ONE)
    choice = answer(model).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == content
    (call,) = choice["message"]["tool_calls"]
    assert (call["type"], call["function"]) == ("function", CALL)
    talk = [*ASK, choice["message"], {"role": "tool", "content": "9", "tool_call_id": call["id"]}]
    assert answer(model, messages=talk).status_code == 200, "and goes back with its result"


def test_a_stream_holds_a_call_back_until_it_is_whole() -> None:
    deltas = [choice["delta"] for choice in chunks(served(f"It < I <tool {ONE}{ONE}"))]
    assert "".join(delta.get("content") or "" for delta in deltas) == "It < I <tool "
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [(call["index"], call["function"]) for call in calls] == [(0, CALL), (1, CALL)]
    assert calls[0]["id"] != calls[1]["id"]
    assert chunks(served(ONE))[-1]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("says", [ONE[:-3], ONE.replace("warmth", "cold"), f"{ONE} so", "no <tool"])
def test_what_is_no_call_stays_content(says) -> None:
    choice = answer(served(says)).json()["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", says)
    assert "tool_calls" not in choice["message"]
    said = [choice["delta"].get("content") or "" for choice in chunks(served(says))]
    assert "".join(said) == says


def test_without_tools_nothing_is_read_as_a_call() -> None:
    for body in ({"tools": None}, {"tools": []}, {"tool_choice": "none"}):
        choice = answer(served(ONE), **body).json()["choices"][0]
        assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", ONE)


def test_calls_that_cannot_be_read_back_are_refused_by_name() -> None:
    chat = Chat(tiny.tokenizer(), ChatTemplate(PYTHON))
    for body in (
        {},
        {"tools": ["warmth"]},
        {"tools": [{"function": {}}]},
        {"tool_choice": "required"},
    ):
        model = served(ONE, chat) if not body else served(ONE)
        found = answer(model, **body)
        assert found.status_code == 400, body
        assert found.json()["error"]["param"] in ("tools", "tool_choice")
    assert answer(served(ONE), parallel_tool_calls=False).json()["error"]["param"] == (
        "parallel_tool_calls"
    )
