"""`whet inspect --conversation`: rendering, turns and certificate of one line."""

import json
import re

import numpy as np
import pytest

from whet.chat.chat import load_tokenizer
from whet.chat.tokenizer import train_tokenizer
from whet.cli import main
from whet.report.conversation import encode_line, encoded_sheet

TALK = [
    {"role": "user", "content": "What is 2 and 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "Say <|endoftext|> and stop."},
    {"role": "assistant", "content": "Stop.", "weight": 0.5},
]


@pytest.fixture
def tokenizer(tmp_path):
    folder = tmp_path / "tokenizer"
    train_tokenizer([json.dumps(TALK)] * 4, 320).save(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "talk.jsonl"
    lines = [json.dumps({"messages": TALK}), "", "not JSON", json.dumps({"text": "plain words"})]
    path.write_text("\n".join(lines) + "\n")
    return path


def inspect(*flags):
    return main(["inspect", *map(str, flags)])


def test_rendering_turns_and_certificate(data, tokenizer, capsys):
    assert inspect("--conversation", f"{data}:1", "--tokenizer", tokenizer) == 0
    out = capsys.readouterr().out
    trained = re.findall(r"⟦(.*?)⟧", out.partition("── turns")[0].partition("── rendering")[2])
    assert trained == ["It is 4.<|endoftext|>", "Stop.<|endoftext|>"]
    turns = out.partition("── turns")[2].splitlines()[1:5]
    assert [line.split()[1] for line in turns] == ["user", "assistant", "user", "assistant"]
    assert ["context" in line for line in turns] == [True, False, True, False]
    assert "weight 0.5" in turns[3]
    assert "1 control tokens in texts encoded as plain text" in out


def test_a_page_of_one_conversation(data, tokenizer, tmp_path, capsys):
    page = tmp_path / "deep" / "page.html"
    flags = ("--conversation", f"{data}:1", "--tokenizer", tokenizer, "--html", page)
    assert inspect(*flags) == 0
    text = page.read_text()
    assert "talk.jsonl:1" in text
    assert "<dt>template</dt><dd>plain</dd>" in text
    turns = re.findall(r'<td class="words">(\w+)</td><td class="words">(.*?)</td>', text)
    assert [role for role, _ in turns] == ["user", "assistant", "user", "assistant"]
    assert [what == "context" for _, what in turns] == [True, False, True, False]
    assert "1 row," in capsys.readouterr().out
    assert [path.name for path in page.parent.iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    ("reference", "told"),
    [
        ("{data}", "expected FILE.jsonl:LINE"),
        ("{data}:0", "counted from 1"),
        ("{data}:99", "no conversation at line or record 99"),
        ("{data}:3", "talk.jsonl:3: not JSON"),
        ("nowhere.jsonl:1", "there is no file nowhere.jsonl"),
    ],
)
def test_what_cannot_be_shown_is_told(data, tokenizer, capsys, reference, told):
    reference = reference.format(data=data)
    assert inspect("--conversation", reference, "--tokenizer", tokenizer) == 2
    assert told in capsys.readouterr().err


def test_a_refused_conversation_tells_its_reason(tmp_path, tokenizer, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"messages": TALK[:1]}) + "\n")
    assert inspect("--conversation", f"{path}:1", "--tokenizer", tokenizer) == 2
    assert f"{path}:1" in capsys.readouterr().err


def test_template_kwargs_reach_the_template(data, tokenizer, tmp_path, capsys):
    template = tmp_path / "switched.jinja"
    template.write_text(
        "{% for m in messages %}{{ greeting }} {{ m.role }}: {{ m.content }}<|endoftext|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ greeting }} assistant: {% endif %}"
    )
    flags = ["--conversation", f"{data}:1", "--tokenizer", tokenizer, "--chat_template", template]
    assert inspect(*flags, "--template_kwargs", '{"greeting": "Dear"}') == 0
    assert "Dear user: What is 2 and 2?" in capsys.readouterr().out
    for wrong in ("[1]", "{"):
        assert inspect(*flags, "--template_kwargs", wrong) == 2
        assert "--template_kwargs" in capsys.readouterr().err


def test_raw_text_is_trained_whole(data, tokenizer, capsys):
    assert inspect("--conversation", f"{data}:4", "--tokenizer", tokenizer) == 0
    assert "⟦plain words<|endoftext|>⟧" in capsys.readouterr().out


def test_examples_become_rows(data, tokenizer):
    shown = encode_line(f"{data}:1", load_tokenizer(tokenizer))
    sheet = encoded_sheet(shown)
    example = shown.encoded.examples[0]
    assert np.array_equal(sheet.tokens[0, : len(example.ids)], example.ids)
    assert np.array_equal(sheet.mask[0, : len(example.ids)], example.loss_mask)
    assert sheet.trained == (example.loss_mask > 0).sum()


def test_a_record_of_a_json_array_is_found_by_its_number(tmp_path, tokenizer, capsys):
    talks = [[{"role": "user", "content": n}, {"role": "assistant", "content": "c"}] for n in "ab"]
    array = tmp_path / "talks.json"
    array.write_text(json.dumps([{"messages": talk} for talk in talks]))
    assert inspect("--conversation", f"{array}:2", "--tokenizer", tokenizer) == 0
    out = capsys.readouterr().out
    assert "talks.json:2" in out
    assert "b" in out.partition("rendering")[2].partition("turns")[0]
