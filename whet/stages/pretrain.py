"""Pretraining: a small base model from plain text.

The same loss as in fine-tuning, with weight 1 on every token: the model learns how texts go on. It
is here so that the whole path can be tried on a laptop, and for small models of one's own.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from whet.chat.chat import Chat, load_tokenizer
from whet.chat.tokenizer import train_tokenizer
from whet.config import problems
from whet.data.prepare import flaws, prepare_text, text_config
from whet.data.reader import parse, parse_source, read_units
from whet.data.store import PackedStore
from whet.files import unwritable
from whet.model.config import llama
from whet.model.decoder import Transformer, init_weights
from whet.model.hf.weights import PT
from whet.progress import track
from whet.stages.opening import describe
from whet.stages.packed import packed_stage
from whet.train.distributed import Ranks
from whet.train.session import continues, run_stage
from whet.train.settings import TrainSettings
from whet.train.stage import Documents, Stage

SMALLEST_VOCABULARY = 257
"""Of a byte-level tokenizer: the bytes and the end of a text."""
TOKENIZER_CHARACTERS = 50_000_000
"""Text that a new tokenizer is learnt from; more changes its merges hardly at all."""


@dataclass(kw_only=True)
class Inputs:
    """What pretraining starts from: a base of `Config` of its own, so that help begins with it."""

    data: tuple[str, ...]
    """Text files (.txt, or .jsonl with `text`; also .gz and .zst); FILE:WEIGHT repeats or thins."""
    tokenizer: Path | None = None
    """Tokenizer directory; by default a new byte-level BPE is learnt from the text."""


@dataclass(kw_only=True)
class Config(TrainSettings, Inputs):
    """Train a small base model on plain text."""

    vocab_size: int = 4096
    """Size of a new tokenizer."""
    dev_fraction: float = 0.02
    """Share of the rows that is held out for the dev loss; 0 for a text of a single row."""
    context_length: int = 512
    """Tokens of a row, and the positions of the model."""
    width: int = 256
    """Width of the model."""
    layers: int = 6
    """Number of layers."""
    heads: int = 4
    """Attention heads."""
    kv_heads: int | None = None
    """Key/value heads; by default as many as heads."""
    mlp_width: int | None = None
    """Width of the MLP; by default 8/3 of the width."""
    tied: bool = True
    """Use the embedding as the output head, too."""
    rope_theta: float = 10_000.0
    """Base of the rotary positions."""
    lr: float = 3e-3
    """Peak learning rate; small models bear more than large ones."""
    weight_decay: float = 0.1
    """Decoupled weight decay; norms, biases and embeddings have none."""


def prepare(config: Config, ranks: Ranks) -> Config:
    """Make tokenizer and packed files in the run folder, unless an earlier process did.

    Nothing is written before all of the text has been read: what is refused leaves no folder.
    """
    if _is_prepared(config):
        return config
    chat = _make_chat(config)
    prepare_text(
        config.data,
        chat,
        config.context_length,
        str(_packed(config)),
        dev_out=_dev_out(config),
        dev_fraction=config.dev_fraction,
        seed=config.seed,
        quiet=config.quiet,
    )
    chat.save(config.out / "tokenizer")
    return config


def _is_prepared(config: Config) -> bool:
    """Whether an earlier process of this run made the files. Without a config.toml it got no
    further, and it may have had other flags."""
    begun = continues(config) and (config.out / "config.toml").exists()
    dev = _packed_dev(config).exists() or not config.dev_fraction
    return begun and _packed(config).exists() and dev


def _packed(config: Config) -> Path:
    return config.out / "packed.h5"


def _packed_dev(config: Config) -> Path:
    return config.out / "packed_dev.h5"


def _dev_out(config: Config) -> str | None:
    return str(_packed_dev(config)) if config.dev_fraction else None


def _make_chat(config: Config) -> Chat:
    """The given tokenizer, or one learnt from the text."""
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer)
    with track("Learning a tokenizer", unit="texts", quiet=config.quiet) as progress:

        def counted() -> Iterator[str]:
            for text in texts_of(config.data):
                progress.advance()
                yield text

        return Chat(train_tokenizer(counted(), config.vocab_size))


def texts_of(data: tuple[str, ...], characters: int = TOKENIZER_CHARACTERS) -> Iterator[str]:
    """The texts of the files, up to so many characters in all."""
    left = characters
    for unit in itertools.chain.from_iterable(read_units(parse_source(d).path) for d in data):
        if left <= 0:
            return
        record = parse(unit)
        text = record.get("text") if isinstance(record, dict) else None
        if isinstance(text, str):
            left -= len(text)
            yield text


def build(config: Config, ranks: Ranks) -> Stage:
    """A random Transformer over the packed text."""
    chat = load_tokenizer(config.out / "tokenizer")
    store = PackedStore(_packed(config))
    has_dev = config.dev_fraction and _packed_dev(config).exists()
    dev = PackedStore(_packed_dev(config)) if has_dev else None
    model = Transformer(
        llama(
            chat.tokenizer.vocab_size,
            config.width,
            config.layers,
            config.heads,
            n_kv_heads=config.kv_heads,
            mlp_width=config.mlp_width,
            max_positions=config.context_length,
            theta=config.rope_theta,
            tied=config.tied,
        )
    )
    init_weights(model, config.seed)
    return packed_stage(
        config,
        ranks,
        model,
        chat,
        store,
        dev,
        lineage={"stage": "pretrain", "data": list(config.data)},
        header=[("model", f"new: {describe(model)}")],
    )


def check(config: Config) -> None:
    """Refuse sizes that make no model, and files that are not there, all at once."""
    found = []
    for name in ("width", "layers", "heads"):
        if getattr(config, name) < 1:
            found.append(f"--{name} {getattr(config, name)}: expected a number above 0")
    if config.heads > 0 and config.width % (2 * config.heads):
        found.append(f"--width {config.width}: must be a multiple of 2 x --heads {config.heads}")
    if config.kv_heads is not None and (config.kv_heads < 1 or config.heads % config.kv_heads):
        found.append(f"--kv_heads {config.kv_heads}: must divide --heads {config.heads}")
    if config.tokenizer is None and config.vocab_size < SMALLEST_VOCABULARY:
        least = f"expected at least {SMALLEST_VOCABULARY}: the bytes and the end of a text"
        found.append(f"--vocab_size {config.vocab_size}: {least}")
    if not _is_prepared(config):
        found += flaws(
            text_config(
                config.data,
                config.context_length,
                str(_packed(config)),
                dev_out=_dev_out(config),
                dev_fraction=config.dev_fraction,
                seed=config.seed,
            )
        )
        if config.tokenizer is not None and not config.tokenizer.is_dir():
            found.append(f"--tokenizer {config.tokenizer}: is no directory")
    if config.out_ckpt is not None:
        others = [*config.data, config.tokenizer, config.out]
        found += unwritable("--out_ckpt", config.out_ckpt, others, PT)
    problems(found)


def documents(config: Config) -> Documents:
    """What the ledger of a run with these settings names."""
    return PackedStore(_packed(config))


def main(config: Config) -> int:
    """`whet pretrain`."""
    check(config)
    return run_stage(config, "pretrain", build, prepare)
