"""Fine-tune with the defaults of the README's walk-through; every flag of `whet sft` overrides one.

python scripts/train_sft.py --lr 1e-5 --epochs 3 --batch_size 16
torchrun --standalone --nproc_per_node=2 scripts/train_sft.py
"""

import sys

from walk_through import run

DEFAULTS = {
    "--model": "runs/base",
    "--data": "data/sft_packed.h5",
    "--dev": "data/sft_dev_packed.h5",
    "--out": "runs/sft",
}

if __name__ == "__main__":
    sys.exit(run("sft", DEFAULTS, sys.argv[1:]))
