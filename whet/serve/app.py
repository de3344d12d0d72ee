"""The routes of the server, its chat page, and the bounds on what reaches them."""

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from whet.data.reader import no_key_twice
from whet.errors import UserError
from whet.report.markup import STYLE, fill
from whet.serve.models import Served, model_of
from whet.serve.replies import Answer, Tools
from whet.serve.requests import (
    CERTIFICATE,
    CHAT,
    COMPLETION,
    TOKENIZE,
    ApiError,
    Fields,
    checked,
    function_name,
    settings,
)

MOST_BYTES = 8 << 20
"""Of a request's body."""
BODY_S = 30.0
"""Seconds for a body to arrive."""
SAFE = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


@dataclass(frozen=True)
class Server:
    """What the routes answer from."""

    models: dict[str, Served]
    key: str | None
    timeout: float

    def app(self) -> Starlette:
        """The whole application."""
        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/v1/models", self.guarded(self.list_models)),
            Route("/v1/models/{name:path}", self.guarded(self.one_model)),
            Route("/v1/chat/completions", self.asked(CHAT, self.chat), methods=["POST"]),
            Route("/v1/completions", self.asked(COMPLETION, self.completion), methods=["POST"]),
            Route("/tokenize", self.asked(TOKENIZE, self.tokenize), methods=["POST"]),
            Route("/certificate", self.asked(CERTIFICATE, self.certificate), methods=["POST"]),
        ]
        handlers: Any = {
            ApiError: _refused,
            UserError: _refused,
            HTTPException: _refused,
            ClientDisconnect: _gone,
            Exception: _failed,
        }
        return Starlette(routes=routes, exception_handlers=handlers)

    def guarded(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Any:
        """`endpoint` for those only who show the key, if there is one."""

        async def answer(request: Request) -> Response:
            said = request.headers.get("authorization", "").encode()
            if self.key and not hmac.compare_digest(said, f"Bearer {self.key}".encode()):
                raise ApiError(401, "this server asks for its key", code="invalid_api_key")
            return await endpoint(request)

        return answer

    def asked(self, fields: Fields, endpoint: Callable[..., Awaitable[Response]]) -> Any:
        """`endpoint` with the request's checked `fields` and the model that they name."""

        async def answer(request: Request) -> Response:
            given = checked(await _body(request), fields)
            return await endpoint(request, model_of(self.models, given.get("model")), given)

        return self.guarded(answer)

    async def page(self, request: Request) -> Response:
        """The chat page, whose scripts talk to this server only."""
        headers = {**SAFE, "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY"}
        chat = Path(__file__).with_name("chat.html")
        text = fill(chat, [STYLE, chat.with_suffix(".css")], chat.with_suffix(".js"))
        return Response(text, media_type="text/html", headers=headers)

    async def health(self, request: Request) -> Response:
        """Whether every model is at work, and how busy it is."""
        alive = all(served.worker.thread.is_alive() for served in self.models.values())
        busy = {
            name: {"running": len(s.worker.running), "waiting": len(s.worker.waiting)}
            for name, s in self.models.items()
        }
        status = "ok" if alive else "a model has stopped"
        return _json({"status": status, "models": busy}, 200 if alive else 503)

    async def list_models(self, request: Request) -> Response:
        """GET /v1/models."""
        return _json({"object": "list", "data": [_card(s) for s in self.models.values()]})

    async def one_model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        return _json(_card(model_of(self.models, request.path_params["name"])))

    async def chat(self, request: Request, served: Served, given: dict[str, Any]) -> Response:
        """POST /v1/chat/completions."""
        asked = settings(given)
        prompt = await run_in_threadpool(_prompt, served, given)
        form = await run_in_threadpool(served.call_form, given)
        tools = Tools(form, [function_name(tool) for tool in given["tools"]]) if form else None
        answer = Answer(served, [prompt], asked, "chat", self.timeout, tools)
        return await self._reply(request, answer)

    async def completion(self, request: Request, served: Served, given: dict[str, Any]) -> Response:
        """POST /v1/completions."""
        asked = settings({"max_tokens": 16, **given})  # as in OpenAI's API
        prompts = await run_in_threadpool(_text_prompts, served, given.get("prompt"))
        return await self._reply(request, Answer(served, prompts, asked, "text", self.timeout))

    async def _reply(self, request: Request, answer: Answer) -> Response:
        if not answer.settings.stream:
            return _json(await answer.whole(request))
        return StreamingResponse(
            answer.events(request),
            media_type="text/event-stream",
            headers={**SAFE, "X-Accel-Buffering": "no"},
            background=BackgroundTask(answer.give_up),
        )

    async def tokenize(self, request: Request, served: Served, given: dict[str, Any]) -> Response:
        """POST /tokenize, as vLLM has it: the ids of a prompt, and here the text of each."""
        if "prompt" in given and "messages" in given:
            raise ApiError(400, "prompt: leave it out or leave out messages", "prompt")
        if "prompt" in given:
            ids = await run_in_threadpool(served.text_prompt, given["prompt"])
        else:
            ids = await run_in_threadpool(_prompt, served, given)
        tokens = await run_in_threadpool(served.tokens, ids)
        found = {"count": len(ids), "max_model_len": served.worker.context, "tokens": ids}
        found["token_strs"] = [token["text"] for token in tokens]
        return _json({**found, "control": [token["control"] for token in tokens]})

    async def certificate(
        self, request: Request, served: Served, given: dict[str, Any]
    ) -> Response:
        """POST /certificate: what would be trained of a conversation."""
        _needs_messages(given)
        return _json(await run_in_threadpool(served.certificate, given))


def _prompt(served: Served, given: dict[str, Any]) -> list[int]:
    _needs_messages(given)
    go_on = given.get("continue_final_message", False)
    if go_on == given.get("add_generation_prompt", not go_on):
        message = "set one of add_generation_prompt and continue_final_message"
        raise ApiError(400, message, "add_generation_prompt")
    return served.prompt(given)


def _needs_messages(given: dict[str, Any]) -> None:
    if not given.get("messages"):
        raise ApiError(400, "messages: is missing or empty", "messages")


def _text_prompts(served: Served, asked: Any) -> list[list[int]]:
    """The prompts of /v1/completions: a text, ids, or a list of these."""
    several = asked if isinstance(asked, list) else [asked]
    if several and all(type(i) is int for i in several):
        several = [several]
    if not several:
        raise ApiError(400, "prompt: is empty", "prompt")
    size, found = served.chat.tokenizer.vocab_size, []
    for each in several:
        if isinstance(each, str):
            found.append(served.text_prompt(each))
        elif (
            isinstance(each, list) and each and all(type(i) is int and 0 <= i < size for i in each)
        ):
            found.append(each)
        else:
            message = f"prompt: expected a text, or token ids from 0 to {size - 1:,}"
            raise ApiError(400, message, "prompt")
    return found


async def _body(request: Request) -> Any:
    """The JSON of a request. Raises ApiError if it is none, too long or too slow."""
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        # A page of another origin can't send it without asking, so it can't use the models.
        raise ApiError(415, "expected the header Content-Type: application/json")
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in request.stream():
                content += chunk
                if len(content) > MOST_BYTES:
                    raise ApiError(413, f"the body has more than {MOST_BYTES:,} bytes")
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_S:g} s") from None
    try:
        return json.loads(content, object_pairs_hook=no_key_twice)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None


def _card(served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "whet",
        "root": served.path,
        "max_model_len": served.worker.context,
    }


def _json(content: Any, status: int = 200) -> Response:
    text = json.dumps(content)  # ASCII: half a character in it does no harm
    return Response(text, status, SAFE, "application/json")


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        error = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    elif isinstance(error, UserError):
        error = ApiError(400, str(error))
    assert isinstance(error, ApiError)
    return _json(error.as_dict(), error.status)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _failed(request: Request, error: Exception) -> Response:
    said = ApiError(500, "this is a defect of Whet; its traceback stands in the server's output")
    return _json(said.as_dict(), 500)
