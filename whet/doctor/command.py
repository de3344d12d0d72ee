"""`whet doctor`: what Whet promises, tried on the user's own model, data and machine.

A table with one row for each claim: what was measured, the bound, and pass, fail or skipped with
the reason. Exit code 1 if anything fails.
"""

import dataclasses
import os
import platform
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from whet.chat.chat import load_tokenizer
from whet.chat.template import read_variables
from whet.data.layout import KINDS
from whet.data.store import PackedStore
from whet.doctor import numbers, runs, saving, stages, templates
from whet.doctor.subject import (
    Finding,
    Setting,
    Subject,
    failed,
    first_layers,
    read_conversations,
    sample_rows,
)
from whet.errors import UserError
from whet.files import replaced, write_json
from whet.flags.doctor import Config
from whet.hub import find_model
from whet.model.decoder import Transformer
from whet.model.open import load_backbone_from_ckpt
from whet.model.precision import multiplies_bf16
from whet.progress import say, track

Check = Callable[[Subject, Callable[[str], None]], Iterator[Finding]]

CHECKS: list[tuple[str, Check]] = [
    ("chat template", templates.certificate),
    ("packed file", templates.data_fit),
    ("packed rows", numbers.packed_equals_alone),
    ("saving", saving.saved_equals_loaded),
    ("export", saving.export_agrees),
    ("generation", numbers.cache_equals_none),
    ("preferences and rewards", stages.losses_and_samples),
]
PROCESS_CHECKS: list[tuple[str, Check]] = [("processes", runs.processes_agree)]


def main(config: Config) -> int:
    """`whet doctor`: 0 if nothing fails, 1 if anything does."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="whet-doctor-") as scratch:
        subject = admit(config, Path(scratch))
        _print_header(config, subject)
        checks = CHECKS + (PROCESS_CHECKS if config.processes else [])
        rows = examine(subject, checks)
    count = dict.fromkeys(("pass", "fail", "skipped"), 0)
    for row in rows:
        count[row["verdict"]] += 1
    seconds = time.monotonic() - started
    say(
        f"{count['pass']} passed, {count['fail']} failed, {count['skipped']} skipped "
        f"in {seconds:.0f} s"
    )
    if config.json is not None:
        content = {"machine": machine(), **_settings(config), **count, "claims": rows}
        with replaced(config.json) as aside:
            write_json(aside, content)
    return 1 if count["fail"] else 0


def admit(config: Config, scratch: Path) -> Subject:
    """Open model, tokenizer and data, and make the rows that the checks use."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device; --device cpu runs anywhere")
    path = find_model(config.model)
    store = PackedStore(config.data, KINDS) if config.data else None
    chat = None
    if config.tokenizer or (path / "tokenizer.json").is_file():
        variables = read_variables(config.template_kwargs)
        chat = load_tokenizer(config.tokenizer or path, config.chat_template, variables)
    data = read_conversations(config.conversations, config.format) if config.conversations else []
    if data and chat is None:
        raise UserError(f"--conversations: {path} has no tokenizer; add --tokenizer DIR")
    model = load_backbone_from_ckpt(path)
    if config.layers is not None and config.layers < model.config.n_layers:
        if not isinstance(model, Transformer):
            raise UserError("--layers: only Whet's own families can be cut; leave it out")
        model = first_layers(model, config.layers)
    vocabulary = model.config.vocab_size
    row_tokens = min(config.row_tokens, model.config.max_positions)
    rows = sample_rows(vocabulary, row_tokens, store, data, chat)
    largest = max(int(document.ids.max()) for row in rows for document in row)
    if largest >= vocabulary:
        raise UserError(
            f"--data or --conversations: holds the id {largest}, the model has {vocabulary} rows "
            "in its embedding; use the model's own tokenizer"
        )
    return Subject(model, chat, store, data, rows, row_tokens, settings(config), scratch)


def settings(config: Config) -> list[Setting]:
    """float32 on the CPU, and the user's own device and precision if these are others."""
    found = [Setting("float32 on CPU", torch.device("cpu"), None)]
    use_cuda = config.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda") if use_cuda else torch.device("cpu")
    half = config.precision == "bf16" or (config.precision == "auto" and multiplies_bf16(device))
    if use_cuda or half:
        name = f"{'bf16' if half else 'float32'} on {'CUDA' if use_cuda else 'CPU'}"
        found.append(Setting(name, device, torch.bfloat16 if half else None))
    return found


def examine(subject: Subject, checks: list[tuple[str, Check]]) -> list[dict[str, Any]]:
    """Run the checks, print each finding as it comes; the findings as plain values.

    A check that raises has failed, whatever it raises; the others go on.
    """
    rows: list[dict[str, Any]] = []
    with track("Examining", len(checks), "checks") as bar:
        for title, function in checks:

            def tell(what: str, title: str = title) -> None:
                bar.advance(0, f"{title}: {what}")

            bar.advance(0, title)
            started = time.monotonic()
            try:
                for finding in function(subject, tell):
                    seconds, started = time.monotonic() - started, time.monotonic()
                    rows.append({**dataclasses.asdict(finding), "seconds": round(seconds, 2)})
                    say(line(finding))
            except Exception as error:  # what is examined may break in any way
                finding = failed(f"{title}: the check came to its end", _cause(error))
                trace = traceback.format_exc()
                rows.append({**dataclasses.asdict(finding), "traceback": trace})
                say(line(finding))
            bar.advance(1)
    return rows


def line(finding: Finding) -> str:
    """A row of the table."""
    numbers = ""
    if finding.measured is not None and finding.bound is not None:
        numbers = f"{finding.measured:.2g} (at most {finding.bound:g})"
    return f"{finding.verdict:<8}{finding.claim:<52}{numbers:<26}{finding.note}".rstrip()


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _settings(config: Config) -> dict[str, str]:
    values = dataclasses.asdict(config)
    return {key: str(value) for key, value in values.items() if value is not None}


def _print_header(config: Config, subject: Subject) -> None:
    count = sum(p.numel() for p in subject.model.parameters())
    say(f"whet doctor: {config.model}, {count:,} parameters")
    sources = [str(path) for path in (config.data, config.conversations) if path]
    made = f"documents of {sources[0]}" if sources else "random tokens, as no data were given"
    say(f"  {len(subject.rows)} rows of {subject.row_tokens} tokens, made of {made}")
