import pickle

import h5py
import numpy as np
import pytest

from whet.data.store import DOCUMENT, PackedStore, StoreWriter, row_weights, shifted_weight
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
    with StoreWriter(path, len(tokens), tokens.shape[1], **options) as writer:
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
    documents["row"], documents["line"] = [0, 0, 4], [10, 11, 12]
    account = {"sources": [{"source": "ä.jsonl", "tokens": 5}], "long": "x" * 100_000}
    with StoreWriter(tmp_path / "a.h5", 7, 12, attrs={"account": account, "pad_id": 3}) as writer:
        writer.write_rows(tokens, mask, segments)
        writer.write_documents(documents)
        writer.write_texts("refusals", ["é", "b"])
        writer.write_texts("nothing", [])
    store = PackedStore(tmp_path / "a.h5")
    assert store.attrs["account"] == account
    assert store.attrs["pad_id"] == 3
    assert store.texts("refusals") == ["é", "b"]
    assert store.texts("nothing") == store.texts("absent") == []
    assert store.documents_of([4, 0])["line"].tolist() == [12, 10, 11]
    assert store.document_ids([1]).tolist() == []


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
    with pytest.raises(ZeroDivisionError), StoreWriter(path, 7, 12) as writer:
        writer.write_rows(tokens, mask, segments[: 1 // 0])
    with pytest.raises(ValueError, match="only 3 rows"), StoreWriter(path, 7, 12) as writer:
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
        ("no HDF5", "not a readable HDF5 file"),
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


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such file; `whet prepare`"):
        PackedStore(tmp_path / "x.h5")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        StoreWriter(tmp_path / "file" / "x.h5", 1, 4)
