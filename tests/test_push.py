"""`whet push` against a stub hub on loopback: what goes up, and what stays."""

import base64
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

from tests import tiny
from whet.hub import is_hub_name
from whet.push import files_of, flaws_of, model_card, public_lineage


@dataclass
class StubHub:
    """The few answers of huggingface.co that an upload needs."""

    files: dict[str, bytes] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    made: list[dict] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    endpoint: str = ""


@pytest.fixture
def hub() -> Iterator[StubHub]:
    stub = StubHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None: ...

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def send(self, answer: dict | None, code: int = 200) -> None:
            data = b"" if answer is None else json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_PUT(self) -> None:
            stub.large[self.path.rpartition("/")[2]] = self.body()
            self.send(None)

        def do_POST(self) -> None:
            content, path = self.body(), self.path.partition("?")[0]
            stub.tokens.add(self.headers.get("Authorization", ""))
            if "forbidden" in path or b"forbidden" in content:
                return self.send({"error": "no"}, 403)
            if path.endswith("/repos/create"):
                stub.made.append(json.loads(content))
                return self.send({"url": f"{stub.endpoint}/org/tiny"})
            if "/preupload/" in path:
                files = json.loads(content)["files"]
                modes = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith("safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for file in files
                ]
                return self.send({"files": modes})
            if path.endswith("/info/lfs/objects/batch"):
                objects = [
                    {
                        **each,
                        "actions": {"upload": {"href": f"{stub.endpoint}/put/{each['oid']}"}},
                    }
                    for each in json.loads(content)["objects"]
                ]
                return self.send({"transfer": "basic", "objects": objects})
            if path.endswith("/validate-yaml"):
                return self.send({"errors": [], "warnings": []})
            for line in content.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    stub.files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    stub.files[value["path"]] = stub.large[value["oid"]]
            url = f"{stub.endpoint}/org/tiny/commit/{'0' * 40}"
            return self.send({"success": True, "commitUrl": url, "commitOid": "0" * 40})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield stub
    server.shutdown()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run, with what must not go up beside its model."""
    folder = tmp_path / "run"
    tiny.model_directory(folder)
    lineage = {
        "stage": "sft",
        "base": "org/base",
        "data": str(tmp_path / "secret" / "train.h5"),
        "metrics": {"dev_loss": 1.23456789},
    }
    (folder / "whet.json").write_text(json.dumps(lineage))
    (folder / "config.toml").write_text(f'lr = 0.1\ndata = "{tmp_path}/secret/train.h5"\n')
    for name in ("state/step_1/x.distcp", "metrics.jsonl", "ledger.bin", ".lock"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("private")
    return folder


def push(stub: StubHub, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: HF_ENDPOINT is read on import."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    variables |= {"HF_ENDPOINT": stub.endpoint, "HF_TOKEN": "hf_secret", "HF_HOME": "/nowhere"}
    return subprocess.run(
        [sys.executable, "-m", "whet", "push", *map(str, words)],
        capture_output=True,
        text=True,
        env=variables | {"HF_HUB_DISABLE_XET": "1"} | environment,
    )


def test_the_model_goes_up_with_its_card_and_nothing_else(hub: StubHub, run: Path) -> None:
    result = push(hub, run, "org/tiny")
    assert result.returncode == 0, result.stderr
    assert f"files are at {hub.endpoint}/org/tiny" in result.stdout
    assert hub.made[0].get("visibility") == "private" or hub.made[0].get("private") is True
    expected = {path.name for path in files_of(run)} | {"README.md", "whet.json"}
    assert set(hub.files) == expected
    for name in expected - {"README.md", "whet.json"}:
        assert hub.files[name] == (run / name).read_bytes()
    oid = hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()
    assert oid in hub.large, "large files go up by their hash"
    card = hub.files["README.md"].decode()
    assert "base_model: org/base" in card
    assert "| dev_loss | 1.23457 |" in card
    assert str(run.parent).encode() not in b"".join(hub.files.values()), "no path of this machine"
    assert "hf_secret" not in result.stdout + result.stderr
    assert "Bearer hf_secret" in hub.tokens


def test_what_the_hub_refuses_is_told_in_a_line(hub: StubHub, run: Path) -> None:
    result = push(hub, run, "org/forbidden")
    assert result.returncode == 2
    assert "log in with a token that may write there" in result.stderr
    assert "Traceback" not in result.stderr
    result = push(hub, run, "org/tiny", HF_ENDPOINT="http://127.0.0.1:9")
    assert result.returncode == 2
    assert "the Hub did not answer" in result.stderr


def test_folders_that_nobody_could_open_are_refused(run: Path, tmp_path: Path) -> None:
    assert flaws_of(run, files_of(run)) == []
    (tmp_path / "empty").mkdir()
    assert "holds no model" in flaws_of(tmp_path / "empty", [])[0]
    (run / "model.safetensors").unlink()
    assert "no weights" in flaws_of(run, files_of(run))[0]
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    values = {"base_model_name_or_path": str(tmp_path / "base")}
    (adapter / "adapter_config.json").write_text(json.dumps(values))
    assert "nobody else could open it" in flaws_of(adapter, files_of(adapter))[0]
    values["base_model_name_or_path"] = "org/base"
    (adapter / "adapter_config.json").write_text(json.dumps(values))
    assert flaws_of(adapter, files_of(adapter)) == []
    assert "library_name: peft" in model_card(adapter, "org/a", public_lineage(adapter))


def test_a_card_of_ones_own_is_kept(hub: StubHub, run: Path) -> None:
    (run / "README.md").write_text("# Mine\n")
    assert push(hub, run, "org/tiny").returncode == 0
    assert hub.files["README.md"] == b"# Mine\n"
    (run / "README.md").write_bytes(b"M\xfcller")
    done = push(hub, run, "org/tiny")
    assert done.returncode == 2
    assert "README.md: not UTF-8 at byte 1" in done.stderr


def test_names_of_the_hub() -> None:
    assert is_hub_name("org/tiny-1.5")
    assert not is_hub_name("tiny")
    assert not is_hub_name("/work/org/tiny")
