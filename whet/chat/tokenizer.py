"""A tokenizer directory: tokenizer.json, its special tokens and its chat template.

The tokens themselves are made by the `tokenizers` library. This file knows what stands around it:
which token ends a text, which strings are control tokens, which template the directory has.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from whet.chat.conversation import shown
from whet.chat.dialect import Dialect
from whet.chat.template import ChatTemplate
from whet.errors import UserError
from whet.files import replaced
from whet.tokenizer_files import convert, find_convertible, with_ends

END_OF_TEXT = "<|endoftext|>"
COMMON_EOS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>")  # where no file names the eos
NAMED_TOKENS = tuple(f"{k}_token" for k in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
BUILT_IN = ("plain", "chatml")
CONTROL_LITERAL = re.compile(r"<\|[^\s<>|]{1,40}\|>|<｜[^\s<>]{1,40}｜>")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer with its chat template.

    `json_text` is the content of tokenizer.json as it was read, `named` the special tokens that
    templates see as variables (bos_token, eos_token, ...), `config` the tokenizer_config.json.
    """

    backend: tokenizers.Tokenizer = field(repr=False)
    json_text: str = field(repr=False)
    named: dict[str, str]
    template: ChatTemplate
    tool_template: ChatTemplate | None = None  # used instead of `template` when there are tools
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    further_eos_ids: tuple[int, ...] = ()  # of generation_config.json
    variables: dict[str, Any] = field(default_factory=dict)  # of the template, as the user set them
    memo: dict[str, Any] = field(default_factory=dict, repr=False)  # encoders, made once

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; control tokens in it are recognised, none is added."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`, without the control tokens unless `skip_special` is False."""
        return str(self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special))

    @cached_property
    def vocab_size(self) -> int:
        """The largest id + 1: how many rows an embedding needs."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def added(self) -> dict[str, int]:
        """Tokens that are cut out of a text before anything else is tokenised, blank ones aside."""
        found = self.backend.get_added_tokens_decoder()
        return {token.content: i for i, token in found.items() if token.content.strip()}

    @cached_property
    def flagged(self) -> dict[str, int]:
        """The added tokens that tokenizer.json calls special, and the named ones."""
        found = self.backend.get_added_tokens_decoder()
        special = {token.content for token in found.values() if token.special}
        special |= set(self.named.values())
        return {text: i for text, i in self.added.items() if text in special}

    @cached_property
    def control(self) -> dict[str, int]:
        """The added tokens that steer the model and that nobody's text may contain as tokens.

        These are the `flagged`, and what begins and ends turns, which some files do not flag.
        """
        borders = {END_OF_TEXT, "</s>", *self.dialect.borders}
        return {t: i for t, i in self.added.items() if t in self.flagged or t in borders}

    @cached_property
    def dialect(self) -> Dialect:
        """The template as tried out with the variables."""
        return Dialect(self, self.variables)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of `control`."""
        return frozenset(self.control.values())

    @cached_property
    def plain_backend(self) -> tokenizers.Tokenizer:
        """A second backend that takes control tokens for ordinary text."""
        content = json.loads(self.backend.to_str())
        for token in content["added_tokens"]:
            token["special"] = token["content"] in self.control
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
        backend.encode_special_tokens = True
        return backend

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

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids at which a reply ends: the template's stop tokens first, then every eos."""
        stops = [
            *(self.added[ending.stop] for ending in self.dialect.endings),
            self.eos_id,
            *self.further_eos_ids,
        ]
        return tuple(dict.fromkeys(i for i in stops if i is not None))

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

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the backend: worker processes build it again from the text."""
        fields = (self.json_text, self.named, self.template, self.tool_template, self.config)
        return _rebuild, (*fields, self.further_eos_ids)

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into `directory`."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = {k: v for k, v in self.config.items() if k not in ("chat_template", *NAMED_TOKENS)}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **config, **self.named}
        _write(folder / "tokenizer.json", self.json_text)
        _write(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False))
        _write(folder / "chat_template.jinja", self.template.source)
        if self.tool_template:
            (folder / "additional_chat_templates").mkdir(exist_ok=True)
            _write(folder / "additional_chat_templates/tool_use.jinja", self.tool_template.source)


def load_tokenizer(path: str | Path, chat_template: str | None = None) -> Tokenizer:
    """The tokenizer of the directory `path`.

    `chat_template` is None (the directory's own, else Whet's plain one), `plain`, `chatml` or the
    path of a file. Without a tokenizer.json a SentencePiece or tiktoken file is converted.
    Raises UserError if a file is missing or broken.
    """
    folder = Path(path)
    file, given = folder / "tokenizer.json", dict[str, str]()
    config = _read_json(folder / "tokenizer_config.json")
    if file.is_file():
        text = file.read_text(encoding="utf-8")
    elif (other := find_convertible(folder)) is not None:
        text, given, config = _converted(other, config)
    else:
        what = "is no directory" if not folder.is_dir() else "holds no tokenizer.json"
        raise UserError(f"{folder} {what}; expected a model or tokenizer directory")
    further = _eos_ids(folder)
    try:
        backend = _backend(text)
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{file} is no tokenizer.json: {error}") from None
    named = {**given, **_named_tokens(folder, config, backend, further)}
    _recognise(backend, named)
    if chat_template is None:
        template, tool_template = _own_templates(folder, config)
    else:
        template, tool_template = find_template(chat_template), None
    return Tokenizer(backend, text, named, template, tool_template, config, further)


def _converted(file: Path, config: dict[str, Any]) -> tuple[str, dict[str, str], dict[str, Any]]:
    """The text of a tokenizer.json made of `file`, the tokens that `file` names, and `config`,
    which says whether bos comes first, as libraries differ in what they take its silence for."""
    made = convert(file)
    if "bos_token" in made.named and config.get("add_bos_token") is None:
        config = {**config, "add_bos_token": True}
    return with_ends(made, {**made.named, **_said_names(config)}, config), made.named, config


def find_template(name: str) -> ChatTemplate:
    """The template `plain` or `chatml`, or the one in the file `name`."""
    file = Path(__file__).with_name(f"{name}.jinja") if name in BUILT_IN else Path(name)
    if not file.is_file():
        raise UserError(
            f"--chat_template {name}: no such file, and not one of {', '.join(BUILT_IN)}"
        )
    return ChatTemplate(file.read_text(encoding="utf-8"), str(name))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE learnt from `texts`, with the plain template.

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
    return Tokenizer(backend, backend.to_str(), {"eos_token": END_OF_TEXT}, find_template("plain"))


def add_chat_tokens(tokenizer: Tokenizer, chat_template: str) -> tuple[Tokenizer, list[str]]:
    """`tokenizer` with the template `chat_template` and the control tokens that this writes.

    Tokens such as `<|im_start|>` that the tokenizer lacks are added at the end of the vocabulary.
    Returns the new tokenizer and the added tokens; the model's embedding must grow to `vocab_size`.
    """
    template = find_template(chat_template)
    wanted = dict.fromkeys(CONTROL_LITERAL.findall(template.source))
    backend = _backend(tokenizer.json_text)
    _recognise(backend, tokenizer.named)
    new = [text for text in wanted if backend.token_to_id(text) is None]
    backend.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in new])
    text = backend.to_str() if new else tokenizer.json_text
    changed = replace(
        tokenizer, backend=backend, json_text=text, template=template, tool_template=None, memo={}
    )
    return changed, new


def _rebuild(json_text: str, named: dict[str, str], *rest: Any) -> Tokenizer:
    backend = _backend(json_text)
    _recognise(backend, named)
    return Tokenizer(backend, json_text, named, *rest)


def _recognise(backend: tokenizers.Tokenizer, named: dict[str, str]) -> None:
    """Let named tokens that are ordinary ones in tokenizer.json be cut out of texts, too, as
    transformers does: else `<s>` would be spelt with `<s` and `>`. None is given a new id."""
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing = [text for text in dict.fromkeys(named.values()) if text not in added]
    known = [text for text in missing if backend.token_to_id(text) is not None]
    backend.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in known])


def _backend(json_text: str) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_str(json_text)
    backend.no_truncation()  # some files carry a truncation, which would cut silently
    backend.no_padding()
    return backend


def _named_tokens(
    folder: Path, config: dict[str, Any], backend: tokenizers.Tokenizer, eos_ids: tuple[int, ...]
) -> dict[str, str]:
    found: dict[str, str] = {}
    for source in (_read_json(folder / "special_tokens_map.json"), config):
        found |= _said_names(source)
    if "eos_token" not in found:
        known = [backend.id_to_token(i) for i in eos_ids]
        known += [text for text in COMMON_EOS if backend.token_to_id(text) is not None]
        if known and known[0]:
            found["eos_token"] = known[0]
    return found


def _said_names(source: dict[str, Any]) -> dict[str, str]:
    """The named tokens of a file, each a text or an object; templates see all of them, as in
    transformers: `*_token`, and what `extra_special_tokens` holds if it is no list."""
    extra = source.get("extra_special_tokens")
    named = {name: value for name, value in source.items() if name.endswith("_token")}
    found = {}
    for name, value in {**named, **(extra if isinstance(extra, dict) else {})}.items():
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            found[name] = content
    return found


def _eos_ids(folder: Path) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        said = _read_json(folder / name).get("eos_token_id")
        if said is None:
            continue
        ids = said if isinstance(said, list) else [said]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise UserError(
                f"{folder / name}: eos_token_id is {said!r}; expected a token id or a list of them"
            )
        return tuple(ids)
    return ()


def _own_templates(
    folder: Path, config: dict[str, Any]
) -> tuple[ChatTemplate, ChatTemplate | None]:
    """The directory's template, and the one for tools if it has one of its own."""
    found: dict[str, str] = {}
    in_config = config.get("chat_template")
    if isinstance(in_config, dict):  # {"default": ..., "tool_use": ...}
        in_config = [{"name": name, "template": text} for name, text in in_config.items()]
    if isinstance(in_config, str):
        found["default"] = in_config
    elif isinstance(in_config, list) and all(map(_is_template_entry, in_config)):
        found.update({entry["name"]: entry["template"] for entry in in_config})
    elif in_config is not None:
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be a text or a list of "
            f"objects with the texts name and template, got {shown(in_config)}; mend it or give "
            "another with --chat_template"
        )
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[file.stem] = file.read_text(encoding="utf-8")
    file = folder / "chat_template.jinja"
    if file.is_file():
        found["default"] = file.read_text(encoding="utf-8")
    if found and "default" not in found:
        raise UserError(
            f"{folder}: has the chat templates {', '.join(found)}, but none is called default; "
            "give one with --chat_template"
        )
    if not found:
        return find_template("plain"), None
    tool_use = found.get("tool_use")
    name = f"{folder}: chat template"
    return ChatTemplate(found["default"], name), ChatTemplate(tool_use, name) if tool_use else None


def _is_template_entry(entry: Any) -> bool:
    """Whether it is as in `[{"name": "default", "template": ...}, ...]`."""
    texts = [entry.get("name"), entry.get("template")] if isinstance(entry, dict) else [None]
    return all(isinstance(text, str) for text in texts)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also nesting without end
        raise UserError(f"{file} is no valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object")
    return content


def _write(file: Path, text: str) -> None:
    with replaced(file) as aside:
        aside.write_text(text, encoding="utf-8")
