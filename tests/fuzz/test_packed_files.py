"""The reader of packed files: wrong contents, damaged bytes, and links that lead out of the file.

Damaged bytes are read in a process of their own: they reach the HDF5 library, whose crashes are
counted, too.
"""

import json
import multiprocessing
import warnings
from collections import Counter
from pathlib import Path
from random import Random

import h5py
import numpy as np
import pytest
from hypothesis import strategies as st

from tests import tiny
from tests.fuzz.harness import counts, damage, fuzz
from whet.data.store import DOCUMENT, PackedStore
from whet.errors import UserError

DTYPES = ["<i4", "<u2", "u1", "<f4", "<f8", "S3", "<c8", "?", DOCUMENT]
ATTRS = [1, 2, -1, "x", "{", '["a"]', b"\xff", [1, 2], 1e308, "", '{"a": 1}']


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return tiny.packed_file(tmp_path_factory.mktemp("packed") / "whole.h5", n_rows=3, weighted=True)


def read_all(path: Path) -> None:
    """Everything that training asks of a file."""
    store = PackedStore(path)
    rows = store.rows([0, len(store) - 1])
    assert rows.tokens.shape == rows.loss_mask.shape == rows.segment_ids.shape
    assert store.loss_tokens.shape == (len(store),)
    store.documents_of(np.array([0]))
    assert all(row["reason"] for row in store.refusals)
    assert len(store.scan.documents) == len(store.document_rows)


def filled(name, shape, dtype) -> np.ndarray:
    """Zeros, but for what must not be 0: a document in each row, and the objects of refusals."""
    values = np.zeros(shape, dtype)
    if name == "segment_ids" and values.dtype.kind in "iu":
        values[...] = 1
    elif values.dtype == DOCUMENT and values.ndim == 1:
        values["row"], values["length"] = np.arange(len(values)), 3
    elif values.dtype == object:
        values[...] = json.dumps({"source": "a", "line": 1, "kind": "b", "reason": "c"})
    return values


@st.composite
def contents(draw):
    """{name: array} and {name: attribute}, most of them right."""
    n, length = draw(st.integers(0, 9)) % 4, draw(st.sampled_from([1, 3, 3, 3, 6]))
    right = {"tokens": "<i4", "loss_mask": "u1", "segment_ids": "<u2", "loss_tokens": "<f8"}
    arrays = {}
    for name in [*right, "documents", "refusals"]:
        if draw(st.integers(0, 9)) < (1 if name in ("tokens", "loss_mask") else 4):
            continue
        shape = (n, length) if name in ("tokens", "loss_mask", "segment_ids") else (n,)
        shape = draw(st.sampled_from([shape] * 30 + [(), (n,), (length, n), (n, length, 2)]))
        dtype = DOCUMENT if name == "documents" else right.get(name, h5py.string_dtype())
        arrays[name] = (shape, draw(st.sampled_from([dtype] * 30 + DTYPES)))
    names = st.sampled_from(["format_version", "context_length", "sources", "account"])
    return arrays, draw(st.dictionaries(names, st.sampled_from(ATTRS), max_size=2))


@counts(120, 10_000)
def test_wrong_contents(count, tmp_path):
    path = tmp_path / "some.h5"

    def read(content) -> None:
        arrays, attrs = content
        path.unlink(missing_ok=True)  # a store that was not let go yet keeps the old file
        with h5py.File(path, "w") as file:
            for name, (shape, dtype) in arrays.items():
                file.create_dataset(name, data=filled(name, shape, dtype))
            for name, value in attrs.items():
                file.attrs[name] = value
        read_all(path)

    tally = fuzz("packed contents", contents(), read, count)
    assert min(tally["read"], tally["refused"]) > 0


def read_damaged(path: str, seconds: int, results, inputs) -> None:
    """In a process of its own: for each input its number, then how it ended."""
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    warnings.simplefilter("ignore")
    for number, content in enumerate(inputs):
        Path(path).write_bytes(content)
        try:
            read_all(Path(path))
            results.send((number, "read"))
        except UserError:
            results.send((number, "refused"))
        except Exception as error:
            results.send((number, f"{type(error).__name__}: {error}"))
    results.send((len(inputs), "done"))


@counts(200, 5_000)
def test_damaged_bytes(count, whole, tmp_path):
    rng = Random(count)
    inputs = [damage(whole.read_bytes(), rng) for _ in range(count)]
    tally: Counter[str] = Counter()
    while inputs:
        here, there = multiprocessing.Pipe(duplex=False)
        arguments = (str(tmp_path / "some.h5"), 60 + count // 10, there, inputs)
        process = multiprocessing.get_context("fork").Process(target=read_damaged, args=arguments)
        process.start()
        there.close()
        at = -1
        try:
            while at < len(inputs):
                at, how = here.recv()
                tally[how] += how != "done"
        except EOFError:  # the HDF5 library has taken the process with it
            at += 1
            tally["crashed in the HDF5 library"] += 1
        process.join()
        inputs = inputs[at + 1 :]
    print(f"\nfuzz packed bytes: {tally.total()} inputs, {dict(tally)}")
    known = {"read", "refused", "crashed in the HDF5 library", "done"}
    assert set(tally) <= known
    assert tally["crashed in the HDF5 library"] <= tally.total() // 100
    assert min(tally["read"], tally["refused"]) > 0


@pytest.mark.parametrize("kind", ["external link", "soft link", "external data", "virtual", "loop"])
@pytest.mark.parametrize("name", ["tokens", "loss_mask", "segment_ids", "documents", "refusals"])
def test_what_leads_out_of_the_file_is_refused(whole, tmp_path, kind, name):
    """A file may not make Whet read other files, and train on what stands there."""
    path, other = tmp_path / "a.h5", whole
    path.write_bytes(whole.read_bytes())
    with h5py.File(path, "r+") as file:
        if name in file:
            shape, dtype = file[name].shape, file[name].dtype
            del file[name]
        else:
            shape, dtype = (3,), np.dtype("u1")
        if kind == "external link":
            file[name] = h5py.ExternalLink(str(other), f"/{name}")
        elif kind == "soft link":
            file[name] = h5py.SoftLink("/loss_tokens")
        elif kind == "loop":
            file[name] = h5py.SoftLink(f"/{name}")
        elif kind == "external data":
            (tmp_path / "secret").write_bytes(bytes(100_000))
            size = int(np.prod(shape)) * dtype.itemsize
            outside = [(str(tmp_path / "secret"), 0, size)]
            file.create_dataset(name, shape, dtype, external=outside)
        else:
            layout = h5py.VirtualLayout(shape, dtype)
            layout[...] = h5py.VirtualSource(str(other), name, shape, dtype)
            file.create_virtual_dataset(name, layout)
    with pytest.raises(UserError, match="leads out of its place"):
        PackedStore(path)


def test_a_good_file_is_read(whole):
    read_all(whole)
