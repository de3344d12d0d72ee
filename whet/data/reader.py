"""Data files -> blocks of records, read piece by piece.

A record stays unparsed text here wherever it can, so that parsing and encoding happen together in
the worker processes. Every record knows its line, counted as an editor counts, or its number where
records have no lines of their own: a JSON array is often written as a single line.
"""

import gzip
import io
import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from whet.chat.conversation import Origin, json_flaw
from whet.config import collected, problems
from whet.errors import UserError

BLOCK_BYTES = 1 << 18
"""Text handed to a worker at once: some 60,000 tokens, a tenth of a second of work."""
PIECE_CHARS = 1 << 18  # a long .txt document is encoded in pieces of about this size
GOES_ON = "whet: the text goes on"  # a field that no data file has
COMPRESSED = (".gz", ".zst")
SHOWN = 20
"""Lines that are named where many cannot be read."""
SAME = 3
"""As many of them for one reason."""
T = TypeVar("T")
KINDS = (".jsonl", ".json", ".parquet", ".txt")


@dataclass(frozen=True)
class Source:
    """One `--data` argument: where to read, how often each of its conversations is trained."""

    path: str
    weight: float = 1.0

    @property
    def size(self) -> int:
        """Bytes on disk, to judge the work by; 0 where it is not a local file."""
        return Path(self.path).stat().st_size if Path(self.path).is_file() else 0


class Unit(NamedTuple):
    """One record: its place, and JSON text, or the parsed record where the file was not JSON."""

    line: int  # from 1; the number of the record in `.json`, Parquet and data sets of the hub
    content: str | bytes | dict[str, Any]

    @property
    def goes_on(self) -> bool:
        """Whether it is a piece of a long text that the next unit goes on with."""
        return isinstance(self.content, dict) and bool(self.content.get(GOES_ON))


class Block(NamedTuple):
    """Records for one worker; `source` is the number of their source, `size` their bytes."""

    source: int
    units: list[Unit]
    size: int


def parse_source(argument: str) -> Source:
    """`PATH` or `PATH:WEIGHT`, as `--data` takes them."""
    path, colon, weight = argument.rpartition(":")
    if not colon or Path(argument).exists() or not re.fullmatch(r"[-+.\deE]+|nan|inf", weight):
        return Source(argument)
    try:
        value = float(weight)
    except ValueError:
        raise UserError(f"--data {argument}: {weight!r} is not a number") from None
    if not 0 < value < 1e6:
        raise UserError(
            f"--data {argument}: expected a weight above 0 and below a million, got {weight}"
        )
    return Source(path, value)


def parse_sources(arguments: Sequence[str]) -> list[Source]:
    """The arguments of `--data`; raises UserError with all that cannot be read."""
    found: list[str] = []
    sources = []
    for argument in arguments:
        with collected(found):
            sources.append(parse_source(argument))
            check_path(sources[-1].path, "--data")
    problems(found)
    return sources


def check_path(path: str, flag: str) -> None:
    """Raise UserError if `path` can be neither a data file nor a data set of the hub."""
    try:
        if Path(path).is_file():
            _kind(path)
        else:
            _hub_name(path)
    except UserError as error:
        raise UserError(f"{flag} {error}") from None


def read_blocks(sources: list[Source]) -> Iterator[Block]:
    """All records of all sources, in order, in blocks whose borders depend on the data alone."""
    for number, source in enumerate(sources):
        units: list[Unit] = []
        size = 0
        for unit in read_units(source.path):
            units.append(unit)
            size += _size(unit.content)
            if size >= BLOCK_BYTES:
                yield Block(number, units, size)
                units, size = [], 0
        if units:
            yield Block(number, units, size)


def read_units(path: str) -> Iterator[Unit]:
    """The records of one file, or of a data set of the Hugging Face hub.

    Raises UserError for a missing file, a wrong suffix, or a file that is broken as a whole.
    """
    if not Path(path).is_file():
        yield from _hub_units(path)
        return
    kind = _kind(path)
    if kind == ".parquet":
        yield from _parquet_units(path)
        return
    with _opened(path) as file:
        if kind == ".jsonl":
            yield from _line_units(path, file)
            return
        _check_encoding(path, file.peek(4)[:4])
        text = io.TextIOWrapper(file, "utf-8-sig", newline="")
        yield from (_json_units if kind == ".json" else _text_units)(path, text)


def read_each(path: Path, units: Iterable[Unit], read: Callable[[Any, Origin], T]) -> list[T]:
    """`read(record, origin)` of each of a file's records.

    Raises UserError with file and line of those that it refuses, SAME of one reason.
    """
    found, refused, reasons = list[T](), list[str](), Counter[str]()
    for unit in units:
        at = Origin(str(path), unit.line)
        try:
            record = parse(unit)
            if not isinstance(record, dict):
                raise UserError(f"expected an object, got {type(record).__name__}")
            found.append(read(record, at))
        except UserError as error:
            reason = str(error).removeprefix(f"{at.where}: ")
            reasons[reason] += 1
            if reasons[reason] <= SAME and len(refused) < SHOWN:
                refused.append(str(at.error(reason)))
    if further := reasons.total() - len(refused):
        refused.append(f"{path}: {further:,} further lines cannot be read")
    problems(refused)
    return found


def parse(unit: Unit) -> Any:
    """The record of a unit; raises UserError, without file and line, if it is not one."""
    if not isinstance(unit.content, str | bytes):
        return unit.content
    try:
        text = unit.content if isinstance(unit.content, str) else unit.content.decode("utf-8")
        record = DECODER.decode(text)
        if "\\ud" in text or "\\uD" in text:  # half a surrogate pair is no character
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8: byte {error.start + 1} of the line ({error.reason})") from None
    except UnicodeEncodeError:
        raise UserError("holds half of a surrogate pair (\\ud800..\\udfff), no character") from None
    except RecursionError:
        raise UserError("nested too deeply to be a conversation") from None
    except ValueError as error:
        if not text.strip():
            raise UserError("is empty; expected a JSON object") from None
        raise UserError(f"not JSON: {json_flaw(error)}") from None
    return record


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a value of JSON; write null, or leave the field out")


def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys differ: JSON lets the last of two win, and one text would be lost."""
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"the key {twice!r} occurs twice in one object; which one is meant?")
    return record


# json.loads would make one for each line.
DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=no_key_twice)


def _size(content: Any) -> int:
    if isinstance(content, str | bytes):
        return len(content)
    return sum(len(str(value)) for value in content.values())


def _kind(path: str) -> str:
    suffixes = [s.lower() for s in Path(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    kind = ".jsonl" if kind == ".ndjson" else kind
    if kind not in KINDS:
        known = f"{', '.join(KINDS)}, packed as .gz or .zst"
        way = f"; this converts it: {_converted(path, kind)}" if kind in TABLES else ""
        raise UserError(f"{path}: unknown kind of file; known are {known}{way}")
    return kind


TABLES = {".csv": "csv({})", ".tsv": 'csv({}, sep="\\t")', ".xlsx": "excel({})"}
"""Tables without types, by their file's ending: the function of pandas that reads them."""


def _converted(path: str, kind: str) -> str:
    """The command that writes a table as JSON Lines."""
    out = json.dumps(path[: path.lower().rindex(kind)] + ".jsonl", ensure_ascii=False)
    read = TABLES[kind].format(json.dumps(path, ensure_ascii=False))
    code = f'import pandas; pandas.read_{read}.to_json({out}, orient="records", lines=True)'
    return f"python -c {shlex.quote(code)}"


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """The file's bytes, unpacked; what the codec dislikes becomes a UserError."""
    broken: tuple[type[Exception], ...] = (OSError, EOFError, UnicodeDecodeError)
    try:
        if path.lower().endswith(".gz"):
            import zlib

            broken += (zlib.error,)
            with gzip.open(path, "rb") as unpacked:
                yield unpacked
        elif path.lower().endswith(".zst"):
            try:
                import zstandard
            except ImportError:
                raise UserError(f"{path}: .zst needs `pip install zstandard`") from None
            broken += (zstandard.ZstdError,)
            with open(path, "rb") as packed:
                stream = zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True)
                yield io.BufferedReader(stream)
        else:
            with open(path, "rb") as plain:
                yield plain
    except broken as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _line_units(path: str, file: IO[bytes]) -> Iterator[Unit]:
    """One record a line. An empty line is handed on and refused: half of a file may be missing."""
    for number, line in enumerate(file, 1):
        if number == 1:
            _check_encoding(path, line)
            line = line.removeprefix(b"\xef\xbb\xbf")
            if line.startswith(b"["):
                raise UserError(f"{path}:1: is a JSON array, not JSON Lines; name the file .json")
        yield Unit(number, line.rstrip(b"\r\n"))


JSON_STEPS = {
    # what may come, and a sign: what may come after it. A trailing comma is no harm.
    ("array or value", "["): "value of array",
    ("value of array", "]"): "array or value",
    ("comma", "]"): "array or value",
    ("comma", ","): "value of array",
}


def _json_units(path: str, file: IO[str]) -> Iterator[Unit]:
    """The elements of JSON arrays, or JSON values one after another, without holding all of them.

    A value is recognised by decoding from its start; where the text that was read so far ends
    inside it, more is read. After a syntax error nothing that follows can be trusted.
    """
    decoder = json.JSONDecoder()
    text, line, number, state, wanted = "", 1, 0, "array or value", 1 << 20
    while True:
        more = file.read(wanted)
        text += more
        position = 0
        while True:
            start = _after_whitespace(text, position)
            line += text.count("\n", position, start)
            position = start
            if position == len(text):
                break
            if after := JSON_STEPS.get((state, text[position])):
                state, position = after, position + 1
                continue
            if state == "comma" or (state == "value of array" and text[position] == ","):
                what = "no comma between two values" if state == "comma" else "a comma too many"
                raise UserError(f"{path}:{line}: not JSON: {what} of an array")
            try:
                _, end = decoder.raw_decode(text, position)
            except RecursionError:
                raise UserError(f"{path}:{line}: nested too deeply to be data") from None
            except ValueError as error:
                if more:
                    break
                raise UserError(f"{path}:{line}: not JSON: {json_flaw(error)}") from None
            if end == len(text) and more:  # a number may go on
                break
            number += 1
            yield Unit(number, text[position:end])
            line += text.count("\n", position, end)
            position = end
            state = "comma" if state == "value of array" else "value"
        text = text[position:]
        wanted = max(1 << 20, len(text))  # doubling: a huge value is not decoded again and again
        if not more:
            if state in ("comma", "value of array"):
                raise UserError(f"{path}:{line}: the JSON array is not closed; is the file whole?")
            return


BINARY = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"PAR1": ".parquet"}
"""How files of other kinds begin, and what their names must end in."""


def _check_encoding(path: str, begin: bytes) -> None:
    """Name files that are no text under a text's name, and UTF-16 and UTF-32, which Windows writes
    and which no JSON reader takes."""
    for magic, ending in BINARY.items():
        if begin.startswith(magic):
            wanted = f"{path}{ending}" if ending in COMPRESSED else f"NAME{ending}"
            raise UserError(f"{path}: is a {ending} file by its content; name it {wanted}")
    if begin[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\x00" in begin[:4]:
        raise UserError(
            f"{path}: is UTF-16 or UTF-32; Whet reads UTF-8: iconv -f UTF-16 -t UTF-8 {path}"
        )


WHITESPACE = re.compile(r"[ \t\r\n]*")


def _after_whitespace(text: str, position: int) -> int:
    found = WHITESPACE.match(text, position)
    return found.end() if found else position


def _text_units(path: str, file: IO[str]) -> Iterator[Unit]:
    """A text file is one document; a long one comes in pieces that end at line ends.

    All but the last are marked with GOES_ON.
    """
    line, carried = 1, ""
    while True:
        more = file.read(PIECE_CHARS)
        goes_on = len(more) == PIECE_CHARS
        text = carried + more
        end = len(text.rstrip())
        cut = text.rfind("\n", 0, end) + 1
        if cut == 0 and end > 16 * PIECE_CHARS:
            cut = end - 1  # a document without line ends
        if goes_on and not text[:cut].strip():  # no piece is whitespace alone, the last one neither
            carried = text
            continue
        cut = cut if goes_on else len(text)
        piece, carried = text[:cut], text[cut:]
        if not piece.strip():
            raise UserError(f"{path}: is empty")
        yield Unit(line, {"text": piece, GOES_ON: goes_on})
        if not goes_on:
            return
        line += piece.count("\n")


def _parquet_units(path: str) -> Iterator[Unit]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: .parquet needs `pip install pyarrow`") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for record in batch.to_pylist(maps_as_pydicts="lossy"):
                    number += 1
                    yield Unit(number, without_nulls(record))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet: {error}") from None


def without_nulls(value: Any) -> Any:
    """A value of an Arrow table without the keys that are null, at any depth.

    All rows of a table have one struct, so an object gains the keys of every other row as nulls:
    as arguments of a call, or in the schema of a tool, they would be trained.
    """
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


HUB_NAME = re.compile(r"(?P<name>[^@#]+)(@(?P<config>[^@#]+))?(#(?P<split>[^@#]+))?")


def _hub_units(path: str) -> Iterator[Unit]:
    """A data set of the hub, `NAME[@CONFIG][#SPLIT]`, or a local directory that holds one."""
    name, config, split = _hub_name(path)
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{path}: no such file; a hub data set needs `pip install datasets`"
        ) from None
    try:
        data = _load(datasets, name, config, split or "train")
    except Exception as error:  # the library raises whatever its layers raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: no such file, and no data set to load: {reason}") from None
    for number, record in enumerate(data, 1):
        yield Unit(number, without_nulls(record))


def _hub_name(path: str) -> tuple[str, str | None, str | None]:
    """Name, configuration and split."""
    found = HUB_NAME.fullmatch(path)
    name = found["name"] if found else path
    looks_like_file = any(name.lower().endswith(s) for s in (*KINDS, *COMPRESSED, ".ndjson"))
    if not found or (looks_like_file and not Path(name).is_dir()):
        raise UserError(f"{path}: no such file")
    return name, found["config"], found["split"]


def _load(datasets: Any, name: str, config: str | None, split: str) -> Any:
    if (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file():
        data = datasets.load_from_disk(name)
        return data[split] if isinstance(data, dict) else data
    return datasets.load_dataset(name, config, split=split)
