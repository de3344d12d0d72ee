"""A server on loopback that speaks what `whet.rl.server` uses of vLLM and SGLang; Whet's engine
answers. It can be told to misbehave.

Its answers and refusals have the forms of vLLM 0.32.0 and SGLang 0.5.23, as recorded from running
servers on 2026-11-30.
"""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from whet.generate.engine import sample
from whet.model.open import load_backbone_from_ckpt
from whet.rl.remote import request_seed

SGLANG_PARAMS = {"max_new_tokens", "temperature", "top_p", "top_k", "min_p", "stop_token_ids"}
SGLANG_PARAMS |= {"repetition_penalty", "presence_penalty", "frequency_penalty"}
SGLANG_PARAMS |= {"no_stop_trim", "sampling_seed"}
"""Those that Whet sends; SGLang refuses a request with one that it does not know."""


REFUSES = {
    "before 0.16": "reload_weights() got an unexpected keyword argument 'weights_path'",
    "elsewhere": "Repo id must be in the form 'repo_name' or 'namespace/repo_name': '/runs/1'",
}
"""What vLLM says of weights that it cannot take: too old, or on another machine."""


class RefusalError(Exception):
    """An answer that says no: (status, content)."""


class Stub(ThreadingHTTPServer):
    """`fault` names what it does wrong, from rollout `since` on."""

    daemon_threads = True

    def __init__(self, model, kind="vllm", *, fault="", since=0, room=4096, key="", seeds=200):
        super().__init__(("127.0.0.1", 0), Handler)
        self.kind, self.fault, self.since, self.room, self.key = kind, fault, since, room, key
        self.models = {"": load_backbone_from_ckpt(model)}
        self.calls, self.loads, self.lock = [], 0, threading.Lock()
        keys = [(0, rollout, prompt) for rollout in range(seeds) for prompt in range(16)]
        self.keys = {request_seed(key): key for key in [*keys, (0,)]} | {0: (0,)}

    def handle_error(self, request, client_address):
        """A client that leaves, as one that has met a fault does, is no news."""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def does(self, fault):
        return self.fault == fault and self.loads > self.since

    def refuse(self, why, code):
        """SGLang says no more than the message, and always 400."""
        if self.kind == "sglang":
            raise RefusalError(400, {"error": {"message": why}})
        raise RefusalError(code, said(why, code=code))

    def load(self, name, path):
        self.loads += 1
        if self.does("stale"):
            return
        model, self.before = load_backbone_from_ckpt(path), self.models[""]
        if self.does("part"):
            model.embed.load_state_dict(self.before.embed.state_dict())
        self.models[name] = model

    def replies(self, name, ids, n, seed, room, temperature, stop_ids, judges):
        """(ids, logp, stopped) of each reply, and ln p of the prompt's tokens.

        If it `judges` a prompt it computes the keys of that prompt, and takes none from its cache.
        """
        if name not in self.models:
            self.refuse(f"The model `{name}` does not exist.", 404)
        if len(ids) + room > self.room:
            self.refuse(f"maximum context length is {self.room} tokens", 400)
        cached = self.does("stale cache") and not judges
        model = self.before if cached else self.models[name]
        keys = [(*self.keys[seed], k) for k in range(n)]
        with self.lock, torch.no_grad():
            logp = model(torch.tensor([ids]))[0, :-1].log_softmax(-1)
            own = logp.gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist()
            found = sample(model, [ids] * n, keys=keys, max_new_tokens=room,
                           stop_ids=stop_ids, temperature=temperature, batch_size=n)  # fmt: skip
        raw = self.does("raw")  # log-probs that do not know of the temperature
        replies = [
            (r.ids, [x * 3 - 1 for x in r.logp] if raw else r.logp, r.stopped) for r in found
        ]
        return replies[: 1 if self.does("fewer") and n > 1 else n], [None, *own]


def said(message, kind="BadRequestError", code=400):
    """What vLLM says when it refuses."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, content, status=200):
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        server = self.server
        if server.key and self.headers["Authorization"] != f"Bearer {server.key}":
            self.answer({"error": "Unauthorized"}, 401)
            return
        card = {"object": "model", "owned_by": server.kind}
        cards = [card | {"id": "base", "parent": None, "max_model_len": server.room}]
        cards += [
            card | {"id": n, "parent": "base", "max_model_len": None} for n in server.models if n
        ]
        self.answer({"object": "list", "data": cards} if self.path == "/v1/models" else {})

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.calls.append((self.path, body))
        samples = self.path in ("/v1/completions", "/generate")
        if samples and server.does("500"):
            self.answer(
                said("CUDA error: an illegal access\nmore", "InternalServerError", 500), 500
            )
        elif samples and server.does("full") and server.calls.count((self.path, body)) == 1:
            self.answer(said("too many requests", "ServiceUnavailableError", 503), 503)
        elif samples and server.does("slow"):
            time.sleep(9)
        elif samples and server.does("closed"):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
        elif samples and server.does("dead"):
            self.close_connection = True
        elif samples and server.does("another form"):
            self.answer({"choices": [{"text": "a", "token_ids": [1]}] * body["n"]})
        elif self.path == "/collective_rpc" and server.does("production"):
            self.answer({"detail": "Not Found"}, 404)
        elif (
            self.path == "/collective_rpc" and server.fault in REFUSES and server.does(server.fault)
        ):
            why = REFUSES[server.fault]
            self.answer(said(f"Call to collective_rpc method failed: {why}", code=500), 500)
        else:
            try:
                getattr(self, self.path.removeprefix("/v1/").removeprefix("/"))(body)
            except RefusalError as refused:
                self.answer(refused.args[1], refused.args[0])

    def load_lora_adapter(self, body):
        name = body["lora_name"]
        assert name not in self.server.models, "a server remembers names"
        self.server.load(name, body["lora_path"])
        if self.server.fault == "room for one":  # SGLang's --max-loaded-loras 1
            for old in self.server.models.keys() - {"", name}:
                del self.server.models[old]
        self.changed(f"Success: LoRA adapter '{name}' added successfully.")

    def unload_lora_adapter(self, body):
        name = body["lora_name"]
        if name not in self.server.models:
            if self.server.kind == "sglang":
                told = {"success": False, "error_message": f"LoRA with name {name} does not exist."}
                raise RefusalError(400, told | {"loaded_adapters": None})
            self.server.refuse(f"The lora adapter '{name}' cannot be found.", 404)
        del self.server.models[name]
        self.changed(f"Success: LoRA adapter '{name}' removed successfully.")

    def changed(self, words):
        """vLLM answers with a line of text, SGLang with JSON."""
        names = {name: name for name in self.server.models if name}
        told = {"success": True, "error_message": None, "loaded_adapters": names}
        self.answer(words if self.server.kind == "vllm" else told)

    def collective_rpc(self, body):
        assert body["method"] == "reload_weights"
        self.server.load("", body["kwargs"]["weights_path"])
        self.answer({"results": [None]})

    def reset_prefix_cache(self, body):
        """It fails while a request runs: here once."""
        busy = self.server.does("busy") and self.server.calls[-2][0] != "/reset_prefix_cache"
        self.answer({"success": not busy})

    def update_weights_from_disk(self, body):
        self.server.load("", body["model_path"])
        refuses = self.server.does("refuses")
        told = {"message": "shapes differ" if refuses else "", "num_paused_requests": 0}
        self.answer({"success": not refuses, **told}, 400 if refuses else 200)

    def completions(self, body):
        name = "" if body["model"] == "base" else body["model"]
        prompt = body["prompt"]
        replies, own = self.server.replies(
            name, prompt, body["n"], body["seed"], body["max_tokens"],
            body["temperature"], body["stop_token_ids"], "prompt_logprobs" in body,
        )  # fmt: skip
        assert body["ignore_eos"]
        assert body["top_p"] == 1
        table = [None if x is None else {str(i): {"logprob": x, "rank": 1, "decoded_token": "a"}}
                 for i, x in zip(prompt, own, strict=True)]  # fmt: skip
        choices = [
            {
                "index": i,
                "text": "a" * len(ids),
                "logprobs": {"text_offset": [*range(len(ids))], "token_logprobs": logp,
                             "tokens": ["a"] * len(ids),
                             "top_logprobs": [{"a": x} for x in logp]},
                "finish_reason": "stop" if stopped else "length",
                "stop_reason": ids[-1] if stopped else None,
                "token_ids": None if self.server.does("old") else ids,
                "prompt_logprobs": table if body.get("prompt_logprobs") else None,
                "prompt_token_ids": prompt,
            }
            for i, (ids, logp, stopped) in enumerate(replies)
        ]  # fmt: skip
        self.answer({"id": "cmpl-1", "object": "text_completion", "model": body["model"],
                     "choices": choices, "usage": {"prompt_tokens": len(prompt)}})  # fmt: skip

    def generate(self, body):
        answers = []
        (name,) = {*body.get("lora_path", [""])}
        first = body["sampling_params"][0]
        assert set(first) == SGLANG_PARAMS
        prompt = body["input_ids"][0]
        replies, own = self.server.replies(
            name, prompt, len(body["input_ids"]), first["sampling_seed"],
            first["max_new_tokens"], first["temperature"], first["stop_token_ids"],
            "logprob_start_len" in body,
        )  # fmt: skip
        for i, (ids, logp, stopped) in enumerate(replies):
            stop, cut = {"type": "stop", "matched": ids[-1]}, {"type": "length", "length": len(ids)}
            meta = {"id": f"{i}", "finish_reason": stop if stopped else cut,
                    "prompt_tokens": len(prompt), "weight_version": "default",
                    "input_token_logprobs": [],
                    "output_token_logprobs": [[x, i, None] for x, i in zip(logp, ids, strict=True)],
                    "completion_tokens": len(ids), "cached_tokens": 0}  # fmt: skip
            if body.get("logprob_start_len") == 0:
                pairs = zip(own, prompt, strict=True)
                meta["input_token_logprobs"] = [[x, i, None] for x, i in pairs]
            answers.append({"text": "a" * len(ids), "output_ids": ids, "meta_info": meta})
        self.answer(answers)


@contextmanager
def serving(model, kind="vllm", **options):
    """A stub that serves the model directory `model` while the block runs."""
    with Stub(model, kind, **options) as stub:
        thread = threading.Thread(target=stub.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield stub
        finally:
            stub.shutdown()
            thread.join()
