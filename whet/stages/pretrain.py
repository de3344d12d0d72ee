"""Pretraining: a small base model from plain text.

The same loss as in fine-tuning, with weight 1 on every token: the model learns how texts go on. It
is here so that the whole path can be tried on a laptop, and for small models of one's own.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from whet.chat.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from whet.config import problems
from whet.data.prepare import prepare_text
from whet.data.reader import parse, parse_source, read_units
from whet.data.store import PackedStore
from whet.model.config import llama
from whet.model.decoder import Transformer, init_weights
from whet.progress import track
from whet.stages import sft
from whet.train.distributed import Ranks
from whet.train.loop import Stage
from whet.train.session import continues, run_stage
from whet.train.settings import TrainSettings

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
    """Share of the documents that is held out for the dev loss; one document alone is not split."""
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

    The packed files are written last and under their names only when complete. Without a
    config.toml, an earlier process got no further, and it may have had other flags.
    """
    packed, dev = _packed(config), _packed_dev(config)
    begun = continues(config) and (config.out / "config.toml").exists()
    if begun and packed.exists() and (dev.exists() or not config.dev_fraction):
        return config
    config.out.mkdir(parents=True, exist_ok=True)
    prepare_text(
        config.data,
        _make_tokenizer(config),
        config.context_length,
        str(packed),
        dev_out=str(dev) if config.dev_fraction else None,
        dev_fraction=config.dev_fraction,
        seed=config.seed,
        quiet=config.quiet,
    )
    return config


def _packed(config: Config) -> Path:
    return config.out / "packed.h5"


def _packed_dev(config: Config) -> Path:
    return config.out / "packed_dev.h5"


def _make_tokenizer(config: Config) -> Tokenizer:
    """The given tokenizer, or one learnt from the text; kept in the run folder."""
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
    else:
        with track("Learning a tokenizer", unit="texts", quiet=config.quiet) as progress:

            def counted() -> Iterator[str]:
                for text in texts_of(config.data):
                    progress.advance()
                    yield text

            tokenizer = train_tokenizer(counted(), config.vocab_size)
    tokenizer.save(config.out / "tokenizer")
    return tokenizer


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
    tokenizer = load_tokenizer(config.out / "tokenizer")
    store = PackedStore(_packed(config))
    has_dev = config.dev_fraction and _packed_dev(config).exists()
    dev = PackedStore(_packed_dev(config)) if has_dev else None
    model = Transformer(
        llama(
            tokenizer.vocab_size,
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
    stage = sft.make_stage(
        config,
        ranks,
        model,
        tokenizer,
        store,
        dev,
        lineage={"stage": "pretrain", "data": list(config.data)},
    )
    return replace(stage, header=[("model", f"new: {sft.describe(model)}"), *stage.header[1:]])


def check(config: Config) -> None:
    """Refuse sizes that make no model, and files that are not there, all at once."""
    found = []
    for name in ("vocab_size", "context_length", "width", "layers", "heads"):
        if getattr(config, name) < 1:
            found.append(f"--{name} {getattr(config, name)}: expected a number above 0")
    if config.heads > 0 and config.width % (2 * config.heads):
        found.append(f"--width {config.width}: must be a multiple of 2 x --heads {config.heads}")
    if config.kv_heads is not None and (config.kv_heads < 1 or config.heads % config.kv_heads):
        found.append(f"--kv_heads {config.kv_heads}: must divide --heads {config.heads}")
    problems(found)


def main(config: Config) -> int:
    """`whet pretrain`."""
    check(config)
    return run_stage(config, "pretrain", build, prepare)
