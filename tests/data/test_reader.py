import gzip
import json
import shlex

import pytest

import whet.data.reader as reader
from whet.data.formats import to_example
from whet.data.reader import (
    Source,
    Unit,
    parse,
    parse_source,
    read_blocks,
    read_units,
    without_nulls,
)
from whet.errors import UserError

RECORDS = [{"text": f"öne {i}", "n": [i, {"a": None}]} for i in range(40)]


def read(path):
    return [(unit.line, parse(unit)) for unit in read_units(str(path))]


def write_as(tmp_path, suffix):
    lines = "".join(json.dumps(r, ensure_ascii=i % 2 == 0) + "\n" for i, r in enumerate(RECORDS))
    content = lines if "jsonl" in suffix else json.dumps(RECORDS, indent=1)
    path = tmp_path / f"data{suffix}"
    data = content.encode()
    if suffix.endswith(".gz"):
        data = gzip.compress(data)
    elif suffix.endswith(".zst"):
        zstandard = pytest.importorskip("zstandard")
        compress = zstandard.ZstdCompressor().compress
        data = compress(data[:100]) + compress(data[100:])  # several frames in one file
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst"])
def test_every_wrapping_gives_the_same_records(tmp_path, suffix):
    assert [record for _, record in read(write_as(tmp_path, suffix))] == RECORDS


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows()), path)
    assert read(path) == list(enumerate(map(without_nulls, rows()), 1))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match=r"data\.parquet: cannot be read as Parquet"):
        read(path)


def rows():
    return [{"messages": [{"role": "user", "content": f"{i}"}], "x": None} for i in range(5)]


def test_a_hub_data_set_from_a_local_directory(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(rows())
    data.save_to_disk(str(tmp_path / "plain"))
    datasets.DatasetDict({"test": data}).save_to_disk(str(tmp_path / "dict"))
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows()))
    for name in ("plain", "dict#test", "files"):
        assert read(tmp_path / name) == list(enumerate(map(without_nulls, rows()), 1))
    with pytest.raises(UserError, match="no data set to load"):
        read(tmp_path / "dict#absent")


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ('[{"a": 1},\n {"a": 2}\n,\n\n{"a": 3}]\n', 3),
        ('{"a": 1}\n\n{"a":\n2}\n{"a": 3}', 3),
        ('\n\n[\n{"a": 1}, {"a": 2},\n{"a": 3}\n]', 3),
        ('[{"a": 1}]\n[]\n[{"a": 2}\n,{"a": 3},]\n{"a": 4}', 4),
    ],
)
def test_json_values_know_their_number(tmp_path, text, n):
    """Not their line: an array often is one."""
    path = tmp_path / "x.json"
    path.write_text("\ufeff" + text)
    assert read(path) == [(i, {"a": i}) for i in range(1, n + 1)]


def test_a_long_json_file_is_read_in_pieces(tmp_path, monkeypatch):
    records = [{"text": "x" * 700_000, "i": i} for i in range(5)]
    path = tmp_path / "x.json"
    path.write_text(json.dumps(records, indent=1))
    assert [record for _, record in read(path)] == records


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("x.json", b'[{"a": 1},\n{"a": ', r"x\.json:2: not JSON"),
        ("x.json", b'[{"a": 1}\n', r"x\.json:2: the JSON array is not closed"),
        ("x.json", b'[{"a": 1}\n{"a": 2}]', r"x\.json:2: not JSON: no comma between two values"),
        ("x.json", b'[{"a": 1},\n,{"a": 2}]', r"x\.json:2: not JSON: a comma too many"),
        ("x.json", b'[,{"a": 1}]', r"x\.json:1: not JSON: a comma too many"),
        ("x.json", b"[" * 100_000, "nested too deeply"),
        ("x.json", b'["\xff"]', "cannot be read: 'utf-8' codec"),
        ("x.jsonl", b"[\n{}]", "is a JSON array, not JSON Lines; name the file .json"),
        ("x.jsonl.gz", b"no gzip", "cannot be read"),
        ("x.jsonl.gz", gzip.compress(b"{}\n" * 9999, mtime=0)[:-20], "cannot be read"),
        ("x.jsonl.zst", b"no zstd", "cannot be read"),
        ("x.txt", b" \n \n", "is empty"),
        ("x.csv", b"a,b", "unknown kind of file; known are .jsonl"),
        ("x", b"{}", "unknown kind of file"),
    ],
)
def test_a_file_that_is_broken_as_a_whole(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=told):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["it's.csv", "x.TSV", "x.csv.gz"])
def test_a_table_is_refused_with_the_command_that_converts_it(tmp_path, name):
    pandas = pytest.importorskip("pandas")
    path, separator = tmp_path / name, "\t" if name == "x.TSV" else ","
    row = {"prompt": "one", "completion": 'zwölf, "2"'}
    pandas.DataFrame([row]).to_csv(path, sep=separator, index=False)
    with pytest.raises(UserError, match="this converts it: python -c") as caught:
        read(path)
    _, option, code = shlex.split(str(caught.value).rpartition("converts it: ")[2])
    assert option == "-c"
    exec(code, {})
    assert read(path.parent / f"{name[: name.lower().index('.')]}.jsonl") == [(1, row)]


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"absent\.jsonl: no such file"):
        read(tmp_path / "absent.jsonl")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty"),
        (b" ", "is empty"),
        (b'{"a": 1, "b": 2, "a": 1}', "the key 'a' occurs twice in one object"),
        (b'{"m": [{"a": 1, "b": 2, "a": 1, "b": 3}]}', "the key 'a' occurs twice"),
        (b'{"a": 1', "not JSON"),
        (b'{"a": NaN}', "NaN is not a value of JSON; write null, or leave the field out"),
        (b'{"a": -Infinity}', "-Infinity is not a value of JSON"),
        (b'{"a": 1,}', "character 9: a comma after the last value"),
        (b'{"a": [1, ]}', "a comma after the last value"),
        (b'{"a": [1,,2]}', "character 10: a comma too many"),
        (b'{"a": 1},', "a comma after the object; lines of JSON have none between them"),
        (b'{"a": 1} {"a": 2}', "character 10: a second value on the line"),
        (b'{"a": 1}}', "a bracket too many"),
        (b"{'a': 1}", "single quotes, as a Python dict is printed; json.dumps writes JSON"),
        (b'{"a": True}', "JSON has true, false and null"),
        (b'{"a": 1} // why', "a comment; JSON has none"),
        (b'{"a": "x\ty"}', "a line break or tab within a text"),
        (b'{"a": "x', "character 7: the text ends here, and the value does not"),
        (b'{"a" 1}', "character 6: Expecting ':' delimiter, got \"1}\""),
        (b'{"a": "\xff"}', "not UTF-8: byte 8 of the line"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b'{"a": ' + b"[" * 99_999 + b"]" * 99_999 + b"}", "nested too deeply"),
    ],
)
def test_a_broken_line(content, told):
    with pytest.raises(UserError, match=told):
        parse(Unit(1, content))


def test_good_escapes_are_no_surrogate_halves():
    assert parse(Unit(1, b'{"a": "\\ud83d\\ude00 \\\\ud800"}')) == {"a": "\U0001f600 \\ud800"}


def test_lines_are_counted_and_a_mark_at_the_beginning_is_no_text(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}')
    assert read(path) == [(1, {"a": 1}), (2, {"a": 2})]


@pytest.mark.parametrize("text", ["a\n" * 30, "  \n" * 20 + "x", "x\n" + "\n" * 99, "z" * 1000])
def test_text_pieces_are_the_whole_text(tmp_path, monkeypatch, text):
    monkeypatch.setattr(reader, "PIECE_CHARS", 20)
    path = tmp_path / "x.txt"
    path.write_text(text)
    pieces = [unit.content for unit in read_units(str(path))]
    assert "".join(piece["text"] for piece in pieces) == text
    goes_on = [piece[reader.GOES_ON] for piece in pieces]
    assert goes_on == [True] * (len(pieces) - 1) + [False]
    assert all(piece["text"].strip() for piece in pieces)


def test_blocks_depend_on_the_data_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "BLOCK_BYTES", 100)
    path = write_as(tmp_path, ".jsonl")
    blocks = list(read_blocks([Source(str(path)), Source(str(path), 2)]))
    assert {block.source for block in blocks} == {0, 1}
    lines = [unit.line for block in blocks for unit in block.units]
    assert lines == [*range(1, 41), *range(1, 41)]
    assert max(len(block.units) for block in blocks) < 5


@pytest.mark.parametrize(
    ("argument", "source"),
    [
        ("a.jsonl", Source("a.jsonl")),
        ("a.jsonl:0.5", Source("a.jsonl", 0.5)),
        ("a:b.jsonl:3", Source("a:b.jsonl", 3)),
        ("C:data", Source("C:data")),
        ("owner/name@main#train:2", Source("owner/name@main#train", 2)),
    ],
)
def test_weights_of_sources(argument, source):
    assert parse_source(argument) == source


@pytest.mark.parametrize("argument", ["a.jsonl:0", "a.jsonl:-1", "a.jsonl:nan", "a.jsonl:1.2.3"])
def test_wrong_weights(argument):
    with pytest.raises(UserError, match=r"--data a\.jsonl"):
        parse_source(argument)


CALL = {"name": "find", "arguments": {"city": "Ulm", "deep": [{"x": 1, "y": None}]}}
SCHEMA = {"name": "find", "parameters": {"type": "object", "enum": [None, "a"], "default": None}}


def with_nulls(path, kind):
    """A conversation with tools, beside one whose calls and schemas have other keys."""
    other = {"name": "add", "arguments": {"a": 1, "b": {"c": 2}, "deep": [{"z": "q"}]}}
    records = [
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "tool_calls": [{"function": call}]},
            ],
            "tools": [{"function": {"name": "f", "parameters": parameters}}],
        }
        for call, parameters in (
            (CALL, {"type": "object", "properties": {"city": {"type": "string"}}}),
            (other, {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0}}}),
        )
    ]
    if kind == "jsonl":
        path = path / "a.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif kind == "parquet":
        pytest.importorskip("pyarrow")
        import pyarrow.parquet

        path = path / "a.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        datasets = pytest.importorskip("datasets")
        path = path / "saved"
        datasets.Dataset.from_list(records).save_to_disk(path)
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_nulls_of_a_tables_struct_are_no_arguments(tmp_path, kind):
    """And a null that somebody wrote into JSON stays."""
    first, second = (to_example(parse(unit)) for unit in read_units(with_nulls(tmp_path, kind)))
    arguments = first.messages[1]["tool_calls"][0]["function"]["arguments"]
    written = {"x": 1, "y": None} if kind == "jsonl" else {"x": 1}
    assert arguments == {"city": "Ulm", "deep": [written]}
    properties = first.tools[0]["function"]["parameters"]["properties"]
    assert properties == {"city": {"type": "string"}}
    assert second.messages[1]["tool_calls"][0]["function"]["arguments"] == {
        "a": 1, "b": {"c": 2}, "deep": [{"z": "q"}],
    }  # fmt: skip


def test_lists_keep_their_nulls():
    assert without_nulls(SCHEMA)["parameters"] == {"type": "object", "enum": [None, "a"]}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.jsonl.gz"])
@pytest.mark.parametrize("coding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf_16_is_named(tmp_path, name, coding):
    path = tmp_path / name
    content = json.dumps({"text": "Hi"}).encode(coding)
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(UserError, match="is UTF-16 or UTF-32; Whet reads UTF-8: iconv"):
        list(read_units(str(path)))


def test_a_packed_file_under_the_name_of_a_text_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(gzip.compress(b"{}"))
    with pytest.raises(UserError, match=r"is a \.gz file by its content; name it .*a\.jsonl\.gz"):
        list(read_units(str(path)))
