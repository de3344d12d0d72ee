"""The models that are served, and the prompts and tokens of each."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np

from whet.chat.calls import CallForm
from whet.chat.chat import Chat
from whet.chat.conversation import read_conversation
from whet.chat.encode import encode_chat, encode_prompt
from whet.errors import UserError
from whet.files import short_names
from whet.flags.serve import Config
from whet.generate.opened import open_asked
from whet.report.conversation import EncodedLine, certificate_facts, turns
from whet.report.pieces import token_pieces, token_texts
from whet.serve.requests import ApiError
from whet.serve.worker import Worker

CHATS = 16
"""Settings of the template's variables that are kept ready."""


@dataclass
class Served:
    """A model, its chat, and the thread that computes its replies."""

    name: str
    path: str
    chat: Chat
    worker: Worker
    created: int
    encoding: Lock = field(default_factory=Lock)
    chats: dict[str, Chat] = field(default_factory=dict)

    def prompt(self, given: dict[str, Any]) -> list[int]:
        """The ids that ask for the next message of a chat request. Raises UserError."""
        with self.encoding:
            tools = None if given.get("tool_choice") == "none" else given.get("tools")
            go_on = given.get("continue_final_message", False)
            return encode_prompt(
                given["messages"], self._chat_with(given), tools=tools, go_on=go_on
            )

    def call_form(self, given: dict[str, Any]) -> CallForm | None:
        """How the reply to a chat request would call its tools; None if it has no tools.

        Raises ApiError for a template whose calls can't be read back.
        """
        if not given.get("tools") or given.get("tool_choice") == "none":
            return None
        with self.encoding:
            form = self._chat_with(given).call_form
        if form is None:
            message = (
                "tools: this model's chat template writes no calls with arguments in JSON, so they "
                "could not be read back; leave tools out or set tool_choice to none"
            )
            raise ApiError(400, message, "tools")
        return form

    def text_prompt(self, text: str) -> list[int]:
        """The ids of a text to be continued, as `whet chat --raw` has them."""
        tokenizer = self.chat.tokenizer
        begin = next((i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None), 0)
        with self.encoding:
            return tokenizer.encode(text, ends=True) or [begin]

    def tokens(self, given: Iterable[int]) -> list[dict[str, Any]]:
        """Each id with its text, made visible, and whether it is a control token."""
        ids = list(given)
        index, texts = token_texts(np.array([ids], np.int64), self.chat.tokenizer)
        special = self.chat.special_ids
        return [
            {"id": int(i), "text": texts[at], "control": int(i) in special}
            for i, at in zip(ids, index[0], strict=True)
        ]

    def entry(self, token: int, logp: float) -> dict[str, Any]:
        """A token as the API's log-probabilities name it, with its id."""
        piece = token_pieces(self.chat.tokenizer, [token])[0]
        content = piece if isinstance(piece, bytes) else piece.encode("utf-8", "replace")
        text = content.decode("utf-8", "replace")
        return {"token": text, "id": token, "logprob": logp, "bytes": list(content)}

    def certificate(self, given: dict[str, Any]) -> dict[str, Any]:
        """What would be trained of a conversation, token by token. Raises UserError if refused."""
        with self.encoding:
            chat = self._chat_with(given)
            conversation = read_conversation(given["messages"], tools=given.get("tools"))
            shown = EncodedLine(conversation, encode_chat(conversation, chat), chat)
        examples = [
            [
                {**token, "weight": float(weight)}
                for token, weight in zip(self.tokens(example.ids), example.loss_mask, strict=True)
            ]
            for example in shown.encoded.examples
        ]
        names = ("number", "role", "trained")
        return {
            "examples": examples,
            "turns": [dict(zip(names, turn, strict=True)) for turn in turns(shown)],
            "facts": certificate_facts(shown.encoded.certificate, len(examples)),
        }

    def _chat_with(self, given: dict[str, Any]) -> Chat:
        variables = given.get("chat_template_kwargs") or {}
        if not variables:
            return self.chat
        key = json.dumps(variables, sort_keys=True)
        if key not in self.chats:
            if len(self.chats) >= CHATS:
                self.chats.pop(next(iter(self.chats)))
            try:
                self.chats[key] = self.chat.with_variables(variables)
            except UserError as error:
                message = str(error).replace("--template_kwargs", "chat_template_kwargs")
                raise ApiError(400, message, "chat_template_kwargs") from None
        return self.chats[key]


def open_models(config: Config, now: int) -> dict[str, Served]:
    """The models by name: the last part of each path, where these differ.

    Raises UserError for what cannot be opened, and for a model that is named twice.
    """
    paths = [os.path.normpath(path) if os.path.exists(path) else path for path in config.run]
    if twice := sorted({path for path in paths if paths.count(path) > 1}):
        raise UserError(f"{', '.join(twice)}: named twice; name each model once")
    names = short_names([os.path.abspath(path) for path in paths])
    found: dict[str, Served] = {}
    for path, name in zip(paths, names, strict=True):
        model, chat = open_asked(path, config)
        stops = set(chat.stop_ids)
        context = min(config.context_length, model.config.max_positions)
        worker = Worker(model, stops, context, config.batch_size, config.queue)
        found[name] = Served(name, path, chat, worker, now)
    return found


def model_of(models: dict[str, Served], name: str | None) -> Served:
    """The model that a request names; without a name the only one. Raises ApiError."""
    if name is None and len(models) == 1:
        return next(iter(models.values()))
    known = ", ".join(models)
    if name is None:
        raise ApiError(400, f"model: is missing; served are {known}", "model")
    for served in models.values():
        if name in (served.name, served.path):
            return served
    message = f"model: there is no {name[:200]!r}; served are {known}"
    raise ApiError(404, message, "model", "model_not_found")
