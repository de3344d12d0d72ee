"""Pretraining: a small base model from plain text.

The same loss as in fine-tuning, with weight 1 on every token: the model learns how texts go on. It
is here so that the whole path can be tried on a laptop, and for small models of one's own.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

from whet.chat.chat import Chat, load_tokenizer
from whet.chat.tokenizer import train_tokenizer
from whet.data.prepare import examine, prepare_text
from whet.data.reader import parse, parse_source, read_units
from whet.data.store import PackedStore
from whet.flags.prepare import GIVEN
from whet.flags.prepare import Config as PrepareConfig
from whet.flags.pretrain import Config
from whet.model.config import llama
from whet.model.decoder import Transformer, init_weights
from whet.progress import track
from whet.stages.model import Opened, describe
from whet.stages.packed import packed_stage
from whet.train.distributed import Ranks
from whet.train.resume import continues
from whet.train.session import run_stage
from whet.train.stage import Stage

TOKENIZER_CHARACTERS = 50_000_000
"""Text that a new tokenizer is learnt from; more changes its merges hardly at all."""


def prepare(config: Config, ranks: Ranks) -> Config:
    """Make tokenizer and packed files in the run folder, unless an earlier process did.

    Nothing is written before all of the text has been read: what is refused leaves no folder.
    """
    if _is_prepared(config):
        return config
    chat = _make_chat(config)
    prepare_text(_preparing(config), chat, config.quiet)
    chat.save(config.out / "tokenizer")
    return config


def _is_prepared(config: Config) -> bool:
    """Whether an earlier process of this run made the files. Without a config.toml it got no
    further, and it may have had other flags."""
    begun = continues(config) and (config.out / "config.toml").exists()
    dev = packed_dev(config).exists() or not config.dev_fraction
    return begun and packed(config).exists() and dev


def packed(config: Config) -> Path:
    """Where the packed text lies."""
    return config.out / "packed.h5"


def packed_dev(config: Config) -> Path:
    return config.out / "packed_dev.h5"


def _preparing(config: Config) -> PrepareConfig:
    """The settings of `whet prepare` by which its text is prepared."""
    return PrepareConfig(
        data=config.data,
        tokenizer=GIVEN,
        out=str(packed(config)),
        context_length=config.context_length,
        dev_out=str(packed_dev(config)) if config.dev_fraction else None,
        dev_fraction=config.dev_fraction,
        seed=config.seed,
    )


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
    files = [parse_source(argument).path for argument in data]
    for unit in itertools.chain.from_iterable(map(read_units, files)):
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
    store = PackedStore(packed(config))
    has_dev = config.dev_fraction and packed_dev(config).exists()
    dev = PackedStore(packed_dev(config)) if has_dev else None
    model = Transformer(
        llama(
            chat.tokenizer.vocab_size,
            config.width,
            config.layers,
            config.heads,
            n_kv_heads=config.kv_heads,
            max_positions=config.context_length,
            tied=config.tied,
        )
    )
    init_weights(model, config.seed)
    lineage, header = {"data": list(config.data)}, [("model", f"new: {describe(model)}")]
    opened = Opened(model, chat, None, lineage, header)
    return packed_stage(config, ranks, opened, "pretrain", store, dev)


def check(config: Config) -> None:
    """Refuse what `whet prepare` would refuse of the text, unless it is prepared already."""
    if not _is_prepared(config):
        examine(_preparing(config))


def main(config: Config) -> int:
    """`whet pretrain`."""
    check(config)
    return run_stage(config, "pretrain", build, prepare)
