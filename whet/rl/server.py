"""A running vLLM or SGLang server, over HTTP: token ids in, token ids with their log-probs out.

The endpoints are documented ones: vLLM's OpenAI-compatible /v1/completions with `return_token_ids`
(0.10.2 or newer) and its adapter and reload calls, SGLang's native /generate. All that a model's
generation_config.json could change is sent along, so that samples are those of softmax(z / T).
"""

import http.client
import json
import math
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from whet.errors import UserError
from whet.generate.engine import Reply

KEY = "WHET_ROLLOUT_KEY"
"""The environment variable that holds the server's API key, if it wants one."""
NEEDS = {
    "/collective_rpc": "a whole model needs vLLM 0.16 or newer, VLLM_SERVER_DEV_MODE=1; and ",
    "/v1/load_lora_adapter": "it needs VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora, "
    "--max-lora-rank; and ",
    "/load_lora_adapter": "it needs --enable-lora, --max-lora-rank, --lora-target-modules; and ",
    "/update_weights_from_disk": "",
}
"""What a server must be started with to take weights, by endpoint."""
PLAIN = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
PLAIN |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
"""The whole vocabulary's probabilities."""
FULL, PAUSE = 503, 0.5
"""What a server answers whose queue is full (vLLM's --max-num-queued-reqs, SGLang's
--max-queued-requests), and the seconds until it is asked again for what it cannot do yet."""


@dataclass(frozen=True)
class Request:
    """What is asked of the server for one prompt."""

    ids: list[int]
    n: int
    """Replies."""
    room: int
    """Longest reply."""
    temperature: float
    stop_ids: tuple[int, ...]
    seed: int
    """Of the first reply; the k-th has `seed + k`, as vLLM counts."""


@dataclass
class Server:
    """A server, and what it called itself. Threads may share it."""

    url: str
    seconds: float
    """How long it may be silent on one request."""
    kind: Literal["vllm", "sglang"] = "vllm"
    base: str = ""
    """What it calls the model that it was started with."""
    adapter: str = ""
    """What it calls the adapter that answers; empty: none."""
    room: int | None = None
    """The longest text that it takes."""
    stopped: bool = False
    """Requests under way are given up."""
    open: set[http.client.HTTPConnection] = field(default_factory=set)

    def connect(self) -> None:
        """Ask what it is. Raises UserError if it is neither a vLLM nor an SGLang server."""
        models = self._listed(self.call("/v1/models"), "data")
        bases = [m for m in models if isinstance(m, dict) and not m.get("parent")]
        if not bases or bases[0].get("owned_by") not in ("vllm", "sglang"):
            raise self.error("is neither a vLLM nor an SGLang server: its /v1/models names neither")
        self.kind, self.base = bases[0]["owned_by"], str(bases[0].get("id"))
        room = bases[0].get("max_model_len")
        self.room = room if type(room) is int else None

    def load_model(self, directory: Path) -> None:
        """Have it take the weights of a model directory."""
        if self.kind == "sglang":
            body = {"model_path": str(directory), "flush_cache": True}
            self._change("/update_weights_from_disk", body)
            return
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(directory)}}
        self._change("/collective_rpc", body)
        # Keys of the weights before. They stay while a request runs, say of a run that was killed.
        self._change("/reset_prefix_cache", {}, patient=True)

    def load_adapter(self, name: str, directory: Path) -> None:
        """Have it take an adapter under a name, and forget the one before."""
        prefix = "/v1" if self.kind == "vllm" else ""
        body = {"lora_name": name, "lora_path": str(directory)}
        self._change(f"{prefix}/load_lora_adapter", body)
        before, self.adapter = self.adapter, name
        if before:
            with suppress(UserError):  # it may have made room by itself (--max-loaded-loras)
                self._change(f"{prefix}/unload_lora_adapter", {"lora_name": before})

    def sample(self, request: Request) -> list[Reply]:
        """The replies to a prompt. Raises UserError for anything but `n` whole ones."""
        with self._reading():
            return [self._reply(choice, request) for choice in self._choices(request)]

    def judge(self, request: Request) -> tuple[list[float], Reply]:
        """ln p of each token of a prompt but the first, at temperature 1, and a reply to it.

        The reply comes first, by the keys and values that the server has cached if it has; the
        numbers of a prompt's tokens are always computed.
        """
        (reply,), n = self.sample(request), len(request.ids)
        short = replace(request, room=1)
        with self._reading():
            if self.kind == "vllm":
                (choice,) = self._choices(short, prompt_logprobs=1)
                table = self._listed(choice, "prompt_logprobs", n)
                pairs = zip(table[1:], request.ids[1:], strict=True)
                return self._numbers([each[str(i)]["logprob"] for each, i in pairs]), reply
            (choice,) = self._choices(short, logprob_start_len=0)
            table = self._listed(choice["meta_info"], "input_token_logprobs", n)
            return self._numbers([entry[0] for entry in table[1:]]), reply

    def _choices(self, request: Request, **more: int) -> list[Any]:
        """The `n` replies of the server, as it gives them. `more` is asked for besides."""
        if self.kind == "vllm":
            answer = self.call("/v1/completions", self._for_vllm(request) | more)
            return self._listed(answer, "choices", request.n)
        answer = self.call("/generate", self._for_sglang(request) | more)
        return self._listed(answer, None, request.n)

    def stop(self) -> None:
        """Give up all requests under way: their threads end with a UserError."""
        self.stopped = True
        for connection in list(self.open):
            if connection.sock is not None:
                with suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)

    def error(self, what: str) -> UserError:
        """A problem with this server, in a line."""
        return UserError(f"--rollout_url {self.url}: {what}")

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer to a request: JSON, or text where it is none.

        A server that has no room now is asked again for as long as an answer may take. Raises
        UserError if there is no server, no answer in time, or one that says no.
        """
        until = time.monotonic() + self.seconds
        while True:
            status, text = self._ask(path, body)
            if status != FULL or self.stopped or time.monotonic() > until:
                break
            time.sleep(PAUSE)
        try:
            answer = json.loads(text) if text.strip() else None
        except ValueError:
            answer = text
        if status >= 400:
            raise self.error(f"answered {path} with {status}: {_said(answer)}{_hint(path, status)}")
        return answer

    def _ask(self, path: str, body: dict[str, Any] | None) -> tuple[int, str]:
        """Status and text of the answer to one request."""
        where = urlsplit(self.url)
        secure = where.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(where.netloc, timeout=self.seconds)
        self.open.add(connection)
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body)
        try:
            connection.connect()
            if self.stopped:
                raise ConnectionAbortedError("given up")
            connection.request("GET" if data is None else "POST", where.path + path, data, headers)
            response = connection.getresponse()
            return response.status, response.read().decode(errors="replace")
        except TimeoutError as error:
            late = f"did not answer {path} within --rollout_seconds {self.seconds:g}"
            raise self.error(late) from error
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise self.error(f"no whole answer to {path}: {cause.splitlines()[0]}") from error
        finally:
            self.open.discard(connection)
            connection.close()

    def _change(self, path: str, body: dict[str, Any], *, patient: bool = False) -> None:
        """A request that changes something; the answer may say that it did not.

        If `patient`, ask again for as long as an answer may take.
        """
        until = time.monotonic() + (self.seconds if patient else 0)
        while isinstance(answer := self.call(path, body), dict) and answer.get("success") is False:
            if time.monotonic() > until:
                raise self.error(f"{path} failed: {_said(answer)}")
            time.sleep(PAUSE)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Raise UserError where an answer is not of the form that is read in the block."""
        try:
            yield
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise self.error(
                f"gave an answer of an unknown form ({type(error).__name__}: {error}): it is too "
                "old, or too new"
            ) from error

    def _for_vllm(self, request: Request) -> dict[str, Any]:
        return {
            "model": self.adapter or self.base,
            "prompt": request.ids,
            "n": request.n,
            "max_tokens": request.room,
            "temperature": request.temperature,
            **PLAIN,
            "seed": request.seed,
            "ignore_eos": True,  # the stop tokens are those of the chat, and no others
            "stop_token_ids": list(request.stop_ids),
            "logprobs": 0,  # of the token itself alone
            "return_token_ids": True,
        }

    def _for_sglang(self, request: Request) -> dict[str, Any]:
        params = {
            "max_new_tokens": request.room,
            "temperature": request.temperature,
            **PLAIN,
            "stop_token_ids": list(request.stop_ids),
            "no_stop_trim": True,
        }
        seeds = range(request.seed, request.seed + request.n)
        return {
            "input_ids": [request.ids] * request.n,  # equal beginnings are computed once
            "sampling_params": [{**params, "sampling_seed": seed} for seed in seeds],
            "return_logprob": True,
            **({"lora_path": [self.adapter] * request.n} if self.adapter else {}),
        }

    def _reply(self, choice: Any, request: Request) -> Reply:
        """One reply of an answer, checked."""
        if self.kind == "vllm":
            if choice.get("token_ids") is None:
                raise self.error("gives no token_ids: it is too old; vLLM 0.10.2 or newer does")
            ids, logp = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            reason = choice["finish_reason"]
        else:
            meta = choice["meta_info"]
            ids = [entry[1] for entry in meta["output_token_logprobs"]]
            logp = [entry[0] for entry in meta["output_token_logprobs"]]
            reason = meta["finish_reason"]["type"]
        if not 1 <= len(ids) <= request.room or len(logp) != len(ids):
            raise self.error(
                f"gave a reply of {len(ids)} tokens with {len(logp)} log-probs; 1 to "
                f"{request.room} were asked for, each with its own"
            )
        if not all(type(i) is int and i >= 0 for i in ids):
            raise self.error(f"gave tokens that are no ids: {str(ids)[:80]}")
        logp = self._numbers(logp)
        stopped = ids[-1] in request.stop_ids
        if not stopped and reason != "length":
            raise self.error(
                f"ended a reply ({reason}) with token {ids[-1]}, which is none of the chat's stop "
                f"tokens {list(request.stop_ids)}"
            )
        return Reply(list(ids), logp, stopped)

    def _numbers(self, logp: list[Any]) -> list[float]:
        """Log-probs, each a finite number."""
        if not all(type(x) in (int, float) and math.isfinite(x) for x in logp):
            raise self.error("gave a log-prob that is no finite number")
        return [float(x) for x in logp]

    def _listed(self, answer: Any, name: str | None, count: int | None = None) -> list[Any]:
        """A list that an answer must hold, of `count` entries: the answer itself without a name."""
        found = answer.get(name) if name and isinstance(answer, dict) else answer
        what = name or "replies"
        if not isinstance(found, list):
            raise self.error(f"gave no {what}: it is another server, or too old")
        if count is not None and len(found) != count:
            raise self.error(f"gave {len(found)} {what}, {count} were asked for")
        return found


def _said(answer: Any) -> str:
    """The first line of what a server says for people."""
    for name in ("error", "message", "error_message", "detail"):
        if isinstance(answer, dict) and answer.get(name):
            answer = answer[name]
    lines = str(answer or "").splitlines()
    return lines[0][:300] if lines else "without a word"


def _hint(path: str, status: int) -> str:
    """What a server lacks that does not know an endpoint, or does not do what it is asked for."""
    if status == 401:
        return f"; its key is read from the environment variable {KEY}"
    if path not in NEEDS:
        return ""
    return f"; {NEEDS[path]}it must see --out under the same path"
