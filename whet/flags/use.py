"""The flags that commands share which use a trained model."""

from dataclasses import dataclass
from typing import Annotated

from whet.config import InputDir, InputFile, With, from_1
from whet.flags.choices import Device, Precision

GSM8K = With("gsm8k")


@dataclass(kw_only=True)
class Where:
    """Machine."""

    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """Precision of the weights; auto: bf16 on CUDA, else float32, which is the more exact. A CPU
    that multiplies bf16 answers about twice as fast in it."""


@dataclass(kw_only=True)
class Asked(Where):
    """How the model is asked."""

    tokenizer: InputDir | None = None
    """Tokenizer directory; default: the model's own."""
    template_kwargs: str | None = None
    """Variables of the chat template as a JSON object; default: those of the training data."""


@dataclass(kw_only=True)
class Problems:
    """Word problems."""

    gsm8k: InputFile | None = None
    """Problems to answer: GSM8K's test.jsonl, SVAMP, or other questions with a number as answer."""
    limit: Annotated[int | None, from_1, GSM8K] = None
    """Only the first so many problems."""
    max_new_tokens: Annotated[int, from_1, GSM8K] = 256
    """Longest reply."""
    batch_size: Annotated[int, from_1, GSM8K] = 32
    """Problems that are answered at once."""
