"""The prompt that was trained is the prompt that is asked: from `whet prepare` to `whet chat`."""

import json
from pathlib import Path

import pytest

from tests import tiny
from whet.chat.chat import load_tokenizer
from whet.chat.encode import encode_prompt
from whet.cli import main
from whet.data.store import PackedStore
from whet.generate import chat as chat_room

TEMPLATE = """{%- for m in messages -%}
{{ m.role }}: {% if m.role != 'user' and think is defined and not think %}<none>{% endif -%}
{{ m.content }}{% if m.role != 'user' %}{{ eos_token }}{% endif %}
{% endfor -%}
{%- if add_generation_prompt %}assistant: {% if think is defined and not think %}<none>{% endif %}
{%- endif -%}"""
ASK = {"role": "user", "content": "one"}
OFF = '{"think": false}'


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rendered")
    tiny.model_directory(folder / "base", max_positions=64)
    (folder / "t.jinja").write_text(TEMPLATE)
    talk = {"messages": [ASK, {"role": "assistant", "content": "two"}]}
    (folder / "a.jsonl").write_text(f"{json.dumps(talk)}\n" * 9)
    for name, flags in {"off": ["--template_kwargs", OFF], "as_it_is": []}.items():
        words = ["prepare", "--data", str(folder / "a.jsonl"), "--tokenizer", str(folder / "base")]
        words += ["--out", str(folder / f"{name}.h5"), "--context_length", "64", *flags]
        assert main([*words, "--chat_template", str(folder / "t.jinja"), "--workers", "0"]) == 0
    return folder


def sft(world: Path, out: Path, *flags: str) -> int:
    words = ["sft", "--model", str(world / "base"), "--data", str(world / "off.h5")]
    words += ["--out", str(out), "--epochs", "1", "--batch_size", "1", "--micro_batch_size", "1"]
    return main([*words, *flags])


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    assert sft(world, world / "run") == 0
    return world / "run"


def trained_prompt(path: Path) -> list[int]:
    """The tokens before the first trained one."""
    rows = PackedStore(path).rows([0])
    end = int(rows.loss_mask[0].argmax())
    return [int(i) for i in rows.tokens[0, :end]]


def test_the_saved_model_is_asked_as_it_was_trained(world, run, capsys, monkeypatch) -> None:
    prompts = []

    def remember(*how):
        prompts.append(encode_prompt(*how))
        return prompts[-1]

    expected = trained_prompt(world / "off.h5")
    assert encode_prompt([ASK], load_tokenizer(run)) == expected
    assert load_tokenizer(run).tokenizer.decode(expected).endswith("assistant: <none>")
    monkeypatch.setattr(chat_room, "encode_prompt", remember)
    for flags in ([], ["--template_kwargs", '{"think": true}']):
        assert main(["chat", str(run), "--prompt", "one", "--max_new_tokens", "1", *flags]) == 0
    assert prompts == [expected, trained_prompt(world / "as_it_is.h5")]
    assert main(["chat", str(run), "--prompt", "one", "--template_kwargs", '{"thnk": 1}']) == 2
    assert "reads no variable thnk; it reads think" in capsys.readouterr().err


def test_the_header_says_that_the_datas_template_is_taken(world, tmp_path, capsys) -> None:
    assert sft(world, tmp_path / "out") == 0
    shown = capsys.readouterr()
    assert "another chat template; it's saved with the model" in shown.out + shown.err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            ["--dev", "{world}/as_it_is.h5"],
            "as_it_is.h5: was rendered with the template variables none instead of think = false, "
            "unlike {world}/off.h5",
        ),
        (["--chat_template", "plain"], "--chat_template plain: {world}/off.h5 was rendered with"),
    ],
)
def test_what_is_rendered_otherwise_is_refused(world, tmp_path, capsys, flags, told) -> None:
    assert sft(world, tmp_path / "out", *(flag.format(world=world) for flag in flags)) == 2
    assert told.format(world=world) in " ".join(capsys.readouterr().err.split())


def test_eval_notes_what_is_rendered_otherwise(world, run, capsys) -> None:
    flags = ["eval", str(run), "--dev", str(world / "as_it_is.h5")]
    assert main(flags) == 0
    shown = capsys.readouterr()
    assert "none instead of think = false" in " ".join((shown.out + shown.err).split())
    assert main([*flags[:2], "--dev", str(world / "off.h5")]) == 0
    shown = capsys.readouterr()
    assert "instead of" not in shown.out + shown.err
