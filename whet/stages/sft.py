"""Supervised fine-tuning.

A base model knows how texts go on; SFT shows it conversations and trains it on the assistant's
tokens alone: it minimises the sum of weight x -ln p(token | everything before it) over the sum of
the weights, where the weight is 1 on what the assistant says, its stop token included, and 0 on
everything else. The context is read but not learnt. What changes is less what the model knows than
what it does with it: it answers, in the answer's form, and stops.
"""

from functools import partial

from whet.config import collected, problems
from whet.data.store import PackedStore
from whet.evaluate.gsm8k import Problem, load_gsm8k
from whet.flags.sft import Config
from whet.stages.model import open_for_training
from whet.stages.packed import packed_stage
from whet.train.distributed import Ranks
from whet.train.proposal import with_proposal
from whet.train.session import run_stage
from whet.train.stage import Documents, Stage


def build(config: Config, ranks: Ranks) -> Stage:
    """Open the data and the model, and check that they fit together."""
    found, data, questions = list[str](), dict[str, PackedStore](), list[Problem]()
    for flag, path in (("--data", config.data), ("--dev", config.dev)):
        with collected(found):
            if path is not None:
                data[flag] = PackedStore(path)
    with collected(found):
        if config.gsm8k_dev:
            questions = load_gsm8k(config.gsm8k_dev, config.gsm8k_limit)
    opened = open_for_training(config, ranks, found, data)
    if questions and opened.chat is None:
        problems([f"--gsm8k_dev: {config.model} holds no tokenizer; add --tokenizer DIR"])
    return packed_stage(
        config,
        ranks,
        opened.model,
        opened.chat,
        data["--data"],
        data.get("--dev"),
        lineage={"stage": "sft", **opened.lineage},
        lora=opened.lora,
        header=opened.header,
        questions=questions,
    )


def documents(config: Config) -> Documents:
    """What the ledger of a run with these settings names."""
    return PackedStore(config.data)


def main(config: Config) -> int:
    """`whet sft`."""
    fit = partial(with_proposal, build=build) if config.auto else None
    return run_stage(config, "sft", build, fit)
