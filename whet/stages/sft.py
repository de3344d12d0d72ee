"""Supervised fine-tuning.

A base model knows how texts go on; SFT shows it conversations and trains it on the assistant's
tokens alone: it minimises the sum of weight x -ln p(token | everything before it) over the sum of
the weights, where the weight is 1 on what the assistant says, its stop token included, and 0 on
everything else. The context is read but not learnt. What changes is less what the model knows than
what it does with it: it answers, in the answer's form, and stops.
"""

from whet.config import collected, problems
from whet.data.store import PackedStore
from whet.evaluate.gsm8k import Problem, load_gsm8k
from whet.flags.sft import Config
from whet.stages.model import open_for_training, run_tuned
from whet.stages.packed import packed_stage
from whet.train.distributed import Ranks
from whet.train.stage import Stage


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
    store, dev = data["--data"], data.get("--dev")
    return packed_stage(config, ranks, opened, "sft", store, dev, questions)


def main(config: Config) -> int:
    """`whet sft`."""
    return run_tuned(config, "sft", build)
