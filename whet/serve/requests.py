"""What a request asks for: each field is honoured, or refused by name.

The names and meanings are those of OpenAI's API, with vLLM's further ones.
"""

import difflib
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from whet.generate.rows import GREEDY, Sampling

Fields = dict[str, Callable[[Any], str]]
"""The fields of a request, by name: what was expected in the place of a wrong value, or ""."""
MOST_CHOICES = 16
MOST_STOPS = 16
MOST_TOP = 20


class ApiError(Exception):
    """An answer in the API's own form of errors."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def as_dict(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        said = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": said}


def _number(least: float, most: float, whole: bool = False) -> Callable[[Any], str]:
    kinds = (int,) if whole else (int, float)
    what = f"a {'whole ' if whole else ''}number from {least:,} to {most:,}"
    return lambda v: "" if type(v) in kinds and least <= v <= most else what


def _kind(kind: type, what: str) -> Callable[[Any], str]:
    return lambda value: "" if isinstance(value, kind) else what


def _only(*values: Any) -> Callable[[Any], str]:
    """For what Whet does not do: no other value than those that ask for nothing. A number is no
    truth value, though Python takes 1 and True for one."""
    what = f"{' or '.join(map(repr, values))} (others are not supported)"

    def is_one(value: Any, other: Any) -> bool:
        return value == other and isinstance(value, bool) == isinstance(other, bool)

    return lambda value: "" if any(is_one(value, other) for other in values) else what


def _stream_options(value: Any) -> str:
    known = ("include_usage", "include_obfuscation")
    good = isinstance(value, dict) and all(
        name in known and isinstance(on, bool) for name, on in value.items()
    )
    return "" if good else f"an object of {' and '.join(known)}, each true or false"


def _anything(value: Any) -> str:
    return ""


def _stops(value: Any) -> str:
    stops = [value] if isinstance(value, str) else value
    good = isinstance(stops, list) and len(stops) <= MOST_STOPS
    good = good and all(isinstance(stop, str) and stop for stop in stops)
    return "" if good else f"a text, or a list of at most {MOST_STOPS} texts, none empty"


def function_name(tool: Any) -> Any:
    """The name of a tool's function: in `function`, as in OpenAI's API, or bare."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    return function.get("name") if isinstance(function, dict) else None


def _tools(value: Any) -> str:
    good = isinstance(value, list) and all(isinstance(function_name(t), str) for t in value)
    return "" if good else "a list of tools, each with a function that has a name"


_flag = _kind(bool, "true or false")
_object = _kind(dict, "an object")
_count = _number(1, 1 << 30, whole=True)
COMMON: Fields = {
    "model": _kind(str, "a text"),
    "stream": _flag,
    "stream_options": _stream_options,
    "stop": _stops,
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "top_k": _number(-1, 1 << 30, whole=True),  # -1 and 0: all, as in vLLM
    "seed": _number(0, (1 << 63) - 1, whole=True),
    "n": _number(1, MOST_CHOICES, whole=True),
    "max_tokens": _count,
    **dict.fromkeys(("user", "metadata", "safety_identifier", "prompt_cache_key"), _anything),
    "store": _anything,
    "service_tier": _anything,
    "frequency_penalty": _only(0),
    "presence_penalty": _only(0),
    "repetition_penalty": _only(1),
    "min_p": _only(0),
    "logit_bias": _only({}),
}
CHAT = COMMON | {
    "messages": _kind(list, "a list of messages"),
    "max_completion_tokens": _count,
    "logprobs": _flag,
    "top_logprobs": _number(0, MOST_TOP, whole=True),
    "tools": _tools,
    "tool_choice": _only("auto", "none"),
    "parallel_tool_calls": _only(True),  # how many calls a reply makes is the model's choice
    "chat_template_kwargs": _object,
    "continue_final_message": _flag,
    "add_generation_prompt": _flag,
    "response_format": _only({"type": "text"}),
    "modalities": _only(["text"]),
}
COMPLETION = COMMON | {
    "prompt": _kind((str | list), "a text or token ids, or a list of these"),  # type: ignore[arg-type]
    "logprobs": _number(0, MOST_TOP, whole=True),
    "echo": _only(False),
    "suffix": _only(""),
    "best_of": _only(1),
}
CERTIFICATE = {name: CHAT[name] for name in ("model", "messages", "tools", "chat_template_kwargs")}
TOKENIZE = CERTIFICATE | {"prompt": _kind(str, "a text")}
TOKENIZE |= {name: CHAT[name] for name in ("continue_final_message", "add_generation_prompt")}


@dataclass(frozen=True)
class Settings:
    """How replies are made and handed over."""

    sampling: Sampling
    seed: int
    n: int
    stops: tuple[str, ...]
    max_tokens: int | None
    top: int | None
    """Log-probabilities with so many alternatives; None: none are wanted."""
    stream: bool
    usage: bool
    """Whether a stream ends with the count of tokens."""


def checked(body: Any, fields: Fields) -> dict[str, Any]:
    """The fields of `body` that are given. Raises ApiError for the first that is wrong."""
    if not isinstance(body, dict):
        raise ApiError(400, "the body is no JSON object")
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise ApiError(400, f"{name}: there is no such field{meant}", name)
        if wrong := fields[name](value):
            shown = repr(value)[:80]
            raise ApiError(400, f"{name}: expected {wrong}, got {shown}", name)
    return given


def settings(given: dict[str, Any]) -> Settings:
    """What the fields of a chat or completion request say about its replies."""
    top = given.get("top_logprobs", 0) if given.get("logprobs") is True else given.get("logprobs")
    if top is False:
        top = None
    if "top_logprobs" in given and top is None:
        raise ApiError(400, "top_logprobs: needs logprobs to be true", "top_logprobs")
    longest = {given[name] for name in ("max_completion_tokens", "max_tokens") if name in given}
    if len(longest) > 1:
        raise ApiError(400, "max_tokens: differs from max_completion_tokens", "max_tokens")
    options = given.get("stream_options", {})
    if options and not given.get("stream"):
        raise ApiError(400, "stream_options: needs stream to be true", "stream_options")
    top_k, top_p = given.get("top_k", -1), given.get("top_p", 1)
    sampling = Sampling(float(given.get("temperature", 1)), top_k if top_k > 0 else None, top_p)
    stop = given.get("stop", [])
    return Settings(
        sampling if sampling.temperature else GREEDY,
        given.get("seed", secrets.randbits(63)),
        given.get("n", 1),
        (stop,) if isinstance(stop, str) else tuple(stop),
        next(iter(longest), None),
        top,
        given.get("stream", False),
        options.get("include_usage", False),
    )
