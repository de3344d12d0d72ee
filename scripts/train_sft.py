"""Fine-tune with the defaults of the README's walk-through; every flag of `whet sft` overrides one.

python scripts/train_sft.py --lr 1e-5 --epochs 3 --batch_size 16
torchrun --standalone --nproc_per_node=2 scripts/train_sft.py
"""

import sys

from whet.cli import main

DEFAULTS = {
    "--model": "runs/base",
    "--data": "data/sft_packed.h5",
    "--dev": "data/sft_dev_packed.h5",
    "--out": "runs/sft",
}


def with_defaults(flags: list[str]) -> list[str]:
    """`flags` after those defaults that they do not set themselves; a --config file sets all."""
    given = {flag.partition("=")[0] for flag in flags}
    if "--config" in given:
        return flags
    return [word for pair in DEFAULTS.items() if pair[0] not in given for word in pair] + flags


if __name__ == "__main__":
    sys.exit(main(["sft", *with_defaults(sys.argv[1:])]))
