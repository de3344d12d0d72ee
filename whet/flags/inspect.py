"""The flags of `whet inspect`."""

from dataclasses import dataclass
from typing import Annotated

from whet.config import PLACE, POSITIONAL, InputDir, OutputFile, PackedFile
from whet.files import unwritable


@dataclass(frozen=True)
class Config:
    """Show packed rows, or one conversation, with what is trained."""

    file: Annotated[PackedFile | None, POSITIONAL] = None
    """A packed file that `whet prepare` wrote, or any HDF5 file with tokens and loss_mask."""
    row: int | None = None
    """Show this row, from 0. Without --row and --rows: row 0, or a page of the first 1,000."""
    rows: str | None = None
    """Show rows A:B, from A up to but not including B; either may be left out."""
    html: OutputFile | None = None
    """Write one self-contained page to this file instead of printing rows."""
    conversation: Annotated[str | None, PLACE] = None
    """FILE.jsonl:LINE, counted from 1 (.json, .parquet: FILE:NUMBER of the record): show how this
    conversation is encoded. Needs --tokenizer."""
    tokenizer: InputDir | None = None
    """Model or tokenizer directory; for a packed file the one that it was prepared with."""
    chat_template: Annotated[str | None, PLACE] = None
    """plain, chatml or a jinja file, for --conversation; the tokenizer's own if not given."""
    template_kwargs: str | None = None
    """Further variables for that template: a JSON object, as '{"enable_thinking": false}'."""


def flaws(config: Config) -> list[str]:
    """Flags that do not go together."""
    found = []
    if (config.file is None) == (config.conversation is None):
        found.append("whet inspect: give a packed file, or --conversation FILE.jsonl:LINE")
    if config.conversation and not config.tokenizer:
        found.append("--conversation: needs --tokenizer DIR, whose template renders it")
    if (config.chat_template or config.template_kwargs) and not config.conversation:
        found.append(
            "--chat_template and --template_kwargs: a packed file is rendered already; "
            "they go with --conversation"
        )
    if config.row is not None and config.rows is not None:
        found.append("--row and --rows: give one of them")
    if config.conversation and (config.row is not None or config.rows is not None):
        found.append("--row and --rows: go with a packed file, not with --conversation")
    conversations = (config.conversation or "").rpartition(":")[0]
    if config.html is not None and conversations:
        found += unwritable("--html", config.html, [conversations, config.chat_template])
    return found
