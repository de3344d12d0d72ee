"""A tokenizer and the chat template that writes for it, with the template's variables and date.

What is rendered, which tokens are control tokens and where a reply stops depend on the vocabulary,
the template, its variables and the date together. So they stand together here, and travel together.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from whet.chat.calls import CallForm, find_form
from whet.chat.conversation import shown
from whet.chat.dialect import Dialect
from whet.chat.hidden import Joints, pattern_of
from whet.chat.template import TAKEN, ChatTemplate, check_names
from whet.chat.tokenizer import END_OF_TEXT, Tokenizer, read_tokenizer
from whet.errors import UserError
from whet.files import read_text, write_text

BUILT_IN = ("plain", "chatml")
DEFAULT = re.compile(r"\{%- if (\w+) is not defined %\}\{%- set \1 = (.*) %\}\{%- endif %\}\n")
"""How a template sets a variable that nobody else sets: at its beginning, a line for each."""
DATE = "chat_template_date"
"""In tokenizer_config.json: the date that a template which asks for it was trained with."""
ANOTHER_TEMPLATE = "another chat template"
CONTROL_LITERAL = re.compile(r"<\|[^\s<>|]{1,40}\|>|<｜[^\s<>]{1,40}｜>")


def find_template(name: str) -> ChatTemplate:
    """The template `plain` or `chatml`, or the one in the file `name`."""
    file = Path(__file__).with_name(f"{name}.jinja") if name in BUILT_IN else Path(name)
    if not file.is_file():
        raise UserError(
            f"--chat_template {name}: no such file, and not one of {', '.join(BUILT_IN)}"
        )
    return ChatTemplate(read_text(file), str(name))


@dataclass(frozen=True, eq=False)
class Chat:
    """A tokenizer with its chat template, and what the template is rendered with.

    `variables` are the template's own, such as enable_thinking; `today` is what it gets as date.
    """

    tokenizer: Tokenizer
    template: ChatTemplate = field(default_factory=lambda: find_template("plain"))
    tool_template: ChatTemplate | None = None  # used instead of `template` when there are tools
    variables: dict[str, Any] = field(default_factory=dict)
    today: date = field(default_factory=date.today)
    memo: dict[str, Any] = field(
        default_factory=dict, init=False, repr=False
    )  # encoders, made once; `stop_ids` that a packed file has recorded

    @property
    def templates(self) -> list[ChatTemplate]:
        """The template, and the one for tools if there is one."""
        return [template for template in (self.template, self.tool_template) if template]

    @cached_property
    def dialect(self) -> Dialect:
        """What the template does with conversations, found by trying it with the variables."""
        parts = (self.template, self.tool_template, self.variables, self.today)
        return Dialect(self.tokenizer, *parts)

    @cached_property
    def control(self) -> dict[str, int]:
        """The added tokens that steer the model and that nobody's text may contain as tokens.

        These are the `flagged`, and what begins and ends turns, which some files do not flag.
        """
        flagged = self.tokenizer.flagged
        borders = {END_OF_TEXT, "</s>", *self.dialect.borders}
        return {t: i for t, i in self.tokenizer.added.items() if t in flagged or t in borders}

    @cached_property
    def control_pattern(self) -> re.Pattern[str] | None:
        """Finds the strings of `control` in a text."""
        return pattern_of(self.control)

    @cached_property
    def joints(self) -> Joints:
        """Tells which texts a template could make control strings of."""
        return Joints(self.control, " ".join(t.source for t in self.templates))

    @cached_property
    def alternatives(self) -> list[tuple[dict[str, Any], "Chat"]]:
        """Settings of one template variable each that change what is rendered, with their chats.

        The variables are those that the template reads, their values True, False and what the
        template compares them with. No two settings render the same.
        """
        seen, found = [self.dialect.sample()], []
        for name in sorted(self.template.variables - TAKEN - set(self.tokenizer.named)):
            constants = self.template.compared.get(name, frozenset())
            for value in (False, True, *sorted(constants - {False, True}, key=str)):
                chat = replace(self, variables={**self.variables, name: value})
                if (sample := chat.dialect.sample()) not in seen:
                    seen.append(sample)
                    found.append(({name: value}, chat))
        return found

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of `control`."""
        return frozenset(self.control.values())

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids at which a reply ends: the template's stop tokens first, then every eos."""
        if "stop_ids" in self.memo:
            return tuple(self.memo["stop_ids"])
        stops = [self.tokenizer.added[ending.stop] for ending in self.dialect.endings]
        return tuple(dict.fromkeys([*stops, *self.tokenizer.eos_ids]))

    @cached_property
    def call_form(self) -> CallForm | None:
        """How the template writes tool calls, if they can be read back from a reply."""
        return find_form(self.dialect)

    @cached_property
    def plain_backend(self) -> tokenizers.Tokenizer:
        """The tokenizer's backend, but control tokens are ordinary text to it."""
        content = json.loads(self.tokenizer.backend.to_str())
        for token in content["added_tokens"]:
            token["special"] = token["content"] in self.control
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
        backend.encode_special_tokens = True
        return backend

    def with_variables(self, variables: dict[str, Any], today: str | None = None) -> "Chat":
        """This chat with `variables` over its own, and perhaps another date, as 2025-12-31.

        Raises UserError for a variable that no template of it reads, and for what is no date.
        """
        check_names(variables, "--template_kwargs")
        known = frozenset().union(*(t.variables for t in self.templates))
        unknown = sorted(variables.keys() - known)
        if unknown:
            some = sorted(known - TAKEN - set(self.tokenizer.named))
            reads = f"it reads {', '.join(some)}" if some else "it reads none"
            raise UserError(
                f"--template_kwargs: the chat template reads no variable {', '.join(unknown)}; "
                f"{reads}"
            )
        if named := sorted(variables.keys() & self.tokenizer.named.keys()):
            raise UserError(
                f"--template_kwargs: {', '.join(named)} is the tokenizer's own; change it in "
                "tokenizer_config.json"
            )
        date_given = read_date(today) if today else self.today
        return replace(self, variables={**self.variables, **variables}, today=date_given)

    def settled(self) -> "Chat":
        """The same chat, but its templates themselves set the variables where nobody else does.

        So they travel with the template, and every engine that reads it asks as Whet has trained.
        """
        if not self.variables:
            return self
        tool = self.tool_template and _with_defaults(self.tool_template, self.variables)
        template = _with_defaults(self.template, self.variables)
        return replace(self, template=template, tool_template=tool, variables={})

    def as_dict(self) -> dict[str, str | None]:
        """What conversations are rendered with, besides the tokenizer: for a packed file."""
        chat = self.settled()
        dated = any("strftime_now" in template.source for template in self.templates)
        return {
            "template": chat.template.source,
            "tool_template": chat.tool_template.source if chat.tool_template else None,
            "date": self.today.isoformat() if dated else None,
        }

    def record(self) -> dict[str, Any]:
        """For a packed file: `as_dict`, and the stop ids with the hash of what they follow from."""
        return {**self.as_dict(), "stop_ids": list(self.stop_ids), "hash": self.hash}

    @property
    def hash(self) -> str:
        """sha256 of all that rendering and its tokens depend on, and so `stop_ids`."""
        tokenizer = self.tokenizer
        parts = [tokenizer.hash, tokenizer.named, tokenizer.eos_ids, self.as_dict()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def rendering_as(self, recorded: dict[str, Any], where: str) -> "Chat":
        """This tokenizer with what `record` has recorded in `where`.

        Stop ids that are recorded of this very chat are taken, without trying the template again.
        """
        texts = [recorded.get("template"), recorded.get("tool_template") or ""]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where}: its attribute chat holds no template; prepare it again")
        template, tool = (ChatTemplate(str(text), f"{where}: chat template") for text in texts)
        today = read_date(recorded["date"]) if recorded.get("date") else self.today
        chat = Chat(self.tokenizer, template, tool if tool.source else None, {}, today)
        stops, ids = recorded.get("stop_ids"), range(self.tokenizer.vocab_size)
        known = isinstance(stops, list) and all(type(i) is int and i in ids for i in stops)
        if known and recorded.get("hash") == chat.hash:
            chat.memo["stop_ids"] = stops
        return chat

    def difference(self, other: "Chat") -> str:
        """How its templates and what they set differ from those of `other`; "" if they do not."""
        found = [
            defaults_of(str(chat.as_dict()[key]))
            for chat in (self, other)
            for key in ("template", "tool_template")
        ]
        mine, my_tools, theirs, their_tools = found
        if (mine[1], my_tools[1]) != (theirs[1], their_tools[1]):
            return ANOTHER_TEMPLATE
        if mine[0] == theirs[0]:
            return ""
        sets = [", ".join(f"{k} = {v}" for k, v in d[0].items()) or "none" for d in (mine, theirs)]
        return f"the template variables {sets[0]} instead of {sets[1]}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without what was found out by trying the template."""
        parts = (self.tokenizer, self.template, self.tool_template, self.variables, self.today)
        return Chat, parts

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer's files and chat_template.jinja into `directory`."""
        folder = Path(directory)
        said = self.as_dict()
        config = {k: v for k, v in self.tokenizer.config.items() if k != DATE}
        config |= {DATE: said["date"]} if said["date"] else {}
        replace(self.tokenizer, config=config).save(folder)
        write_text(folder / "chat_template.jinja", str(said["template"]))
        if said["tool_template"]:
            (folder / "additional_chat_templates").mkdir(exist_ok=True)
            write_text(folder / "additional_chat_templates/tool_use.jinja", said["tool_template"])


def load_tokenizer(
    path: str | Path,
    chat_template: str | None = None,
    template_kwargs: dict[str, Any] | None = None,
) -> Chat:
    """The tokenizer of the directory `path` with its chat template.

    `chat_template` is None (the directory's own, else Whet's plain one), `plain`, `chatml` or the
    path of a file. `template_kwargs` are variables of it, over those that it sets itself. Raises
    UserError if a file is missing or broken.
    """
    return read_chat(path, chat_template).with_variables(template_kwargs or {})


def read_chat(path: str | Path, chat_template: str | None = None) -> Chat:
    """The same, but nobody has looked into the template: another may be put in its place."""
    tokenizer = read_tokenizer(path)
    if chat_template is not None:
        chat = Chat(tokenizer, find_template(chat_template))
    else:
        chat = Chat(tokenizer, *_own_templates(Path(path), tokenizer.config))
    day = tokenizer.config.get(DATE)
    return replace(chat, today=read_date(day)) if day else chat


def defaults_of(source: str) -> tuple[dict[str, str], str]:
    """The variables that a template sets where nobody else does, as jinja writes their values, and
    the rest of the template."""
    found: dict[str, str] = {}
    while line := DEFAULT.match(source):
        found[line[1]] = line[2]
        source = source[line.end() :]
    return found, source


def _with_defaults(template: ChatTemplate, variables: dict[str, Any]) -> ChatTemplate:
    found, rest = defaults_of(template.source)
    found |= {name: _literal(value) for name, value in variables.items()}
    lines = [
        f"{{%- if {name} is not defined %}}{{%- set {name} = {value} %}}{{%- endif %}}\n"
        for name, value in found.items()
    ]
    return ChatTemplate("".join(lines) + rest, template.name)


def _literal(value: Any) -> str:
    """A JSON value as jinja writes it: the same, but for null."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_literal(k)}: {_literal(v)}' for k, v in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def read_date(text: str) -> date:
    """A date such as 2025-12-31. Raises UserError for anything else."""
    try:
        return date.fromisoformat(text)
    except (TypeError, ValueError):
        raise UserError(f"--date {text}: expected a date such as 2025-12-31") from None


def add_chat_tokens(chat: Chat, chat_template: str) -> tuple[Chat, list[str]]:
    """`chat` with the template `chat_template` and the control tokens that this writes.

    Tokens such as `<|im_start|>` that the tokenizer lacks are added at the end of the vocabulary.
    Returns the new chat and the added tokens; the model's embedding must grow to `vocab_size`.
    """
    template = find_template(chat_template)
    wanted = dict.fromkeys(CONTROL_LITERAL.findall(template.source))
    new = [text for text in wanted if chat.tokenizer.backend.token_to_id(text) is None]
    tokenizer = chat.tokenizer.with_tokens(new)
    return replace(chat, tokenizer=tokenizer, template=template, tool_template=None), new


def _own_templates(
    folder: Path, config: dict[str, Any]
) -> tuple[ChatTemplate, ChatTemplate | None]:
    """The directory's template, and the one for tools if it has one of its own."""
    said: Any = config.get("chat_template") or {}
    try:
        if isinstance(said, list):  # [{"name": "default", "template": ...}, ...]
            said = {entry["name"]: entry["template"] for entry in said}
        found = {"default": said} if isinstance(said, str) else {**said}
        if not all(isinstance(text, str) for text in (*found, *found.values())):
            raise TypeError("no text")
    except (TypeError, KeyError):
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be a text or a list of "
            f"objects with the texts name and template, got {shown(config['chat_template'])}; mend "
            "it, or prepare and train with another --chat_template"
        ) from None
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[file.stem] = read_text(file)
    file = folder / "chat_template.jinja"
    if file.is_file():
        found["default"] = read_text(file)
    if found and "default" not in found:
        raise UserError(
            f"{folder}: has the chat templates {', '.join(found)}, but none is called default; "
            "name one so, or prepare and train with a --chat_template"
        )
    if not found:
        return find_template("plain"), None
    tool_use = found.get("tool_use")
    name = f"{folder}: chat template"
    return ChatTemplate(found["default"], name), ChatTemplate(tool_use, name) if tool_use else None
