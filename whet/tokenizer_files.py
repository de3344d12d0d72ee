"""SentencePiece and tiktoken files -> the text of a `tokenizer.json`.

A SentencePiece `tokenizer.model` holds pieces with scores (unigram or BPE) and how it normalises.
A tiktoken file holds only byte strings with ranks; how text is split before that stands in the
program that uses it, and is known here for the published vocabularies by their size. Needs
`pip install whet[convert]` for SentencePiece; tiktoken files need nothing.

The converted tokenizer gives the ids of the original library, which is the oracle in the tests.
"""

import base64
import binascii
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from whet.errors import UserError

SPACE = "▁"  # stands for a space in SentencePiece's pieces
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WHITESPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _WHITESPACE
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _WHITESPACE
)
_LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"]
_LLAMA3 += ["<|reserved_special_token_1|>", "<|finetune_right_pad_id|>"]
_LLAMA3 += ["<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>"]
_LLAMA3 += ["<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
_LLAMA3 += [f"<|reserved_special_token_{i}|>" for i in range(3, 248)]


class Vocabulary(NamedTuple):
    """What a tiktoken file does not say."""

    name: str
    pattern: str
    special: dict[str, int]
    nfc: bool = False  # whether texts are brought to Unicode's composed form first


TIKTOKEN = {
    # ranks in the file: the vocabulary it is
    50_256: Vocabulary("r50k_base", _GPT2, {"<|endoftext|>": 50_256}),
    100_256: Vocabulary(
        "cl100k_base",
        (_WORDS % "{1,3}").replace(
            _WHITESPACE, r"\s+(?![\s\S])|" + _WHITESPACE
        ),  # one at a text's end
        {
            "<|endoftext|>": 100_257,
            "<|fim_prefix|>": 100_258,
            "<|fim_middle|>": 100_259,
            "<|fim_suffix|>": 100_260,
            "<|endofprompt|>": 100_276,
        },
    ),
    128_000: Vocabulary(
        "llama3", _WORDS % "{1,3}", {text: 128_000 + i for i, text in enumerate(_LLAMA3)}
    ),
    151_643: Vocabulary(
        "qwen",
        _WORDS % "",
        {"<|endoftext|>": 151_643, "<|im_start|>": 151_644, "<|im_end|>": 151_645},
        nfc=True,
    ),
    199_998: Vocabulary(
        "o200k_base", _O200K, {"<|endoftext|>": 199_999, "<|endofprompt|>": 200_018}
    ),
}


class Converted(NamedTuple):
    """The text of a tokenizer.json, and the special tokens by name, such as eos_token."""

    json_text: str
    named: dict[str, str]


def find_convertible(folder: Path) -> Path | None:
    """The file in `folder` that `convert` takes, if there is one."""
    found = [folder / "tokenizer.model", *sorted(folder.glob("*.tiktoken"))]
    found += sorted(folder.glob("*.model"))
    return next((file for file in found if file.is_file()), None)


def convert(file: Path) -> Converted:
    """Convert a SentencePiece model or a tiktoken file. Raises UserError if it is neither."""
    content = file.read_bytes()
    if _looks_like_tiktoken(content):
        return _convert_tiktoken(file, content)
    return _convert_sentencepiece(file, content)


def _looks_like_tiktoken(content: bytes) -> bool:
    first, _, rank = content[:200].split(b"\n")[0].partition(b" ")
    try:
        return rank.strip().isdigit() and bool(base64.b64decode(first, validate=True))
    except binascii.Error:
        return False


def _convert_tiktoken(file: Path, content: bytes) -> Converted:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        token, _, rank = line.partition(b" ")
        try:
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise UserError(f"{file}:{number}: expected a base64 token and its rank") from None
    vocabulary = TIKTOKEN.get(len(ranks))
    if vocabulary is None:
        known = ", ".join(f"{v.name} ({n})" for n, v in TIKTOKEN.items())
        raise UserError(
            f"{file}: a tiktoken file of {len(ranks)} ranks; how it splits text does not stand in "
            f"it and is known for {known} only; give a tokenizer.json"
        )
    letters = byte_letters()
    written = {token: "".join(letters[b] for b in token) for token in ranks}
    merges = [(written[left], written[right]) for left, right in _merges(ranks)]
    vocab = {written[token]: rank for token, rank in ranks.items()} | vocabulary.special
    model = models.BPE(vocab, merges, ignore_merges=True)
    backend = tokenizers.Tokenizer(model)
    if vocabulary.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(vocabulary.pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in vocabulary.special])
    names = list(vocabulary.special)
    named = {"eos_token": "<|endoftext|>"}
    if vocabulary.name == "llama3":
        named = {"bos_token": names[0], "eos_token": names[1]}
    return Converted(backend.to_str(), named)


def byte_letters() -> dict[int, str]:
    """The printable letter that byte-level BPE writes for each byte (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair each token is merged from: what BPE with the lower ranks alone makes of it."""
    pairs = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [left + right for left, right in pairwise(parts)]
            best = min(range(len(joined)), key=lambda i: ranks.get(joined[i], rank))
            if ranks.get(joined[best], rank) >= rank:
                break
            parts[best : best + 2] = [joined[best]]
        if len(parts) == 2:
            pairs.append((parts[0], parts[1]))
    return pairs


def _convert_sentencepiece(file: Path, content: bytes) -> Converted:
    proto, kinds = _read_sentencepiece(file, content)
    trainer, normal = proto.trainer_spec, proto.normalizer_spec
    own = [piece.piece for piece in proto.pieces if piece.type == kinds.USER_DEFINED]
    backend = tokenizers.Tokenizer(_sentencepiece_model(file, proto))
    backend.normalizer = _sentencepiece_normalizer(normal, own)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if normal.add_dummy_prefix else [])
    )
    for piece in proto.pieces:
        if piece.type in (kinds.CONTROL, kinds.UNKNOWN):
            backend.add_special_tokens([AddedToken(piece.piece, normalized=False)])
    changed = [text for text in own if backend.normalizer.normalize_str(text) != text]
    whole_text = normal.add_dummy_prefix or normal.remove_extra_whitespaces
    if whole_text and changed:
        raise UserError(
            f"{file}: a SentencePiece model that changes its texts around the {len(own)} symbols "
            f"that its maker defined, such as {changed[0]!r}, in a way that a tokenizer.json can't "
            "say; give a tokenizer.json"
        )
    # What is done with a text's spaces concerns the whole text, so symbols are cut out after it.
    backend.add_tokens([AddedToken(text, normalized=bool(whole_text)) for text in own])
    named = {"bos_token": trainer.bos_piece, "eos_token": trainer.eos_piece}
    named["unk_token"] = trainer.unk_piece
    known = {piece.piece for piece in proto.pieces}
    return Converted(backend.to_str(), {k: v for k, v in named.items() if v in known})


def _read_sentencepiece(file: Path, content: bytes) -> tuple[Any, Any]:
    """The model and the kinds of its pieces."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise UserError(
            f"{file}: a SentencePiece model needs to be converted: pip install whet[convert]"
        ) from None
    protocol: Any = sentencepiece_model_pb2  # its classes are made when it is imported
    proto = protocol.ModelProto()
    try:
        proto.ParseFromString(content)
    except Exception:  # protobuf's own DecodeError
        proto.Clear()
    if not proto.pieces:
        raise UserError(f"{file}: neither a SentencePiece model nor a tiktoken file")
    if (
        proto.trainer_spec.treat_whitespace_as_suffix
        or not proto.normalizer_spec.escape_whitespaces
    ):
        raise UserError(
            f"{file}: a SentencePiece model with spaces at the end of words, or kept as they are; "
            "only spaces at the beginning of words can be converted; give a tokenizer.json"
        )
    return proto, protocol.ModelProto.SentencePiece


def _sentencepiece_model(file: Path, proto: Any) -> models.Model:
    trainer = proto.trainer_spec
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    if trainer.model_type == 1:
        return models.Unigram(pieces, trainer.unk_id, byte_fallback=trainer.byte_fallback)
    if trainer.model_type != 2:
        raise UserError(
            f"{file}: SentencePiece model of type {trainer.model_type}; expected 1 or 2"
        )
    vocab = {piece: i for i, (piece, _) in enumerate(pieces)}
    return models.BPE(
        vocab,
        _score_merges(pieces, vocab),
        unk_token=trainer.unk_piece if trainer.unk_piece in vocab else None,
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
    )


def _sentencepiece_normalizer(normal: Any, own: list[str]) -> normalizers.Normalizer:
    """What is done with a text's characters and spaces; `own` are the maker's own symbols."""
    steps: list[Any] = []
    if normal.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normal.precompiled_charsmap))
    if normal.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), "")]  # spaces only, no other whitespace
        steps += [normalizers.Replace(Regex(" {2,}"), " ")]
    if normal.add_dummy_prefix and own:
        # Before every text but one that is such a symbol: the symbols themselves are normalised
        # like texts before they are looked for, and must stay what they are.
        alone = "|".join(re.escape(text) for text in own)
        steps += [normalizers.Replace(Regex(rf"\A(?!(?:{alone})?\z)"), SPACE)]
    elif normal.add_dummy_prefix:
        steps += [normalizers.Prepend(SPACE)]
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _score_merges(pieces: list[tuple[str, float]], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, those of the best score first."""
    found = []
    for piece, score in pieces:
        halves = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        known = [(left, right) for left, right in halves if left in vocab and right in vocab]
        known.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        found += [(score, pair) for pair in known]
    return [pair for _, pair in sorted(found, key=lambda item: -item[0])]


def add_ends(backend: tokenizers.Tokenizer, named: dict[str, str], config: dict[str, Any]) -> None:
    """Have `backend` put bos and eos around a whole text where `config`, the tokenizer_config.json,
    says so under add_bos_token and add_eos_token. `named` are the directory's special tokens."""
    ends = []
    for name in ("bos_token", "eos_token"):
        text = named.get(name) if config.get(f"add_{name}") else None
        token = None if text is None else backend.token_to_id(text)
        ends.append(None if token is None else (text, token))
    if not any(ends):
        return
    (bos, eos), known = ends, [end for end in ends if end]

    def around(text: str, type_id: int) -> list[str]:
        parts = [bos and f"{bos[0]}:{type_id}", f"${text}:{type_id}", eos and f"{eos[0]}:{type_id}"]
        return [part for part in parts if part]

    backend.post_processor = processors.TemplateProcessing(
        single=around("A", 0), pair=[*around("A", 0), *around("B", 1)], special_tokens=known
    )
