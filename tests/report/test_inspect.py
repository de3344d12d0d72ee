"""`whet inspect FILE.h5`: files with everything, files with next to nothing, and wrong flags."""

import json
import re

import h5py
import numpy as np
import pytest

from tests.pairs import pairs_file
from whet.chat.tokenizer import train_tokenizer
from whet.cli import main
from whet.data.layout import segment_documents
from whet.data.store import DOCUMENT, PackedStore, new_store
from whet.report.read import read_sheet


def inspect(*flags):
    return main(["inspect", *map(str, flags)])


@pytest.fixture
def tokenizer(tmp_path):
    made = train_tokenizer(["a question and an answer"] * 4, 300)
    made.save(tmp_path / "tokenizer")
    return made


@pytest.fixture
def packed(tmp_path, tokenizer):
    """Three rows of 16 places; the first holds two documents, the others one."""
    ids = tokenizer.encode("a question")[:4]
    tokens, mask = np.zeros((3, 16), np.int32), np.zeros((3, 16), np.uint8)
    segments = np.zeros((3, 16), np.uint16)
    documents = np.zeros(4, DOCUMENT)
    places = [(0, 0, 8), (0, 8, 5), (1, 0, 16), (2, 0, 3)]
    for number, (row, start, length) in enumerate(places):
        tokens[row, start : start + length] = np.resize(ids, length)
        mask[row, start + 2 : start + length] = 1
        segments[row, start : start + length] = 1 + (start > 0)
        documents[number] = (row, start, length, length - 2, number % 2, number + 10, 0)
    attrs = {
        "tokenizer_hash": tokenizer.hash,
        "settings": {"tokenizer": str(tmp_path / "tokenizer")},
        "sources": ["data/one.jsonl", "data/two.jsonl"],
    }
    path = tmp_path / "packed.h5"
    with new_store(path, 3, 16, attrs=attrs) as writer:
        writer.write_rows(tokens, mask, segments)
        writer.write_documents(documents)
    return path


def test_a_row_in_the_terminal(packed, capsys):
    assert inspect(packed) == 0
    out = capsys.readouterr().out
    assert "3 rows of 16 tokens, 4 documents" in out
    assert "Row 0  2 documents, 13 of 16 places filled, 9 trained" in out
    assert "one.jsonl:10: 8 tokens, 6 trained" in out
    assert "two.jsonl:11: 5 tokens, 3 trained" in out
    assert "Row 1" not in out


def test_rows_by_number(packed, capsys):
    assert inspect(packed, "--row", "2") == 0
    assert re.findall(r"^Row (\d)", capsys.readouterr().out, re.M) == ["2"]
    assert inspect(packed, "--rows", "1:") == 0
    assert re.findall(r"^Row (\d)", capsys.readouterr().out, re.M) == ["1", "2"]


def test_documents_belong_to_the_rows_that_are_shown(packed):
    sheet = read_sheet(PackedStore(packed), 1, 3, None)
    assert sheet.first == 1
    assert sheet.documents["row"].tolist() == [0, 1]
    assert sheet.documents["line"].tolist() == [12, 13]
    assert sheet.fills.tolist() == [13, 16, 3]


def test_the_page(packed, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert inspect(packed, "--html", page) == 0
    assert "3 rows" in capsys.readouterr().out
    assert "data/two.jsonl" in page.read_text()


def test_documents_are_found_again_from_the_segments(packed):
    store = PackedStore(packed)
    found = store.scan.documents
    for name in ("row", "start", "length", "trained"):
        assert found[name].tolist() == store.documents[name].tolist()


def test_segments_that_touch_a_row_end_stay_apart():
    segments = np.array([[1, 1, 2], [2, 2, 0]])
    found = segment_documents(segments, np.ones((2, 3)))
    assert found[["row", "start", "length"]].tolist() == [(0, 0, 2), (0, 2, 1), (1, 0, 2)]


def test_a_file_with_only_tokens_and_mask_shows_ids(tmp_path, capsys):
    path = tmp_path / "bare.h5"
    with h5py.File(path, "w") as file:
        file["tokens"] = np.array([[5, 6, 7]])
        file["loss_mask"] = np.array([[0, 1, 1]])
    assert inspect(path) == 0
    out = capsys.readouterr().out
    assert "5 ⟦6 7 ⟧" in out
    assert "ids are shown" in out


def test_another_tokenizer_is_refused(packed, tmp_path, capsys):
    train_tokenizer(["something else"], 280).save(tmp_path / "other")
    assert inspect(packed, "--tokenizer", tmp_path / "other") == 2
    assert "is not the tokenizer of" in capsys.readouterr().err


def test_a_recorded_tokenizer_that_is_gone_or_has_changed_is_told(packed, tmp_path, capsys):
    train_tokenizer(["something else"], 280).save(tmp_path / "tokenizer")
    assert inspect(packed) == 0
    assert "has changed since the file was made" in capsys.readouterr().out
    (tmp_path / "tokenizer").rename(tmp_path / "moved")
    assert inspect(packed) == 0
    assert "is not there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "give a packed file, or --conversation"),
        (["FILE", "--conversation", "x:1"], "give a packed file, or --conversation"),
        (["--conversation", "x:1"], "needs --tokenizer DIR"),
        (["FILE", "--row", "1", "--rows", "0:2"], "give one of them"),
        (["FILE", "--rows", "1-2"], "expected A:B"),
        (["FILE", "--row", "3"], "has rows 0 to 2"),
        (["FILE", "--rows", "2:2"], "has rows 0 to 2"),
        (["FILE", "--chat_template", "plain"], "go with --conversation"),
        (["nowhere.h5"], "nowhere.h5: no such file"),
        (["."], ".: is a directory; expected a packed file"),
    ],
)
def test_wrong_flags_are_told(packed, capsys, flags, told):
    assert inspect(*(str(packed) if flag == "FILE" else flag for flag in flags)) == 2
    assert told in capsys.readouterr().err


def test_a_page_that_cannot_be_written_leaves_nothing(packed, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    before = packed.read_bytes()
    for path, told in [
        (tmp_path / "folder", "is a directory"),
        (packed / "page.html", "cannot be written: Not a directory"),
        (packed, "the command reads or writes this already"),
    ]:
        assert inspect(packed, "--html", path) == 2
        assert f"--html {path}: {told}" in capsys.readouterr().err
    assert packed.read_bytes() == before
    assert not list(tmp_path.glob(".*tmp"))


def test_a_file_of_whet_prepare_shows_account_and_what_was_left_out(tmp_path, tokenizer, capsys):
    data = tmp_path / "data.jsonl"
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    lines = [json.dumps(talk), json.dumps(talk), "{broken", json.dumps({"text": "a" * 99})]
    data.write_text("\n".join(lines) + "\n")
    out = tmp_path / "packed.h5"
    flags = ["--tokenizer", tmp_path / "tokenizer", "--refused", "drop", "--context_length", 64]
    assert main(["prepare", "--data", str(data), "--out", str(out), *map(str, flags)]) == 0
    capsys.readouterr()
    sheet = read_sheet(PackedStore(out), 0, 1, None)
    (account,) = sheet.accounts
    assert account.tokens == account.trained + account.context + account.truncated + account.dropped
    assert account.trained == sheet.trained
    assert {(left.line, left.source) for left in sheet.left_out} == {(2, str(data)), (3, str(data))}
    assert sum(sheet.left_out_counts.values()) == 2
    assert not any(str(data) in left.reason for left in sheet.left_out)
    assert inspect(out) == 0
    out = capsys.readouterr().out
    assert "1: exact duplicates" in out
    assert "data.jsonl:3: not JSON" in out


def test_a_pair_says_which_reply_is_which(tmp_path, capsys):
    path = pairs_file(tmp_path / "pairs.h5", margins=True)
    assert inspect(path, "--rows", ":", "--html", tmp_path / "page.html") == 0
    capsys.readouterr()
    assert inspect(path, "--rows", "1:") == 0
    store = PackedStore(path, kinds=("preferences",))
    margins = store.values("margins", 2)
    before = int((store.document_rows == 0).sum()) // 2
    found = re.findall(
        r"^── (chosen|rejected)(?:, margin ([\d.e-]+))?:", capsys.readouterr().out, re.M
    )
    assert [side for side, _ in found] == ["chosen", "rejected"] * (len(found) // 2)
    assert len(found) == 2 * (len(margins) - before)
    told = [float(m) if m else np.nan for _, m in found[::2]]
    np.testing.assert_allclose(told, margins[before:], rtol=1e-4)


def test_labelled_replies_say_their_label(tmp_path, capsys):
    path = pairs_file(tmp_path / "labels.h5", kind="labels")
    assert inspect(path, "--rows", ":") == 0
    labels = PackedStore(path, kinds=("labels",)).values("labels", 1)
    found = re.findall(r"^── (good|bad):", capsys.readouterr().out, re.M)
    assert found == ["good" if label > 0 else "bad" for label in labels]


@pytest.mark.parametrize("per_token", [False, True])
def test_a_rollout_says_reward_and_advantage(packed, tmp_path, capsys, per_token):
    rows, documents = PackedStore(packed).rows(range(3)), PackedStore(packed).documents
    attrs = {"kind": "rollout", "ends": [3], "totals": [1.0]}
    attrs["places"] = ["token_advantages"] if per_token else []
    path = tmp_path / "rollout.h5"
    with new_store(path, 3, 16, attrs=attrs) as writer:
        writer.write_rows(*rows)
        writer.write_documents(documents)
        writer.write_numbers("rewards", np.array([1, 0, 0.25, -1]))
        writer.write_numbers("advantages", np.array([0.8660254, -0.5, 0, 0]))
        if per_token:
            writer.write_numbers("token_advantages", np.tile(np.arange(16.0), (3, 1)) - 3)
    assert inspect(path, "--rows", ":") == 0
    out = capsys.readouterr().out
    first = "advantages of its tokens -1 to 4" if per_token else "advantage 0.866"
    second = "advantages of its tokens 7 to 9" if per_token else "advantage -0.5"
    assert f"── reward 1, {first}: " in out
    assert f"── reward 0, {second}: " in out
    assert "── reward -1, " in out


def test_a_template_whose_tokens_the_base_lacks(tmp_path, tokenizer, capsys):
    """`whet prepare --chat_template chatml` adds them: the file and a conversation show texts."""
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"prompt": "a question", "completion": "an answer"}) + "\n")
    packed, base = tmp_path / "chatml.h5", tmp_path / "tokenizer"
    others = base / "additional_chat_templates"  # without a default one: only another will do
    others.mkdir()
    (others / "tool_use.jinja").write_text("{{ messages }}")
    made = ["--tokenizer", base, "--chat_template", "chatml"]
    words = ["prepare", "--data", chats, *made, "--out", packed, "--context_length", "64"]
    assert main(list(map(str, words))) == 0
    capsys.readouterr()
    assert inspect(packed) == inspect("--conversation", f"{chats}:1", *made) == 0
    assert capsys.readouterr().out.count("⟦an answer<|im_end|>⟧") == 2
