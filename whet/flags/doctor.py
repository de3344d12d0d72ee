"""The flags of `whet doctor`."""

from dataclasses import dataclass
from typing import Annotated

from whet.config import (
    PLACE,
    InputDir,
    InputFile,
    OutputFile,
    PackedFile,
    Place,
    With,
    at_least,
    from_1,
    in_folder,
)
from whet.flags.choices import Device, Precision
from whet.hub import known_model


@dataclass
class Config:
    """Prove what Whet promises, on your own model, data and machine."""

    model: Annotated[Place, known_model]
    """Model directory, `.pt` file, or owner/model on the Hub."""
    data: PackedFile | None = None
    """Packed file made by `whet prepare`."""
    conversations: InputFile | None = None
    """The conversations themselves: their template is examined."""
    format: Annotated[str | None, With("conversations")] = None
    """Format of --conversations; by default it is recognised."""
    tokenizer: InputDir | None = None
    """Tokenizer directory; by default the model's own."""
    chat_template: Annotated[str | None, PLACE] = None
    """chatml, plain or a file; by default the model's own."""
    template_kwargs: str | None = None
    """Variables of the chat template as a JSON object; default: those of the training data."""
    layers: Annotated[int | None, from_1] = None
    """Examine the first so many layers only, where the model is too large for this machine."""
    row_tokens: Annotated[int, at_least(24)] = 192
    """Length of the rows that are made of the documents."""
    processes: bool = True
    """Also train a few steps in processes of their own: ranks, kill and resume."""
    precision: Precision = "auto"
    """The precision you train in: checked beside float32."""
    device: Device = "auto"
    """Where you train: checked beside the CPU."""
    json: Annotated[OutputFile | None, in_folder] = None
    """Also write the table here."""
