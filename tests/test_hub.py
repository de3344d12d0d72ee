"""Hub names against a stub hub on loopback, with a connection that is cut."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from whet.errors import UserError
from whet.hub import find_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": bytes(range(256)) * 100_000,  # 25.6 MB: the client writes 10 MB at a time
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"a pickle",
    "onnx/model.safetensors": b"x",
}


@dataclass
class StubHub:
    """The few answers of huggingface.co that a download needs."""

    cuts: int = 0
    log: list[tuple[str, str, str]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    endpoint: str = ""


@pytest.fixture
def hub() -> Iterator[StubHub]:
    stub = StubHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None: ...

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path, _, _ = self.path.partition("?")
            wanted = self.headers.get("Range", "")
            stub.log.append((self.command, path, wanted))
            stub.tokens.add(self.headers.get("Authorization", ""))
            if "org/tiny" not in path:
                code = "GatedRepo" if "gated" in path else "RepoNotFound"
                return self.send(403 if "gated" in path else 404, b"", {"X-Error-Code": code})
            if "nowhere" in path:
                return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            if path.startswith("/api/models/org/tiny/tree"):
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": oid(data)}
                    for name, data in FILES.items()
                ]
                return self.send(200, json.dumps(tree).encode())
            if path.startswith("/api/"):
                files = [{"rfilename": name} for name in FILES]
                info = {"id": "org/tiny", "sha": COMMIT, "siblings": files}
                return self.send(200, json.dumps(info).encode())
            data = FILES[path.partition(f"/resolve/{COMMIT}/")[2]]
            begin = int(wanted.removeprefix("bytes=").partition("-")[0] or 0)
            headers = {"ETag": f'"{oid(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if begin:
                headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
            return self.send(206 if begin else 200, data[begin:], headers, body)

        def send(
            self, code: int, data: bytes, headers: dict[str, str] | None = None, body: bool = True
        ) -> None:
            self.send_response(code)
            for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body and stub.cuts and len(data) > 1_000_000:
                stub.cuts -= 1
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
                self.connection.close()
            elif body:
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield stub
    server.shutdown()


def oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def find(stub: StubHub, home: Path, *names: str, **environment: str) -> str:
    """What find_model gives in a process of its own: HF_ENDPOINT is read on import."""
    code = """if True:
        import sys
        from whet.errors import UserError
        from whet.hub import find_model
        try:
            print("FOUND", find_model(*sys.argv[1:]))
        except UserError as error:
            print("TOLD", error)
    """
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    variables |= {"HF_ENDPOINT": stub.endpoint, "HF_HOME": str(home), **environment}
    result = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, text=True, env=variables
    )
    assert result.returncode == 0, result.stderr
    assert "hf_secret" not in result.stdout + result.stderr
    return result.stdout.strip()


def test_a_cut_download_goes_on_and_stays_in_the_cache(hub: StubHub, tmp_path: Path) -> None:
    hub.cuts = 1
    found = find(hub, tmp_path, "org/tiny", COMMIT)
    assert found.startswith("FOUND")
    directory = Path(found.removeprefix("FOUND "))
    assert sorted(file.name for file in directory.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (directory / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    resumed = [wanted for _, path, wanted in hub.log if path.endswith("/model.safetensors")]
    half = len(FILES["model.safetensors"]) // 2
    begins = [int(wanted.removeprefix("bytes=").rstrip("-")) for wanted in resumed if wanted]
    assert any(0 < begin <= half for begin in begins)

    hub.log.clear()
    assert find(hub, tmp_path, "org/tiny", COMMIT, HF_HUB_OFFLINE="1") == found
    assert hub.log == []


@pytest.mark.parametrize(
    ("names", "environment", "message"),
    [
        (["org/other"], {}, "no such model on the Hub"),
        (["org/gated"], {}, "accept the terms"),
        (["org/tiny..b"], {}, "it is not a Hub name: "),
        (["org/tiny", "nowhere"], {}, "has no revision nowhere"),
        (["org/tiny"], {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        (["org/tiny"], {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the Hub did not answer"),
    ],
)
def test_what_cannot_be_found_is_told_in_a_line(
    hub: StubHub, tmp_path: Path, names: list[str], environment: dict[str, str], message: str
) -> None:
    told = find(hub, tmp_path, *names, **environment)
    assert told.startswith("TOLD")
    assert message in told
    assert "\n" not in told


@pytest.mark.parametrize("name", ["org/tiny", "org/other", "org/gated"])
def test_the_token_is_sent_and_never_told(hub: StubHub, tmp_path: Path, name: str) -> None:
    """`find` looks for it in all that was printed."""
    hub.cuts = 1
    find(hub, tmp_path, name, HF_TOKEN="hf_secret", HF_DEBUG="1")
    assert "Bearer hf_secret" in hub.tokens


def test_paths_win_and_have_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_model("org/tiny") == Path("org/tiny")
    with pytest.raises(UserError, match="--revision v1: org/tiny is a path"):
        find_model("org/tiny", "v1")
    for name in ("org/slip", "./org/none", "none", "a/b/c", "/a", "../a/b"):
        with pytest.raises(UserError, match="no such path"):
            find_model(name)
