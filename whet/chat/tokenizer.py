"""The vocabulary of a tokenizer directory: `tokenizer.json` and the tokens that its files name.

The tokens themselves are made by the `tokenizers` library. This file knows what stands around it:
which tokens are added or special, which one ends a text, how many ids there are. What a chat
template does with them stands in `chat.py`.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from whet.chat.backend import TokenizerError, failures_named, open_backend
from whet.chat.conversation import half_character
from whet.chat.template import check_names
from whet.errors import UserError
from whet.files import read_json, read_text, write_text
from whet.tokenizer_files import add_ends, convert, find_convertible

STANDARD = tuple(f"{k}_token" for k in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
FIELDS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
END_OF_TEXT = "<|endoftext|>"
COMMON_EOS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>")  # where no file names the eos
# Keys of tokenizer_config.json that other files say once it is saved
SAID_ELSEWHERE = {"chat_template", "added_tokens_decoder", "additional_special_tokens", *STANDARD}


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A vocabulary.

    `json_text` is the content of tokenizer.json, with all tokens that the directory declares;
    `named` are the special tokens that templates see as variables (bos_token, eos_token, ...),
    `config` is the tokenizer_config.json.
    """

    backend: tokenizers.Tokenizer = field(repr=False)
    json_text: str = field(repr=False)
    named: dict[str, str]
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    further_eos_ids: tuple[int, ...] = ()  # of generation_config.json

    def encode(self, text: str, ends: bool = False) -> list[int]:
        """The ids of `text`; control tokens in it are recognised. With `ends` come those that the
        tokenizer puts around a whole text. Raises TokenizerError if it can't."""
        with failures_named("the tokenizer"):
            try:
                return list(self.backend.encode(text, add_special_tokens=ends).ids)
            except TypeError:
                raise TokenizerError(half_character(text)) from None

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`, without the control tokens unless `skip_special` is False."""
        with failures_named("the tokenizer"):
            return str(self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special))

    @cached_property
    def vocab_size(self) -> int:
        """The largest id + 1: how many rows an embedding needs."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def added(self) -> dict[str, int]:
        """Tokens that are cut out of a text before anything else is tokenised, whitespace aside."""
        found = self.backend.get_added_tokens_decoder()
        return {token.content: i for i, token in found.items() if token.content.strip()}

    @cached_property
    def flagged(self) -> dict[str, int]:
        """The added tokens that tokenizer.json calls special, and the named ones."""
        found = self.backend.get_added_tokens_decoder()
        special = {token.content for token in found.values() if token.special}
        special |= set(self.named.values())
        return {text: i for text, i in self.added.items() if text in special}

    def id_of(self, name: str) -> int | None:
        """The id of a named special token such as eos_token, or None."""
        text = self.named.get(name)
        return None if text is None else self.backend.token_to_id(text)

    @property
    def eos_id(self) -> int | None:
        return self.id_of("eos_token")

    @property
    def bos_id(self) -> int | None:
        return self.id_of("bos_token")

    @property
    def pad_id(self) -> int | None:
        return self.id_of("pad_token")

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a text: the eos token's first, then those of generation_config.json."""
        return tuple(
            dict.fromkeys(i for i in (self.eos_id, *self.further_eos_ids) if i is not None)
        )

    @cached_property
    def hash(self) -> str:
        """sha256 of tokenizer.json, whatever its layout and its settings for batches."""
        content = json.loads(self.json_text)
        content.pop("truncation", None)
        content.pop("padding", None)
        model = content.get("model") or {}
        if isinstance(model.get("vocab"), dict):  # by id: it is in this order, so quickly sorted
            model["vocab"] = sorted(model["vocab"].items(), key=itemgetter(1))
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def knows_ids_of(self, other: "Tokenizer") -> bool:
        """Whether every id of `other` is the same token here; there may be more, such as the
        padding token of a reward model."""
        own = self.backend.get_vocab(with_added_tokens=True)
        return other.backend.get_vocab(with_added_tokens=True).items() <= own.items()

    def with_tokens(self, texts: Iterable[str]) -> "Tokenizer":
        """This tokenizer with `texts` as special tokens, new ones at the end of the vocabulary."""
        new = [t for t in dict.fromkeys(texts) if self.backend.token_to_id(t) is None]
        if not new:
            return self
        backend = open_backend(self.json_text, Path("tokenizer.json"))
        backend.add_special_tokens([AddedToken(text, normalized=False) for text in new])
        return replace(self, backend=backend, json_text=backend.to_str())

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the backend: worker processes build it again from the text."""
        return _rebuild, (self.json_text, self.named, self.config, self.further_eos_ids)

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json into `directory`."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = {k: v for k, v in self.config.items() if k not in SAID_ELSEWHERE}
        named = {k: v for k, v in self.named.items() if k.endswith("_token")}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **config, **named}
        if others := {k: v for k, v in self.named.items() if k not in named}:
            config["extra_special_tokens"] = others
        write_text(folder / "tokenizer.json", self.json_text)
        # In ASCII: a stranger's file may hold half a character, which UTF-8 cannot write.
        write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2))


def read_tokenizer(path: str | Path) -> Tokenizer:
    """The vocabulary of the directory `path`.

    Without a tokenizer.json a SentencePiece or tiktoken file is converted.
    Raises UserError if a file is missing or broken.
    """
    folder = Path(path)
    file, made = folder / "tokenizer.json", None
    config = _optional_json(folder / "tokenizer_config.json")
    if file.is_file():
        text = read_text(file)
    elif (other := find_convertible(folder)) is not None:
        file, made = other, convert(other)
        text = made.json_text
        if "bos_token" in made.named and config.get("add_bos_token") is None:
            config = {**config, "add_bos_token": True}  # libraries differ in what silence means
    else:
        what = "is no directory" if not folder.is_dir() else "holds no tokenizer.json"
        raise UserError(f"{folder} {what}; expected a model or tokenizer directory")
    further = _eos_ids(folder)
    backend = open_backend(text, file)
    before = repr(backend.get_added_tokens_decoder())
    tokens, extra, numbered = _declared(folder, config, backend.get_added_tokens_decoder())
    given = made.named if made else {}
    named = {**given, **{name: token.content for name, token in tokens.items()}}
    check_names(named, f"{folder}: special tokens")
    if "eos_token" not in named:  # that of generation_config.json, or one that many have
        known = [backend.id_to_token(i) for i in further]
        known += [text for text in COMMON_EOS if backend.token_to_id(text) is not None]
        named |= {"eos_token": known[0]} if known and known[0] else {}
    if extra:
        config = {**config, "extra_special_tokens": [token.content for token in extra]}
    for name, content in named.items():
        tokens.setdefault(name, AddedToken(content, special=True))
    _add_declared(backend, tokens, extra, numbered)
    if made:
        add_ends(backend, named, config)
        text = backend.to_str()
    elif repr(backend.get_added_tokens_decoder()) != before:
        whole = json.loads(text)
        whole["added_tokens"] = json.loads(backend.to_str())["added_tokens"]
        text = json.dumps(whole, ensure_ascii=False)
    return Tokenizer(backend, text, named, config, further)


def _declared(
    folder: Path, config: dict[str, Any], own: dict[int, AddedToken]
) -> tuple[dict[str, AddedToken], list[AddedToken], dict[int, AddedToken]]:
    """What `folder` declares outside its tokenizer.json, read as transformers reads it: tokens that
    have a name, such as eos_token; special ones without a name; all that stand under an id, by it.

    `config` is its tokenizer_config.json, `own` the added tokens of its tokenizer.json by id. They
    stand in tokenizer_config.json (`added_tokens_decoder`, `extra_special_tokens`, its older name
    `additional_special_tokens`, and each key that ends with `_token`) and, in older directories, in
    special_tokens_map.json and added_tokens.json. Raises UserError if a declaration is none.
    """
    where = folder / "tokenizer_config.json"
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    named = _named(config, where)
    if isinstance(extra, dict):
        named, extra = named | _named(extra, where, extra), []
    extra = _listed(extra, where)
    numbered = config.get("added_tokens_decoder")
    if numbered is not None:
        return _present(named), extra, _numbered(numbered, where)
    file = folder / "special_tokens_map.json"
    older = _optional_json(file)
    named |= _named(older, file)  # the older file has the last word, even if it says null
    more = older.get("extra_special_tokens")
    if isinstance(more, dict):
        named, extra = named | _named(more, file, more), []
    elif more or (not extra and isinstance(config.get("extra_special_tokens", {}), dict)):
        extra += _listed(more or older.get("additional_special_tokens") or [], file, special=True)
    standard = {token.content for key, token in _present(named).items() if key in STANDARD}
    special = standard | {token.content for token in extra}
    file = folder / "added_tokens.json"
    legacy = {}
    for content, number in _optional_json(file).items():
        if type(number) is not int:
            raise UserError(f"{file}: {content!r} has the id {number!r}; expected a whole number")
        flag = content in special
        fields = {"content": content, "normalized": not flag, "special": flag}
        legacy[number] = _token(fields, file)
    return _present(named), extra, {**legacy, **own}


def _add_declared(
    backend: tokenizers.Tokenizer,
    named: dict[str, AddedToken],
    extra: list[AddedToken],
    numbered: dict[int, AddedToken],
) -> None:
    """Let `backend` know what is declared, in the order that gives transformers' ids.

    A token that the vocabulary has keeps its id and is cut out of texts from then on; any other
    gets the next free id, whatever number the files give it. The oracle is
    `PreTrainedTokenizerBase._from_pretrained` of transformers 5.23.
    """
    own = backend.get_added_tokens_decoder()
    names = {token.content for token in named.values()}
    tokens = [token for _, token in sorted(numbered.items())]
    known = {token.content for token in (*own.values(), *tokens)}
    for token in tokens:
        token.special = token.special or token.content in names
    order = [name for name in STANDARD if name in named]
    order += [name for name in named if name not in STANDARD]
    for token in (*(named[name] for name in order), *extra):
        if token.content not in known:
            known.add(token.content)
            tokens.append(token)
    backend.add_tokens(tokens)


def _named(
    content: dict[str, Any], where: Path, names: Iterable[str] | None = None
) -> dict[str, AddedToken | None]:
    """The tokens in `content` under `names`, or under those that end with `_token`; None where a
    standard one is null. Templates see all of them."""
    named: dict[str, AddedToken | None] = {}
    for key, value in content.items():
        if key in STANDARD and value is None:
            named[key] = None
        elif isinstance(value, str | dict) and (names is not None or key.endswith("_token")):
            named[key] = token = _token(value, where, special=True)
            token.special = True
        elif key in STANDARD or names is not None:
            raise UserError(f"{where}: {key} is {value!r:.100}; expected a text or an object")
    return named


def _present(named: dict[str, AddedToken | None]) -> dict[str, AddedToken]:
    return {key: token for key, token in named.items() if token is not None}


def _listed(tokens: Any, where: Path, special: bool = False) -> list[AddedToken]:
    if not isinstance(tokens, list):
        raise UserError(
            f"{where}: extra_special_tokens must be a list or an object, not {tokens!r:.100}"
        )
    return [_token(token, where, special) for token in tokens]


def _numbered(tokens: Any, where: Path) -> dict[int, AddedToken]:
    try:
        return {int(number): _token(token, where) for number, token in tokens.items()}
    except (AttributeError, ValueError):
        raise UserError(
            f"{where}: added_tokens_decoder must be an object of tokens by id, not {tokens!r:.100}"
        ) from None


def _token(value: Any, where: Path, special: bool = False) -> AddedToken:
    """One token: its text, or an object with its fields; `special` is what a silent one is."""
    try:
        if isinstance(value, str):
            return AddedToken(value, special=True)
        fields = {key: value[key] for key in FIELDS if key in value}
        return AddedToken(value["content"], **{"special": special, **fields})
    except (TypeError, KeyError, UnicodeError):
        raise UserError(
            f"{where}: {value!a:.100} is no token; expected a text or an object with its content"
        ) from None


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE learnt from `texts`.

    Digits stand alone, so that a number is read digit by digit. `<|endoftext|>` is the eos.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, backend.to_str(), {"eos_token": END_OF_TEXT})


def _rebuild(json_text: str, *rest: Any) -> Tokenizer:
    return Tokenizer(open_backend(json_text, Path("tokenizer.json")), json_text, *rest)


def _eos_ids(folder: Path) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        said = _optional_json(folder / name).get("eos_token_id")
        if said is None:
            continue
        ids = said if isinstance(said, list) else [said]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise UserError(
                f"{folder / name}: eos_token_id is {said!r}; expected a token id or a list of them"
            )
        return tuple(ids)
    return ()


def _optional_json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}
