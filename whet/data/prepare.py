"""`whet prepare`: conversations -> the packed file with its loss mask, nothing lost uncounted.

    files -> blocks of records -> workers: parse, encode -> spool -> select -> pack -> rows

Memory does not grow with the input: records pass through in blocks, tokens wait in a temporary
file, and only a few numbers for each conversation stay. The output is the same, byte for byte, for
any number of workers.
"""

import dataclasses
import hashlib
import json
import time
from contextlib import closing
from pathlib import Path

import numpy as np

from whet.chat.certificate import Refusal
from whet.chat.chat import Chat, add_chat_tokens, load_tokenizer
from whet.chat.conversation import Origin
from whet.chat.encode import EncodeOptions
from whet.chat.template import read_variables
from whet.config import check, problems
from whet.data.account import SourceAccount, accounts_of, table, totals
from whet.data.decontaminate import Evaluations, read_evaluations
from whet.data.encoding import KIND_NAMES, BlockEncoder
from whet.data.formats import FIELDS
from whet.data.layout import KINDS
from whet.data.left_out import fates, notes, records, stop_at_overlong, stop_at_refusals
from whet.data.mixing import KEPT, select
from whet.data.parallel import ordered_map, start_server, usable_cores
from whet.data.reader import Source, parse_sources, read_blocks
from whet.data.record import read_fields
from whet.data.writing import Spool, Tables, write_packed
from whet.errors import UserError
from whet.files import nearest
from whet.flags.prepare import Config, flaws
from whet.hub import find_model
from whet.progress import count, say, track

SMALL_BYTES = 8 << 20
"""Below this size of all input, starting worker processes takes longer than they save."""


def main(config: Config) -> int:
    """Run the command; returns the exit code."""
    try:
        prepare(config)
    except KeyboardInterrupt:
        say("interrupted; nothing was written")
        return 130
    return 0


def prepare(config: Config, quiet: bool = False) -> list[SourceAccount]:
    """Write `config.out` (and `config.dev_out`); returns the token account of `config.out`.

    Raises UserError, with nothing written, for bad flags, files or lines.
    """
    sources = examine(config)
    if _workers(config, sources):
        start_server(BlockEncoder)  # it starts while the tokenizer is loaded
    directory = find_model(config.tokenizer, quiet=quiet, weights=False)
    check_positions(directory, config.context_length)
    chat = load_tokenizer(directory, config.chat_template)
    if config.chat_template:
        chat, added = add_chat_tokens(chat, config.chat_template)
        if added and not quiet:
            say(f"added to the vocabulary: {', '.join(added)}; give whet sft the same")
            say(f"--chat_template {config.chat_template}, so that the model gets their embeddings")
    chat = chat.with_variables(read_variables(config.template_kwargs), config.date).settled()
    evaluations = read_evaluations(config.decontaminate) if config.decontaminate else None
    return _prepare(config, sources, chat, evaluations, quiet=quiet)


def prepare_text(config: Config, chat: Chat, quiet: bool = False) -> list[SourceAccount]:
    """Plain text (`.txt`, or records with `text` or `ids`) -> a packed file, every token trained.

    `config.tokenizer` is GIVEN: it is that of `chat`. What is longer than a row is cut into rows,
    no token lost. A row's first token has nothing before it and counts as context. Raises UserError
    for records that are conversations.
    """
    return _prepare(config, examine(config), chat, None, text_only=True, quiet=quiet)


def examine(config: Config) -> list[Source]:
    """The sources; raises UserError with all that is wrong with the flags, before they are read."""
    check(config, flaws(config))
    return parse_sources(config.data)


def _prepare(
    config: Config,
    sources: list[Source],
    chat: Chat,
    evaluations: Evaluations | None,
    *,
    text_only: bool = False,
    quiet: bool = False,
) -> list[SourceAccount]:
    config = dataclasses.replace(config, date=config.date or chat.today.isoformat())
    encoder = BlockEncoder(
        chat=chat,
        options=EncodeOptions(config.train_on, config.rewritten_turns, config.special_in_content),
        paths=tuple(source.path for source in sources),
        context_length=config.context_length,
        format=config.format,
        fields=read_fields(config.fields, FIELDS),
        evaluations=evaluations,
        text_only=text_only,
    )
    with closing(Spool(nearest(Path(config.out).parent))) as spool:
        _encode(spool, encoder, sources, _workers(config, sources), quiet)
        stop_at_refusals(spool, config.refused, has_flag=not text_only)
        for name in (of_file or name for name, of_file in encoder.fields.items()):
            if not spool.renamed[name]:
                raise UserError(f"--fields {config.fields}: no record has a field {name}")
        arrays = spool.tables()
        _check_one_kind(arrays[0], encoder.paths)
        selection = select(*arrays, config, [source.weight for source in sources])
        tables = Tables(config, encoder.paths, spool, *arrays, selection)
        left_out = records(tables, evaluations)
        if config.overlong == "error":
            stop_at_overlong(tables, left_out)
        accounts = _write(tables, sources, chat, left_out, quiet)
        if not quiet and not text_only:
            _say_what_is_next(config, tables.kind)
        return accounts


def _check_one_kind(conversations: np.ndarray, paths: tuple[str, ...]) -> None:
    """Raise UserError for a mixture of texts, pairs and labelled replies: no command trains it."""
    kinds, first = np.unique(conversations["kind"], return_index=True)
    if len(kinds) > 1:
        firsts = [Origin(paths[c["source"]], int(c["line"])) for c in conversations[first]]
        found = [
            f"{at.where} is of {KIND_NAMES[kind]} ({KINDS[KIND_NAMES[kind]]})"
            for kind, at in zip(kinds, firsts, strict=True)
        ]
        problems([*found, "a packed file holds one kind: prepare them apart, or see --format"])


def check_positions(directory: Path, context_length: int) -> None:
    """Raise UserError if the model in `directory` has fewer positions than rows would have."""
    try:
        found = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        found = found.get("text_config", found)
        positions = [found.get(name) for name in ("max_position_embeddings", "n_positions")]
    except (OSError, ValueError, AttributeError):
        return  # no model, or one that `whet sft` says more about
    for most in positions:
        if type(most) is int and most < context_length:
            raise UserError(
                f"--context_length {context_length}: the model in {directory} has {most:,} "
                f"positions; take --context_length {most} or less"
            )


def _say_what_is_next(config: Config, kind: str) -> None:
    """The commands that usually follow."""
    files = f"--data {config.out}" + (f" --dev {config.dev_out}" if config.dev_out else "")
    files += f" --chat_template {config.chat_template}" if config.chat_template else ""
    command = {"text": "sft", "preferences": "dpo", "labels": "dpo --loss kto"}[kind]
    say(f"next: whet inspect {config.out}")
    say(f"      whet {command} --model {config.tokenizer} {files} --out runs/{command.split()[0]}")


def _workers(config: Config, sources: list[Source]) -> int:
    """Processes that encode; by default none for little input, whose size must be known for it."""
    if config.workers is not None:
        return config.workers
    sizes = [source.size for source in sources]
    return usable_cores() if sum(sizes) > SMALL_BYTES or not all(sizes) else 0


def _encode(
    spool: Spool, encoder: BlockEncoder, sources: list[Source], workers: int, quiet: bool
) -> None:
    """Read and encode everything into `spool`."""
    size = sum(source.size for source in sources)
    exact = all(s.path.endswith((".jsonl", ".json", ".txt")) for s in sources)
    total = size / 1e6 if exact else None
    results = ordered_map(encoder, read_blocks(sources), workers)
    with track("Encoding", total, "MB", quiet) as progress:
        tokenizer = encoder.chat.tokenizer
        _ = tokenizer.hash, tokenizer.vocab_size  # while the workers start
        started = time.monotonic()
        for block in results:
            spool.add(block)
            rate = spool.n_tokens / max(time.monotonic() - started, 1e-9)
            note = f"{spool.n_tokens:,} tokens, {rate:,.0f} tokens/s"
            refused = spool.refused.total()
            progress.advance(block.size / 1e6, f"{note}, {refused:,} refused" if refused else note)


def _write(
    tables: Tables, sources: list[Source], chat: Chat, left_out: list[Refusal], quiet: bool
) -> list[SourceAccount]:
    """Write the dev file, if one is wanted, and the training file; print their accounts."""
    config = tables.config
    written = tables.selection.fate == KEPT
    outputs = [(config.dev_out, tables.selection.dev)] if config.dev_out else []
    outputs.append((config.out, ~tables.selection.dev))
    for path, side in reversed(outputs):
        if not (written & side & (tables.trained > 0)).any():
            empty = f"--data: no record in {', '.join(tables.paths)}"
            if refusals := tables.spool.refusals:
                n = tables.spool.refused.total()
                empty = f"{count(n, 'lines')} refused, such as {refusals[0].message}"
            reason = fates(tables) or empty
            what = "to train on" if path == config.out else f"for --dev_out {path}"
            raise UserError(f"nothing is left {what}: {reason}")
    tokenizer = chat.tokenizer
    pad_id = next((i for i in (tokenizer.pad_id, tokenizer.eos_id) if i is not None), 0)
    attrs = {
        "vocab_size": tokenizer.vocab_size,
        "pad_id": pad_id,
        "tokenizer_hash": tokenizer.hash,
        "template_hash": chat.template.hash,
        "chat": chat.record(),
        "sources": list(tables.paths),
        "source_sha256": [_sha256(path) for path in tables.paths],
        "settings": {k: v for k, v in dataclasses.asdict(config).items() if k != "workers"},
    }
    accounts: list[SourceAccount] = []
    for path, side in outputs:
        training = path == config.out
        accounts = accounts_of(sources, tables, np.flatnonzero(side), training=training)
        total = totals(accounts)
        account = {"sources": [vars(a) for a in accounts], "total": vars(total)}
        chosen, refusals = np.flatnonzero(side & written), left_out if training else []
        own = {**attrs, "account": account}
        n_rows = write_packed(path or "", tables, chosen, own, refusals, quiet)
        if not quiet:
            filled = (total.trained + total.context) / (n_rows * config.context_length)
            say(f"{path}: {count(n_rows, 'rows')} of {config.context_length}, {filled:.2%} filled")
            say(table(accounts))
    if not quiet:
        for line in notes(tables, left_out):
            say(line)
    return accounts


def _sha256(path: str) -> str:
    """The hash of a source's content, empty where it is not a file."""
    if not Path(path).is_file():
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
