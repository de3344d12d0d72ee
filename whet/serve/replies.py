"""Replies on their way to a client: from pieces of tokens to the API's own forms."""

import asyncio
import itertools
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from starlette.requests import ClientDisconnect, Request

from whet.chat.calls import Call, CallForm
from whet.generate.rows import Piece, Row
from whet.generate.text import TextStream
from whet.serve.models import Served
from whet.serve.requests import ApiError, Settings
from whet.serve.worker import Full, Job

LOOK_EVERY_S = 0.5
"""Seconds between two looks whether the client is still there."""
_numbers = itertools.count()


class Tools(NamedTuple):
    """What a reply may call, and how the template writes that."""

    form: CallForm
    names: list[str]


class Part(NamedTuple):
    """What has become certain of a reply."""

    text: str
    entries: list[dict[str, Any]]
    """Its tokens' log-probabilities, if they are wanted."""
    finish: str | None
    calls: list[Call] = []  # noqa: RUF012 -- nobody adds to it


@dataclass
class Choice:
    """One reply of a request, as far as it is there."""

    served: Served
    settings: Settings
    text: TextStream
    row: Row
    tools: Tools | None = None
    parts: list[Part] = field(default_factory=list)
    count: int = 0
    """Tokens so far, the stop token included."""
    finish: str | None = None
    held: str = ""
    """Text that may be the beginning of a stop string, or of calls."""

    def take(self, piece: Piece) -> Part:
        """What becomes certain with the next tokens; those after a stop string are dropped."""
        new, entries, calls = "", [], list[Call]()
        for i, token in enumerate(piece.tokens):
            self.count += 1
            if self.settings.top is not None:
                top = [self.served.entry(*each) for each in piece.top[i][: self.settings.top]]
                entry = self.served.entry(token, piece.logp[i])
                entries.append({**entry, "top_logprobs": top})
            stopped = token in self.served.worker.stop_ids
            is_last = piece.ended and i == len(piece.tokens) - 1
            text = "" if stopped else self.text.push(token)
            new += self._certain(text + self.text.end() if is_last else text, is_last)
            if is_last and not self.finish:
                self.finish = "stop" if stopped else "length"
            if self.finish:
                break
        if (
            self.tools
            and self.finish == "stop"
            and (found := self.tools.form.read(new, self.tools.names))
        ):
            (new, calls), self.finish = found, "tool_calls"
        self.parts.append(Part(new, entries, self.finish, calls))
        return self.parts[-1]

    def whole(self) -> Part:
        """The reply as one part."""
        entries = [entry for part in self.parts for entry in part.entries]
        calls = self.parts[-1].calls if self.parts else []
        text = "".join(part.text for part in self.parts)
        return Part(text.rstrip() if calls else text, entries, self.finish, calls)

    def _certain(self, text: str, is_last: bool) -> str:
        """`text` up to a stop string. What may be the beginning of one is held back, and all from
        where calls may begin: they are known when the reply has ended."""
        stops = self.settings.stops
        text, self.held = self.held + text, ""
        if places := [at for stop in stops if (at := text.find(stop)) >= 0]:
            self.finish = "stop"
            return text[: min(places)]
        if is_last:
            return text
        sign = self.tools.form.sign if self.tools else ""
        end = text.find(sign) if sign and sign in text else len(text)
        for mark in (*stops, sign):
            begun = (n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n]))
            end = min(end, len(text) - next(begun, 0))
        text, self.held = text[:end], text[end:]
        return text


class Answer:
    """The replies to one request, `n` to each of `prompts`; queued when it is made.

    `kind` is chat or text. Raises ApiError if they can't be queued.
    """

    def __init__(
        self,
        served: Served,
        prompts: list[list[int]],
        settings: Settings,
        kind: str,
        timeout: float,
        tools: Tools | None = None,
    ) -> None:
        self.served, self.settings, self.kind, self.timeout = served, settings, kind, timeout
        self.tools = tools
        self.prompt_tokens = sum(map(len, prompts))
        self.until, self.look = time.monotonic() + timeout, 0.0
        self.loop = asyncio.get_running_loop()
        self.news: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
        asked = [prompt for prompt in prompts for _ in range(settings.n)]
        most = served.worker.queue + served.worker.batch_size
        if len(asked) > most:
            raise ApiError(
                400, f"n: asks for {len(asked):,} replies; at most {most:,} fit at once", "n"
            )
        self.choices = [self._choice(prompt, i) for i, prompt in enumerate(asked)]
        jobs = [Job(c.row, partial(self._deliver, i)) for i, c in enumerate(self.choices)]
        try:
            served.worker.submit(jobs)
        except Full:
            message = f"{served.name} has {served.worker.queue:,} replies waiting; try again later"
            raise ApiError(429, message, code="queue_full") from None
        form = "text_completion"
        if kind == "chat":
            form = "chat.completion.chunk" if settings.stream else "chat.completion"
        name = f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}"
        now = int(time.time())
        self.head = {"id": name, "object": form, "created": now, "model": served.name}

    def _choice(self, prompt: list[int], index: int) -> Choice:
        settings, context = self.settings, self.served.worker.context
        asked = settings.max_tokens
        if len(prompt) + (asked or 1) > context:
            reply = f" and max_tokens is {asked:,}" if asked else ""
            message = f"the prompt has {len(prompt):,} tokens{reply}; the context holds {context:,}"
            raise ApiError(400, message, "messages", "context_length_exceeded")
        end = len(prompt) + asked if asked else context
        key = (settings.seed, index)
        row = Row(next(_numbers), key, list(prompt), end, settings.sampling, settings.top or 0)
        before = () if self.kind == "chat" else prompt[-4:]
        # Some templates begin calls with a control token, which is left out of texts otherwise.
        control = self.served.chat.control_pattern if self.tools else None
        shown = bool(self.tools and control and control.search(self.tools.form.before))
        text = TextStream(self.served.chat.tokenizer, before, show_control=shown)
        return Choice(self.served, settings, text, row, self.tools)

    def _deliver(self, index: int, news: Piece | Exception) -> None:
        """Hand `news` of a choice over from the worker's thread."""
        with suppress(RuntimeError):  # the server has stopped meanwhile
            self.loop.call_soon_threadsafe(self.news.put_nowait, (index, news))

    def give_up(self) -> None:
        """Free the rows of what has not ended."""
        self.served.worker.cancel({c.row.index for c in self.choices})

    async def parts(self, request: Request) -> AsyncIterator[tuple[int, Part]]:
        """The parts of all choices as they come. Raises ApiError where something goes wrong."""
        open_choices = len(self.choices)
        try:
            while open_choices:
                index, news = await self._next(request)
                choice = self.choices[index]
                if isinstance(news, Exception):
                    message = f"the model failed: {type(news).__name__}: {news}"
                    raise ApiError(503, message.splitlines()[0][:300])
                if choice.finish:
                    continue  # tokens after a stop string that were under way
                part = choice.take(news)
                if choice.finish:
                    open_choices -= 1
                    self.served.worker.cancel({choice.row.index})
                yield index, part
        finally:
            self.give_up()

    async def _next(self, request: Request) -> tuple[int, Piece | Exception]:
        while True:
            now = time.monotonic()
            if now > self.until:
                message = f"the reply took longer than {self.timeout:g} s, waiting included"
                raise ApiError(503, message, code="timeout")
            if now > self.look:
                self.look = now + LOOK_EVERY_S
                if await request.is_disconnected():
                    raise ClientDisconnect
            with suppress(asyncio.TimeoutError):
                return await asyncio.wait_for(self.news.get(), LOOK_EVERY_S)

    async def whole(self, request: Request) -> dict[str, Any]:
        """The reply to a request that does not stream."""
        async for _ in self.parts(request):
            pass
        choices = [self._form(i, choice.whole()) for i, choice in enumerate(self.choices)]
        return {**self.head, "choices": choices, "usage": self._usage()}

    async def events(self, request: Request) -> AsyncIterator[str]:
        """The reply as server-sent events."""
        more = {"usage": None} if self.settings.usage else {}
        if self.kind == "chat":
            for i in range(len(self.choices)):
                first = {"delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                yield _event({**self.head, "choices": [{"index": i, **first}], **more})
        try:
            async for i, part in self.parts(request):
                if part.text or part.entries or part.finish:
                    yield _event({**self.head, "choices": [self._form(i, part)], **more})
        except ApiError as error:
            yield _event(error.as_dict())
            return
        if self.settings.usage:
            yield _event({**self.head, "choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    def _usage(self) -> dict[str, int]:
        prompt, reply = self.prompt_tokens, sum(choice.count for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": reply,
            "total_tokens": prompt + reply,
        }

    def _form(self, index: int, part: Part) -> dict[str, Any]:
        """A choice of the API's reply."""
        ends = {"index": index, "finish_reason": part.finish}
        wanted = self.settings.top is not None
        if self.kind == "text":
            return {**ends, "text": part.text, "logprobs": _by_column(part) if wanted else None}
        logprobs = {"content": part.entries, "refusal": None} if wanted else None
        said: dict[str, Any] = {"content": part.text}
        if part.calls:
            said = {"content": part.text or None, "tool_calls": _calls(part.calls)}
        if self.settings.stream:
            for number, call in enumerate(said.get("tool_calls", [])):
                call["index"] = number
            return {**ends, "delta": said, "logprobs": logprobs}
        message = {"role": "assistant", "refusal": None, **said}
        return {**ends, "message": message, "logprobs": logprobs}


def _calls(calls: list[Call]) -> list[dict[str, Any]]:
    """Calls in the API's form; nine letters and digits, since some templates take no other id."""
    return [
        {
            "id": uuid.uuid4().hex[:9],
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
        }
        for name, arguments in calls
    ]


def _by_column(part: Part) -> dict[str, Any]:
    """Log-probabilities in the form of /v1/completions."""
    return {
        "tokens": [entry["token"] for entry in part.entries],
        "token_logprobs": [entry["logprob"] for entry in part.entries],
        "top_logprobs": [
            {top["token"]: top["logprob"] for top in entry["top_logprobs"]}
            for entry in part.entries
        ],
    }


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
