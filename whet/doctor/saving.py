"""What is saved is what was there: opened again by Whet, and by transformers."""

import math
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from whet.doctor.subject import Finding, Subject, judge, skipped, worse
from whet.model.decoder import Transformer
from whet.model.foreign_files import quiet_transformers
from whet.model.hf.families import OWN_LAYOUT
from whet.model.open import load_backbone_from_ckpt

EXPORT_BOUND = 1e-4
"""Relative norm of the difference of logits: another code that rounds differently."""


def saved_equals_loaded(subject: Subject, tell: Callable[[str], None]) -> Iterator[Finding]:
    """Save -> load -> the same logits, to the last bit."""
    expected = logits(subject.model.cpu(), subject)
    found = logits(load(subject.saved_model()), subject)
    worst = reduce(
        worse, (float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    )
    yield judge("saved and loaded: the same logits", worst, 0.0, "model directory")


def load(path: Any) -> Transformer:
    """Open what was saved."""
    return load_backbone_from_ckpt(path, quiet=True)


@torch.no_grad()
def logits(model: Any, subject: Subject) -> list[Tensor]:
    """(n, V) float32 of the first documents, each alone."""
    found = []
    for document in subject.documents[:4]:
        out = model(torch.from_numpy(document.ids)[None])
        found.append(getattr(out, "logits", out)[0].float())
    return found


def export_agrees(subject: Subject, tell: Callable[[str], None]) -> Iterator[Finding]:
    """transformers opens the saved directory and computes and tokenises the same."""
    opens, same_ids = "transformers computes the same logits", "transformers tokenises the same"
    if why := _no_transformers(subject):
        yield from skipped(why, opens, same_ids)
        return
    transformers = quiet_transformers()
    directory, version = str(subject.saved_model()), f"transformers {transformers.__version__}"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)
    found = logits(theirs.float().eval(), subject)
    del theirs
    expected = logits(subject.model.cpu(), subject)
    pairs = list(zip(found, expected, strict=True))
    worst = math.sqrt(sum(float((a - b).norm()) ** 2 for a, b in pairs))
    worst /= math.sqrt(sum(float(b.norm()) ** 2 for _, b in pairs)) or 1.0
    yield judge(opens, worst, EXPORT_BOUND, version)
    if subject.chat is None:
        yield from skipped("the model has no tokenizer", same_ids)
        return
    other = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    tokenizer = subject.chat.tokenizer
    texts = [tokenizer.decode(d.ids, skip_special=False) for d in subject.documents]
    different = sum(
        other.encode(text, add_special_tokens=False) != tokenizer.encode(text) for text in texts
    )
    yield judge(same_ids, different, 0, f"{len(texts)} texts, {version}")


def _no_transformers(subject: Subject) -> str:
    """Why transformers cannot be asked, or nothing."""
    if subject.model.config.family == OWN_LAYOUT:
        return "no family of transformers computes this model"
    try:
        quiet_transformers()
    except ImportError:
        return "transformers is not installed; Whet's own reader is compared above"
    return ""
