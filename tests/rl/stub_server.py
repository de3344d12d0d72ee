"""A server on loopback that speaks what `whet.rl.server` uses of vLLM and SGLang; Whet's engine
answers. It can be told to misbehave."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from whet.generate.engine import sample
from whet.model.open import load_backbone_from_ckpt
from whet.rl.remote import request_seed


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

    def load(self, name, path):
        self.loads += 1
        if not self.does("stale"):
            self.models[name] = load_backbone_from_ckpt(path)

    def replies(self, name, ids, n, seed, room, temperature, stop_ids):
        """(ids, logp, reason) of each reply, and ln p of the prompt's tokens."""
        model = self.models[name]
        keys = [(*self.keys[seed], k) for k in range(n)]
        with self.lock, torch.no_grad():
            logp = model(torch.tensor([ids]))[0, :-1].log_softmax(-1)
            own = logp.gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist()
            found = sample(model, [ids] * n, keys=keys, max_new_tokens=room,
                           stop_ids=stop_ids, temperature=temperature, batch_size=n)  # fmt: skip
        raw = self.does("raw")  # log-probs that do not know of the temperature
        replies = [
            (
                r.ids,
                [x * 3 - 1 for x in r.logp] if raw else r.logp,
                "stop" if r.stopped else "length",
            )
            for r in found
        ]
        return replies[: 1 if self.does("fewer") and n > 1 else n], [None, *own]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            self.answer({"error": "Unauthorized"}, 401)
            return
        card = {"id": "base", "owned_by": self.server.kind, "max_model_len": self.server.room}
        adapters = [{"id": n, "parent": "base"} for n in self.server.models if n]
        self.answer({"data": [*adapters, card]} if self.path == "/v1/models" else {})

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.calls.append((self.path, body))
        samples = self.path in ("/v1/completions", "/generate")
        if samples and server.does("500"):
            self.answer({"error": {"message": "CUDA error: an illegal access\nmore"}}, 500)
        elif samples and server.does("slow"):
            time.sleep(9)
        elif samples and server.does("closed"):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
        elif samples and server.does("dead"):
            self.close_connection = True
        elif self.path == "/collective_rpc" and server.does("production"):
            self.answer({"detail": "Not Found"}, 404)
        else:
            getattr(self, self.path.removeprefix("/v1/").removeprefix("/"))(body)

    def load_lora_adapter(self, body):
        assert body["lora_name"] not in self.server.models, "a server remembers names"
        self.server.load(body["lora_name"], body["lora_path"])
        self.answer({"success": True})

    def unload_lora_adapter(self, body):
        del self.server.models[body["lora_name"]]
        self.answer({"success": True})

    def collective_rpc(self, body):
        assert body["method"] == "reload_weights"
        self.server.load("", body["kwargs"]["weights_path"])
        self.answer({"results": [None]})

    def reset_prefix_cache(self, body):
        self.answer(None)

    def update_weights_from_disk(self, body):
        self.server.load("", body["model_path"])
        if self.server.does("refuses"):
            self.answer({"success": False, "message": "shapes differ"})
        else:
            self.answer({"success": True, "message": ""})

    def completions(self, body):
        name = "" if body["model"] == "base" else body["model"]
        replies, own = self.server.replies(
            name, body["prompt"], body["n"], body["seed"], body["max_tokens"],
            body["temperature"], body["stop_token_ids"],
        )  # fmt: skip
        assert body["ignore_eos"]
        assert body["top_p"] == 1
        choices = [
            {"index": i, "token_ids": ids, "logprobs": {"token_logprobs": logp},
             "finish_reason": reason}
            for i, (ids, logp, reason) in enumerate(replies)
        ]  # fmt: skip
        for choice in choices if self.server.does("old") else ():
            del choice["token_ids"]
        if body.get("prompt_logprobs"):
            pairs = zip(body["prompt"], own, strict=True)
            table = [None if x is None else {str(i): {"logprob": x}} for i, x in pairs]
            choices[0]["prompt_logprobs"] = table
        self.answer({"choices": choices[::-1]})

    def generate(self, body):
        answers = []
        (name,) = {*body.get("lora_path", [""])}
        first = body["sampling_params"][0]
        replies, own = self.server.replies(
            name, body["input_ids"][0], len(body["input_ids"]), first["sampling_seed"],
            first["max_new_tokens"], first["temperature"], first["stop_token_ids"],
        )  # fmt: skip
        for ids, logp, reason in replies:
            found = {
                "output_token_logprobs": [[x, i, None] for x, i in zip(logp, ids, strict=True)]
            }
            found["finish_reason"] = {"type": reason}
            pairs = zip(own, body["input_ids"][0], strict=True)
            found["input_token_logprobs"] = [[x, i, None] for x, i in pairs]
            answers.append({"output_ids": ids, "meta_info": found})
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
