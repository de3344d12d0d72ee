"""The flags of `whet inspect`."""

from dataclasses import dataclass
from typing import Annotated

from whet.config import PLACE, POSITIONAL, InputDir, OutputFile, PackedFile


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
