import fcntl
import json
import pickle

import h5py
import numpy as np
import pytest

from whet.data.layout import DOCUMENT, row_weights, shifted_weight
from whet.data.store import PackedStore, new_store
from whet.errors import UserError


def example_rows(n_rows=7, width=12, seed=0):
    rng = np.random.default_rng(seed)
    # One to three documents in each row, then padding, sometimes none.
    segments = np.zeros((n_rows, width), np.int64)
    for row in segments:
        ends = np.sort(rng.choice(np.arange(1, width + 1), rng.integers(1, 4), replace=False))
        for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False), 1):
            row[start:end] = number
    tokens = rng.integers(0, 100, (n_rows, width)).astype(np.int32)
    mask = (rng.random((n_rows, width)) < 0.5) * (segments > 0)
    return tokens, mask.astype(np.float32), segments


def write(path, rows, **options):
    tokens, mask, segments = rows
    with new_store(path, len(tokens), tokens.shape[1], **options) as writer:
        writer.write_rows(tokens[:3], mask[:3], segments[:3])
        writer.write_rows(tokens[3:], mask[3:], segments[3:])
    return PackedStore(path)


def test_what_is_written_is_read(tmp_path):
    tokens, mask, segments = example_rows()
    store = write(tmp_path / "a.h5", (tokens, mask, segments))
    wanted = [5, 0, 1, 5, 6]
    rows = store.rows(wanted)
    assert (rows.tokens == tokens[wanted]).all()
    assert rows.tokens.dtype == np.int32
    assert (rows.loss_mask == mask[wanted]).all()
    assert rows.loss_mask.dtype == np.float32
    assert (rows.segment_ids == segments[wanted]).all()
    assert len(store) == 7
    assert store.context_length == 12
    assert store.rows([]).tokens.shape == (0, 12)
    with pytest.raises(IndexError):
        store.rows([7])


def test_loss_tokens_is_the_weight_that_the_loss_sees(tmp_path):
    """By the definition, place by place."""
    tokens, mask, segments = example_rows(seed=3)
    expected = [
        sum(
            mask[row, t + 1]
            for t in range(mask.shape[1] - 1)
            if segments[row, t] == segments[row, t + 1] != 0
        )
        for row in range(len(mask))
    ]
    assert row_weights(mask, segments).tolist() == expected
    assert (shifted_weight(mask, segments)[:, -1] == 0).all()
    assert write(tmp_path / "a.h5", (tokens, mask, segments)).loss_tokens.tolist() == expected


def test_padding_has_no_weight_whatever_its_mask():
    segments = np.array([[1, 1, 0, 0], [0, 0, 0, 0]])
    assert shifted_weight(np.ones((2, 4)), segments).tolist() == [[1, 0, 0, 0], [0] * 4]


def test_fractional_weights_are_kept(tmp_path):
    tokens, mask, segments = example_rows()
    mask = mask * np.float32(0.3)
    store = write(tmp_path / "a.h5", (tokens, mask, segments), weighted=True)
    assert (store.rows(range(7)).loss_mask == mask).all()
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["loss_mask"].dtype == np.float32


def test_plain_masks_take_a_byte(tmp_path):
    write(tmp_path / "a.h5", example_rows())
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["loss_mask"].dtype == np.uint8
        assert file["segment_ids"].dtype == np.uint16


def test_attributes_documents_and_texts(tmp_path):
    tokens, mask, segments = example_rows()
    documents = np.zeros(3, DOCUMENT)
    documents["row"], documents["line"], documents["length"] = [0, 0, 4], [10, 11, 12], 3
    account = {"sources": [{"source": "ä.jsonl", "tokens": 5}], "long": "x" * 100_000}
    with new_store(tmp_path / "a.h5", 7, 12, attrs={"account": account, "pad_id": 3}) as writer:
        writer.write_rows(tokens, mask, segments)
        writer.write_documents(documents)
        writer.write_texts("refusals", ["é", "b"])
        writer.write_texts("nothing", [])
    store = PackedStore(tmp_path / "a.h5")
    assert store.attrs["account"] == account
    assert store.attrs["pad_id"] == 3
    assert store.texts("refusals") == ["é", "b"]
    with pytest.raises(UserError, match="is damaged or not a packed file"):
        _ = store.refusals
    assert store.texts("nothing") == store.texts("absent") == []
    assert store.documents_of([4, 0])["line"].tolist() == [12, 10, 11]
    assert store.documents_in([1])[2].tolist() == []


def test_a_file_with_tokens_and_mask_alone(tmp_path):
    rng = np.random.default_rng(0)
    with h5py.File(tmp_path / "plain.h5", "w") as file:
        file["tokens"] = rng.integers(0, 50, (3, 8))
        file["loss_mask"] = np.ones((3, 8), bool)
    store = PackedStore(tmp_path / "plain.h5")
    assert store.loss_tokens.tolist() == [7, 7, 7]  # the first token is predicted by nothing
    assert (store.rows([0]).segment_ids == 1).all()
    assert len(store.documents_of([0, 1])) == 0
    assert len(pickle.loads(pickle.dumps(store))) == 3


def test_nothing_half_written_stays(tmp_path):
    path = tmp_path / "a.h5"
    tokens, mask, segments = example_rows()
    write(path, (tokens, mask, segments))
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError), new_store(path, 7, 12) as writer:
        writer.write_rows(tokens, mask, segments[: 1 // 0])
    with pytest.raises(ValueError, match="only 3 rows"), new_store(path, 7, 12) as writer:
        writer.write_rows(tokens[:3], mask[:3], segments[:3])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]


def test_the_same_data_give_the_same_bytes(tmp_path):
    for name in ("a.h5", "b.h5"):
        write(tmp_path / name, example_rows(), attrs={"settings": {"x": [1, None]}})
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def broken(path, kind):
    if kind == "no HDF5":
        path.write_text("hello")
        return
    with h5py.File(path, "w") as file:
        if kind != "no tokens":
            file["tokens"] = np.zeros((2, 4) if kind != "no rows" else (0, 4), int)
        if kind == "mask of text":
            file["loss_mask"] = [b"a", b"b"]
        elif kind != "no mask":
            file["loss_mask"] = np.zeros((2, 5) if kind == "shapes differ" else (2, 4), int)
        if kind == "no rows":
            del file["loss_mask"]
            file["loss_mask"] = np.zeros((0, 4), int)
        if kind == "version 9":
            file.attrs["format_version"] = 9


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("no HDF5", "is no packed file; `whet prepare --data .*` makes a packed file"),
        ("no tokens", "no dataset 'tokens'"),
        ("no mask", "no dataset 'loss_mask'"),
        ("mask of text", "loss_mask must be numbers"),
        ("shapes differ", "shapes differ"),
        ("no rows", "holds no rows"),
        ("version 9", "format version 9"),
    ],
)
def test_a_broken_file_is_told_in_a_line(tmp_path, kind, told):
    broken(tmp_path / "x.h5", kind)
    with pytest.raises(UserError, match=told):
        PackedStore(tmp_path / "x.h5")


def whole(path):
    """A small good file, of which each of its parts can be made wrong."""
    tokens, mask, segments = (np.array(rows) for rows in (
        [[5, 6, 7, 8], [1, 2, 3, 4]], [[0, 1, 0, 1], [0, 1, 1, 0]], [[1, 1, 2, 2], [1, 1, 1, 0]],
    ))  # fmt: skip
    table = np.zeros(3, DOCUMENT)
    table["row"], table["start"], table["length"] = [0, 0, 1], [0, 2, 0], [2, 2, 3]
    table["trained"] = [1, 1, 2]
    with new_store(path, 2, 4, weighted=True, attrs={"vocab_size": 9}) as writer:
        writer.write_rows(tokens, mask, segments)
        writer.write_documents(table)
    return path


def replaced(name, values):
    def change(file):
        del file[name]
        file[name] = values

    return change


def put(name, place, value):
    def change(file):
        values = file[name][...]
        values[place] = value
        replaced(name, values)(file)

    return change


def table_entry(**fields):
    def change(file):
        table = file["documents"][...]
        for field, value in fields.items():
            table[field][1] = value
        replaced("documents", table)(file)

    return change


def attribute(name, value):
    return lambda file: file.attrs.__setitem__(name, value)


def grouped(name):
    def change(file):
        if name in file:
            del file[name]
        file.create_group(name)

    return change


def unwritten(chunks):
    def change(file):
        for name, dtype in (("tokens", "<i4"), ("loss_mask", "u1"), ("segment_ids", "<u2")):
            del file[name]
            file.create_dataset(name, (2**40, 4), dtype, chunks=chunks)
        del file["loss_tokens"], file["documents"]

    return change


LONG = np.array([[5, 6, 7, 2**32 + 1], [1, 2, 3, 4]])
WRONG = {
    "another loss_tokens": (put("loss_tokens", 1, 20), r"loss_tokens\[1\] is 20, .* adds up to 2"),
    "nan in loss_tokens": (put("loss_tokens", 0, np.nan), r"loss_tokens\[0\] is nan"),
    "negative weight": (put("loss_mask", (0, 3), -1), r"loss_mask\[0, 3\] is -1; expected finite"),
    "nan weight": (put("loss_mask", (1, 0), np.nan), r"loss_mask\[1, 0\] is nan; expected finite"),
    "weight without end": (put("loss_mask", (1, 1), np.inf), "is inf; expected finite"),
    "id -1": (put("tokens", (1, 3), -1), r"tokens\[1, 3\] is -1; expected a token id of the voc"),
    "id beyond": (put("tokens", (0, 0), 9), r"tokens\[0, 0\] is 9; .* of the vocabulary of 9"),
    "id of 64 bits": (replaced("tokens", LONG), r"tokens\[0, 3\] is 4294967297"),
    "negative segment": (
        replaced("segment_ids", np.array([[1, 1, -2, -2], [1, 1, 1, 0]])),
        r"segment_ids\[0, 2\] is -2; expected 2: documents of a row count 1, 2",
    ),
    "segments from 0": (
        replaced("segment_ids", np.array([[0, 0, 1, 1], [0, 0, 0, 0]])),
        r"loss_mask\[0, 1\] is 1; but segment_ids is 0, which is padding",
    ),
    "segments that come again": (
        replaced("segment_ids", np.array([[1, 2, 1, 2], [1, 1, 1, 0]])), "is 1; expected 3"
    ),
    "table of another row": (table_entry(row=2), r"documents\[1\] lies outside"),
    "table of a negative row": (table_entry(row=-1), r"documents\[1\] lies outside"),
    "table beyond the row": (table_entry(length=2**31 - 1), r"documents\[1\] lies outside"),
    "table not of the segments": (table_entry(start=1), "documents and segment_ids disagree"),
    "group of tokens": (grouped("tokens"), "'tokens' is a group"),
    "group of weights": (grouped("loss_tokens"), "'loss_tokens' is a group"),
    "group of documents": (grouped("documents"), "'documents' is a group"),
    "group of refusals": (grouped("refusals"), "'refusals' is a group"),
    "refusals of no JSON": (lambda file: file.__setitem__("refusals", ["{"]), "is damaged or not"),
    "refusals of a list": (lambda file: file.__setitem__("refusals", ["[]"]), "refusals.0. is no"),
    "2^40 rows": (unwritten(None), "says that its shape is .1099511627776, 4., and the file"),
    "2^40 rows in chunks": (unwritten((1024, 4)), "says that its shape is .1099511627776, 4."),
    "text for a number": (attribute("vocab_size", "many"), "attribute vocab_size is 'many', exp"),
    "list for a number": (attribute("pad_id", [1, 2]), "attribute pad_id is"),
    "number for a text": (attribute("tokenizer_hash", 3), "tokenizer_hash is 3, expected str"),
    "no object": (attribute("settings", "[1]"), "attribute settings is .1., expected dict"),
    "empty attribute": (attribute("account", h5py.Empty("f")), "attribute account cannot be read"),
    "another context length": (attribute("context_length", 5), "is 5, and rows have 4"),
    "preferences": (attribute("kind", "preferences"), "holds pairs of a chosen and a rejected"),
    "unknown kind": (attribute("kind", "x"), "of a kind that this Whet does not know"),
}  # fmt: skip


def read_whole(path):
    store = PackedStore(path)
    _ = store.documents, store.loss_tokens, store.id_range, store.refusals
    return store


@pytest.mark.parametrize("kind", WRONG)
def test_what_would_train_wrong_is_refused_in_a_line(tmp_path, kind):
    change, told = WRONG[kind]
    path = whole(tmp_path / "a.h5")
    assert read_whole(path).loss_tokens.tolist() == [2, 2]
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(UserError, match=told) as error:
        read_whole(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_odd_attributes_that_nobody_reads_are_left_out(tmp_path):
    path = whole(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        file.attrs["note"], file.attrs["grid"] = b"caf\xc3\xa9", np.arange(3)
        file.attrs["nothing"], file.attrs["bytes"] = h5py.Empty("f"), np.bytes_(b"\xff")
        file.attrs["nan"] = np.float32("nan")
    attrs = read_whole(path).attrs
    assert json.loads(json.dumps(attrs)) == attrs
    assert attrs["note"] == "café"
    assert attrs["grid"] == [0, 1, 2]
    assert attrs.keys() == {"format_version", "context_length", "vocab_size", "note", "grid"}


def test_ids_of_64_bits_do_not_wrap_where_one_row_is_read(tmp_path):
    path = whole(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        replaced("tokens", LONG)(file)
    with pytest.raises(UserError, match="4294967297"):
        PackedStore(path).rows([0])


def test_a_file_that_another_process_writes_is_not_called_damaged(tmp_path):
    whole(tmp_path / "x.h5")
    with (tmp_path / "x.h5").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)  # as HDF5 does
        with pytest.raises(UserError, match=r"x\.h5: cannot be read \(.*temporarily unavailable"):
            PackedStore(tmp_path / "x.h5")


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such file; `whet prepare`"):
        PackedStore(tmp_path / "x.h5")
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot be written"),
        new_store(tmp_path / "file" / "x.h5", 1, 4),
    ):
        pass
