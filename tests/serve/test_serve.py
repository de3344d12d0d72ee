"""`whet serve` as its clients meet it: OpenAI's own Python client, and raw HTTP."""

import asyncio
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import pytest

from benchmarks.bench_serve import start
from tests.serve.conftest import Running
from whet.chat.encode import encode_chat, encode_prompt
from whet.cli import main
from whet.generate.engine import Sampling, generate, sample
from whet.generate.opened import open_model

openai = pytest.importorskip("openai")
QUESTION = [{"role": "user", "content": "three plus four"}]


@pytest.fixture(scope="session")
def client(server: Running) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="session")
def one(server: Running) -> Any:
    return open_model(server.folder / "one")


def greedy(one: Any, messages: list[dict[str, str]], longest: int = 40) -> list[int]:
    prompt = encode_prompt(messages, one.chat)
    options = {"max_new_tokens": longest, "stop_ids": one.chat.stop_ids}
    return generate(one.model, [prompt], **options)[0]


def text_of(one: Any, ids: list[int]) -> str:
    ids = ids[:-1] if ids[-1] in one.chat.stop_ids else ids
    return one.chat.tokenizer.decode(ids)


def post(server: Running, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json={"model": "one", **body}, timeout=60)


def test_models_and_health(client, server):
    assert [model.id for model in client.models.list()] == ["one", "two"]
    assert client.models.retrieve("two").max_model_len == 200
    health = httpx.get(f"{server.url}/health").json()
    assert health["status"] == "ok"
    assert set(health["models"]) == {"one", "two"}


def test_a_greedy_reply_is_that_of_whet_chat(client, server, one, capsys):
    reply = client.chat.completions.create(
        model="one", messages=QUESTION, temperature=0, max_tokens=40
    )
    ids = greedy(one, QUESTION)
    assert reply.choices[0].message.content == text_of(one, ids)
    assert reply.choices[0].finish_reason == ("stop" if ids[-1] in one.chat.stop_ids else "length")
    assert reply.usage.completion_tokens == len(ids)
    assert reply.usage.prompt_tokens == len(encode_prompt(QUESTION, one.chat))
    words = ["--prompt", QUESTION[0]["content"], "--max_new_tokens", "40"]
    assert main(["chat", str(server.folder / "one"), *words]) == 0
    assert capsys.readouterr().out == reply.choices[0].message.content + "\n"


def test_a_stream_is_the_same_reply_in_pieces(client, one):
    chunks = list(
        client.chat.completions.create(
            model="one",
            messages=QUESTION,
            temperature=0,
            max_tokens=40,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    pieces = [
        c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content
    ]
    assert "".join(pieces) == text_of(one, greedy(one, QUESTION))
    assert len(pieces) > 5
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")
    assert chunks[-1].usage.completion_tokens == len(greedy(one, QUESTION))


def test_samples_are_those_of_the_seed(client, one):
    prompt = encode_prompt(QUESTION, one.chat)
    options = {"temperature": 1.3, "max_new_tokens": 20, "stop_ids": one.chat.stop_ids}
    expected = generate(one.model, [prompt] * 3, top_p=0.9, seed=7, **options)
    reply = client.chat.completions.create(
        model="one", messages=QUESTION, temperature=1.3, top_p=0.9, seed=7, n=3, max_tokens=20
    )
    assert [choice.message.content for choice in reply.choices] == [
        text_of(one, ids) for ids in expected
    ]
    assert len({choice.message.content for choice in reply.choices}) > 1
    free = [
        client.chat.completions.create(model="one", messages=QUESTION, max_tokens=20)
        for _ in range(2)
    ]
    assert free[0].choices[0].message.content != free[1].choices[0].message.content


def test_log_probabilities_are_the_models(client, one):
    prompt = encode_prompt(QUESTION, one.chat)
    (expected,) = sample(
        one.model, [prompt], keys=[(5, 0)], max_new_tokens=12, stop_ids=one.chat.stop_ids
    )
    reply = client.chat.completions.create(
        model="one", messages=QUESTION, seed=5, max_tokens=12, logprobs=True, top_logprobs=3
    )
    entries = reply.choices[0].logprobs.content
    assert [entry.id for entry in entries] == expected.ids
    assert [entry.logprob for entry in entries] == pytest.approx(expected.logp, abs=1e-4)
    for entry in entries:
        found = [top.logprob for top in entry.top_logprobs]
        assert found == sorted(found, reverse=True)
        assert len(found) == 3
        assert entry.logprob <= found[0] + 1e-6
    joined = b"".join(bytes(e.bytes) for e in entries if e.id not in one.chat.stop_ids)
    assert joined.decode("utf-8", "replace").strip() == reply.choices[0].message.content.strip()


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_a_reply_before_them(client, one, stream):
    whole = text_of(one, greedy(one, QUESTION))
    middle = len(whole) // 2
    stop = [whole[middle : middle + 3], "never said"]
    reply = client.chat.completions.create(
        model="one", messages=QUESTION, temperature=0, max_tokens=40, stop=stop, stream=stream
    )
    if stream:
        chunks = [chunk.choices[0] for chunk in reply]
        text = "".join(chunk.delta.content or "" for chunk in chunks)
        reason = chunks[-1].finish_reason
    else:
        text, reason = reply.choices[0].message.content, reply.choices[0].finish_reason
    assert text == whole[: whole.index(stop[0])]
    assert reason == "stop"


def test_completions_continue_texts_and_ids(client, one):
    prompts = ["one two", "five"]
    ids = [one.chat.tokenizer.encode(text, ends=True) for text in prompts]
    options = {"max_new_tokens": 9, "stop_ids": one.chat.stop_ids}
    expected = generate(one.model, ids, **options)
    for prompt in (prompts, ids):
        reply = client.completions.create(
            model="one", prompt=prompt, temperature=0, max_tokens=9, logprobs=2
        )
        for choice, before, after in zip(reply.choices, ids, expected, strict=True):
            shown = [i for i in after if i not in one.chat.stop_ids]
            both = one.chat.tokenizer.decode([*before, *shown])
            assert both == one.chat.tokenizer.decode(before) + choice.text
            assert len(choice.logprobs.tokens) == len(after)
            assert len(choice.logprobs.top_logprobs[0]) == 2
    chunks = client.completions.create(
        model="one", prompt=prompts[0], temperature=0, max_tokens=9, stream=True
    )
    assert "".join(c.choices[0].text for c in chunks) == reply.choices[0].text


def test_64_clients_at_once_get_what_each_would_get_alone(server, one):
    """Eight rows for 64 clients, greedy and sampled ones, short and long ones mixed."""
    questions = [
        [{"role": "user", "content": f"{'sum of ' * (i % 7)}{i} plus {i}"}] for i in range(64)
    ]
    expected = []
    for i, question in enumerate(questions):
        prompt = encode_prompt(question, one.chat)
        options = {"max_new_tokens": 8 + i % 30, "stop_ids": one.chat.stop_ids}
        sampling = {"temperature": 0.9, "seed": i} if i % 4 == 3 else {}
        expected.append(text_of(one, generate(one.model, [prompt], **options, **sampling)[0]))

    async def ask() -> list[str]:
        address = {"base_url": f"{server.url}/v1", "api_key": "none"}
        async with openai.AsyncOpenAI(**address, max_retries=0, timeout=120) as client:

            async def one_of(i: int) -> str:
                sampling = {"temperature": 0.9, "seed": i} if i % 4 == 3 else {"temperature": 0}
                reply = await client.chat.completions.create(
                    model="one", messages=questions[i], max_tokens=8 + i % 30, **sampling
                )
                return reply.choices[0].message.content

            return await asyncio.gather(*(one_of(i) for i in range(64)))

    # In a thread of its own: a browser test of this process may have left a loop running here.
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(asyncio.run, ask()).result() == expected
    busy = httpx.get(f"{server.url}/health").json()["models"]["one"]
    assert busy == {"running": 0, "waiting": 0}


def test_a_client_that_goes_away_frees_its_row(server):
    body = {"model": "one", "messages": QUESTION, "temperature": 0, "seed": 1, "n": 8}
    for stream in (True, False):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{server.url}/v1/chat/completions",
                json={**body, "stream": stream},
                timeout=httpx.Timeout(10, read=0.001),
            )
    ended = time.monotonic() + 10
    while time.monotonic() < ended:
        if httpx.get(f"{server.url}/health").json()["models"]["one"]["running"] == 0:
            return
        time.sleep(0.05)
    raise AssertionError("the rows still run")


REFUSED = {
    "no_messages": ({}, 400, "messages: is missing or empty"),
    "empty": ({"messages": []}, 400, "messages: is missing or empty"),
    "role": ({"messages": [{"role": "king", "content": ""}]}, 400, "unknown role"),
    "unknown": ({"messages": QUESTION, "temprature": 1}, 400, "did you mean temperature?"),
    "temperature": ({"messages": QUESTION, "temperature": -1}, 400, "from 0 to 2"),
    "nan": ({"messages": QUESTION, "temperature": float("nan")}, 400, "from 0 to 2"),
    "bool": ({"messages": QUESTION, "n": True}, 400, "whole number from 1 to 16"),
    "false": ({"messages": QUESTION, "presence_penalty": False}, 400, "0 (others are not"),
    "true": ({"messages": QUESTION, "repetition_penalty": True}, 400, "1 (others are not"),
    "one": ({"messages": QUESTION, "parallel_tool_calls": 1}, 400, "True (others are not"),
    "usage": (
        {"messages": QUESTION, "stream": True, "stream_options": {"include_usage": "false"}},
        400,
        "each true or false",
    ),
    "penalty": ({"messages": QUESTION, "presence_penalty": 0.5}, 400, "not supported"),
    "json": ({"messages": QUESTION, "response_format": {"type": "json_object"}}, 400, "not supp"),
    "forced": ({"messages": QUESTION, "tool_choice": "required"}, 400, "not supported"),
    "longest": (
        {"messages": QUESTION, "max_tokens": 1, "max_completion_tokens": 2},
        400,
        "differs",
    ),
    "top": ({"messages": QUESTION, "top_logprobs": 2}, 400, "needs logprobs"),
    "long": ({"messages": [{"role": "user", "content": "one " * 999}]}, 400, "the context holds"),
    "asks": ({"messages": QUESTION, "max_tokens": 9999}, 400, "max_tokens is 9,999"),
    "variables": ({"messages": QUESTION, "chat_template_kwargs": {"no": 1}}, 400, "no variable no"),
    "flag": (
        {"messages": QUESTION, "chat_template_kwargs": {"tools": 1}},
        400,
        "chat_template_kwargs:",
    ),
    "options": (
        {"messages": QUESTION, "stream_options": {"include_usage": True}},
        400,
        "needs stream",
    ),
    "model": ({"model": "gpt-9", "messages": QUESTION}, 404, "served are one, two"),
    "which": ({"model": None, "messages": QUESTION}, 400, "model: is missing"),
    "half": ({"messages": [{"role": "user", "content": "\ud83d"}]}, 400, "character"),
}


@pytest.mark.parametrize(("body", "status", "reason"), REFUSED.values(), ids=REFUSED)
def test_bad_requests_get_the_apis_own_errors(server, body, status, reason):
    text = json.dumps({"model": "one", **body})
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=text, headers=headers)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert reason in error["message"]
    assert error["type"] == "invalid_request_error"


def test_what_is_no_request(server):
    chat = f"{server.url}/v1/chat/completions"
    headers = {"Content-Type": "application/json"}
    for content, status in ((b"{", 400), (b"[]", 400), (b"\xff", 400), (b"[" * 99999, 400)):
        assert httpx.post(chat, content=content, headers=headers).status_code == status
    for content in (b'{"n": 1, "n": 2}', b'{"messages": [{"n": 1, "n": 1}]}'):
        answer = httpx.post(chat, content=content, headers=headers)
        assert (answer.status_code, "key 'n' occurs twice" in answer.text) == (400, True)
    half = b'{"model": "one", "prompt": "\\ud800"}'
    answer = httpx.post(f"{server.url}/v1/completions", content=half, headers=headers)
    assert (answer.status_code, "surrogate" in answer.text) == (400, True)
    assert httpx.post(chat, content=b"x" * (9 << 20), headers=headers).status_code == 413
    assert httpx.post(chat, data={"a": "b"}).status_code == 415
    assert post(server, "/tokenize", prompt="a", messages=QUESTION).status_code == 400
    many = post(server, "/v1/completions", prompt=["a"] * 99, n=2, max_tokens=1)
    assert (many.status_code, many.json()["error"]["param"]) == (400, "n")
    assert httpx.get(chat).status_code == 405
    answer = httpx.get(f"{server.url}/v1/nothing")
    assert answer.status_code == 404
    assert "/v1/nothing" in answer.json()["error"]["message"]


def test_a_full_queue_a_key_and_a_time_limit(models):
    flags = ["--queue", "2", "--batch_size", "1", "--api_key", "secret", "--timeout", "0.3"]
    process, url = start(str(models / "one"), *flags)
    try:
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/v1/models").status_code == 401
        key = {"Authorization": "Bearer secret"}
        assert httpx.get(f"{url}/v1/models", headers=key).status_code == 200

        def ask(i: int) -> tuple[int, str]:
            body = {"messages": QUESTION, "seed": i}  # the only model needs no name
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=key, timeout=60)
            return answer.status_code, (answer.json().get("error") or {}).get("code", "")

        with ThreadPoolExecutor(24) as pool:
            found = list(pool.map(ask, range(24)))
        assert set(found) <= {(200, ""), (429, "queue_full"), (503, "timeout")}
        assert (429, "queue_full") in found
    finally:
        process.terminate()
        assert "Traceback" not in process.communicate(timeout=20)[1]


def test_tokens_of_the_prompt_and_the_certificate(server, one):
    found = post(server, "/tokenize", messages=QUESTION).json()
    assert found["tokens"] == encode_prompt(QUESTION, one.chat)
    assert len(found["token_strs"]) == len(found["control"]) == found["count"]
    talk = [*QUESTION, {"role": "assistant", "content": "seven"}]
    shown = post(server, "/certificate", messages=talk).json()
    expected = encode_chat(talk, one.chat)
    assert [token["id"] for token in shown["examples"][0]] == expected.ids.tolist()
    assert [token["weight"] for token in shown["examples"][0]] == expected.loss_mask.tolist()
    assert [turn["role"] for turn in shown["turns"]] == ["user", "assistant"]
    assert post(server, "/certificate", messages=QUESTION).status_code == 400


def test_a_last_assistant_message_is_continued_on_request(server, one):
    talk = [*QUESTION, {"role": "assistant", "content": "seven"}]
    on = post(
        server, "/tokenize", messages=talk, continue_final_message=True, add_generation_prompt=False
    )
    assert on.json()["tokens"] == encode_prompt(talk, one.chat)
    new = post(server, "/tokenize", messages=talk).json()["tokens"]
    assert new == encode_prompt(talk, one.chat, go_on=False)


def test_what_cannot_be_served_is_one_line(tmp_path, models, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", str(models / "one"), "--port", port]) == 2
    assert f"--port {port}: is in use" in capsys.readouterr().err
    run = tmp_path / "run"  # that has not saved a model yet
    run.mkdir()
    (run / "config.toml").write_text("lr = 1\n")
    assert main(["serve", str(run), "--port", "0"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert str(run) in lines[0]
    assert main(["serve"]) == 2
    assert main(["serve", str(models / "one"), "--host", "no.such.host.invalid"]) == 2
    assert main(["serve", str(models / "one"), str(models / "one"), "--port", "0"]) == 2
    assert "named twice" in capsys.readouterr().err


def test_sampling_settings_are_read(one):
    from whet.serve.requests import CHAT, checked, settings

    read = settings(checked({"temperature": 0.5, "top_k": -1, "stop": "a", "logprobs": None}, CHAT))
    assert read.sampling == Sampling(0.5, None, 1)
    assert (read.stops, read.top, read.max_tokens) == (("a",), None, None)
