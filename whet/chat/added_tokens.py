"""Tokens that a directory declares outside its tokenizer.json, read as transformers reads them.

They stand in tokenizer_config.json (`added_tokens_decoder`, `extra_special_tokens`, its older name
`additional_special_tokens`, and each key that ends with `_token`) and, in older directories, in
special_tokens_map.json and added_tokens.json. A token that the vocabulary has keeps its id and is
cut out of texts from then on; any other gets the next free id, whatever number the files give it.

The oracle is `PreTrainedTokenizerBase._from_pretrained` of transformers 5.23.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken

from whet.errors import UserError
from whet.files import read_json

STANDARD = tuple(f"{k}_token" for k in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
FIELDS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class Declared(NamedTuple):
    """What the files declare. `named` are the tokens that have a name, such as eos_token, `extra`
    special ones without a name, `numbered` all of those that stand under an id, by that id."""

    named: dict[str, AddedToken]
    extra: list[AddedToken]
    numbered: dict[int, AddedToken]


def read_declared(folder: Path, config: dict[str, Any], own: dict[int, AddedToken]) -> Declared:
    """What the files of `folder` declare; `config` is its tokenizer_config.json, `own` the added
    tokens of its tokenizer.json by id. Raises UserError if a declaration is none."""
    where = folder / "tokenizer_config.json"
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    named = _named(config, where)
    if isinstance(extra, dict):
        named, extra = named | _named(extra, where, extra), []
    extra = _listed(extra, where)
    numbered = config.get("added_tokens_decoder")
    if numbered is not None:
        return Declared(_present(named), extra, _numbered(numbered, where))
    file = folder / "special_tokens_map.json"
    older = _optional(file)
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
    for content, number in _optional(file).items():
        if type(number) is not int:
            raise UserError(f"{file}: {content!r} has the id {number!r}; expected a whole number")
        flag = content in special
        fields = {"content": content, "normalized": not flag, "special": flag}
        legacy[number] = _token(fields, file)
    return Declared(_present(named), extra, {**legacy, **own})


def add_declared(backend: tokenizers.Tokenizer, declared: Declared) -> None:
    """Let `backend` know what is declared, in the order that gives transformers' ids."""
    own = backend.get_added_tokens_decoder()
    names = {token.content for token in declared.named.values()}
    tokens = [token for _, token in sorted(declared.numbered.items())]
    known = {token.content for token in (*own.values(), *tokens)}
    for token in tokens:
        token.special = token.special or token.content in names
    order = [name for name in STANDARD if name in declared.named]
    order += [name for name in declared.named if name not in STANDARD]
    for token in (*(declared.named[name] for name in order), *declared.extra):
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


def _optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}
