"""Lines that no data file should hold, each broken in another way."""

import json
from collections.abc import Iterator

USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello"}
GOOD = {"messages": [USER, REPLY]}
SCALARS = [None, True, 7, -1.5, "text", {}, []]


def broken_lines() -> list[bytes]:
    """Some 250 lines; none is a conversation, a text or tokens that can be trained."""
    lines = [*not_json()]
    for record in (*messages(), *sharegpt(), *instructions(), *pairs(), *others()):
        lines.append(json.dumps(record).encode())
    return list(dict.fromkeys(lines))


def not_json() -> Iterator[bytes]:
    whole = json.dumps(GOOD).encode()
    yield from (whole[:end] for end in range(0, len(whole), 4))  # half-written
    yield from (
        whole + b"}",
        whole + b"," + whole,
        whole + whole,
        whole[:-1] + b",}",
        b"//" + whole,
    )
    yield from (b" ", b"\t", b"\x00", b"\xff\xfe", b"{'a': 1}", b"{a: 1}", b"nan", b"<xml/>", b"-")
    yield whole.replace(b"Hello", b"\xff")
    yield whole.replace(b"Hello", b"\xed\xa0\x80")
    yield whole.replace(b"Hello", b"\\ud800")
    yield whole.replace(b"Hello", b"\\x41")
    yield whole.replace(b"Hello", b"\x01")
    yield b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}"
    yield b'{"messages": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}"
    yield b"instruction,input,output"
    yield from (json.dumps(value).encode() for value in SCALARS)
    yield from (whole.replace(b'"Hello"', n) for n in (b"NaN", b"Infinity", b"-Infinity", b"1e999"))


def messages() -> Iterator[object]:
    yield from ({"messages": value} for value in (False, 7, "text", {}, [], {"0": USER}))
    yield from ({"messages": [USER, value]} for value in (*SCALARS, [REPLY]))
    yield {"messages": [USER]}
    yield {"messages": [USER, USER]}
    yield {"messages": [{"role": "system", "content": "S"}, USER]}
    for role in (None, 1, "", "User", "gpt", "human", "bot", "assistant ", ["assistant"], {}):
        yield {"messages": [USER, {"role": role, "content": "Hello"}]}
    yield {"messages": [USER, {"content": "Hello"}]}
    yield {"messages": [USER, {"role": "assistant"}]}
    yield {"messages": [{"role": "user"}, REPLY]}
    for content in (True, 7, {}, {"text": "a"}, [7], [None], [[]], [{}], [{"type": "text"}]):
        yield {"messages": [USER, {"role": "assistant", "content": content}]}
        yield {"messages": [{"role": "user", "content": content}, REPLY]}
    for kind in ("image", "image_url", "audio", "video", "file", 7):
        yield {"messages": [{"role": "user", "content": [{"type": kind, "url": "x"}]}, REPLY]}
    for weight in ("1", True, [], {}):
        yield {"messages": [USER, {**REPLY, "weight": weight}]}
    yield {"messages": [{**USER, "weight": 1}, REPLY]}
    yield {"messages": [USER, {**REPLY, "weight": 0}]}
    for calls in ("f", 7, {}, [7], [None], ["f"], [{}], [{"name": 7}], [{"function": None}]):
        yield {"messages": [USER, {"role": "assistant", "tool_calls": calls}]}
    for arguments in ("{", "[1]", "7", 7, [1], True):
        call = {"function": {"name": "f", "arguments": arguments}}
        yield {"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}
    yield {"messages": [{**USER, "tool_calls": [{"function": {"name": "f"}}]}, REPLY]}
    for key in ("reasoning_content", "reasoning", "thinking"):
        yield {"messages": [USER, {**REPLY, key: 7}]}
        yield {"messages": [{**USER, key: "hm"}, REPLY]}
    yield {"messages": [USER, {**REPLY, "reasoning": "a", "thinking": "b"}]}
    yield {"messages": [{**USER, "name": 7}, REPLY]}
    for value in (7, "{", "text", [7], {"a": 1}, True):
        yield {**GOOD, "tools": value}
        yield {**GOOD, "documents": value}


def sharegpt() -> Iterator[object]:
    human, gpt = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}
    yield from ({"conversations": value} for value in (7, "text", {}, []))
    yield from ({"conversations": [human, value]} for value in SCALARS)
    yield {"conversations": [human]}
    for speaker in (None, 7, "alien", ["gpt"]):
        yield {"conversations": [human, {"from": speaker, "value": "Hello"}]}
    for value in (None, 7, ["Hello"], {"text": "Hello"}):
        yield {"conversations": [human, {"from": "gpt", "value": value}]}
    for call in ("", "f()", "{", "7", '{"arguments": {}}'):
        yield {"conversations": [human, {"from": "function_call", "value": call}]}
    yield {"conversations": [human, gpt], "system": 7}
    yield {"conversations": [{"from": "system", "value": "a"}, human, gpt], "system": "b"}


def instructions() -> Iterator[object]:
    yield {"instruction": "a"}
    yield {"instruction": "a", "input": "b"}
    for value in (True, 7, ["b"], {"text": "b"}, "", " \n"):
        yield {"instruction": "a", "output": value}
        yield {"instruction": value, "output": "b"}
        yield {"instruction": value, "response": "b"}
    yield {"instruction": "a", "input": 7, "output": "b"}
    yield {"instruction": "a", "output": "b", "system": ["c"]}
    for history in (7, ["a"], [["a"]], [["a", 7]], {"a": "b"}):
        yield {"instruction": "a", "output": "b", "history": history}
    yield {"instruction": "a", "instances": [{"input": "", "output": "b"}]}


def pairs() -> Iterator[object]:
    yield {"prompt": "a"}
    yield {"completion": "b"}
    yield {"prompt": "a", "chosen": "b", "rejected": 7}
    for value in (True, 7, {}, [], "", " ", ["b"], [7], [USER], [{"role": "assistant"}]):
        yield {"prompt": "a", "completion": value}
    for value in (True, 7, {}, [], "", [7]):
        yield {"prompt": value, "completion": "b"}
    for answer in ("7", "####", "#### ", 7, ["#### 7"], ""):
        yield {"question": "a", "answer": answer}
    yield {"question": "", "answer": "#### 7"}
    yield {"question": 7, "answer": "#### 7"}


def others() -> Iterator[object]:
    yield from ({"text": value} for value in (True, 7, [], {}, "", " \n"))
    yield {"role": "user", "content": "Hi"}
    yield {"foo": "bar"}
    yield {"input_ids": [1, 2, 3]}
    for ids in (7, "1 2", {"0": 1}, [], ["1"], [1.5], [None], [-1], [2**31], [10**30], [99_999]):
        yield {"ids": ids, "mask": [1]}
    for mask in (7, "1", [], [1, 1], ["1"], [None], [[]]):
        yield {"ids": [1], "mask": mask}
    yield {"ids": [1, 2], "labels": [2, 2]}
    yield {"ids": [1, 2, 3], "mask": [0, 0, 0]}
    yield {"ids": [1, 2, 3], "mask": [1, 0, 0]}
