"""Train a reward model with the pipeline's defaults; every flag of `whet reward` overrides one.

python scripts/train_reward.py --lr 1e-5
torchrun --standalone --nproc_per_node=2 scripts/train_reward.py
"""

import sys

from walk_through import run

DEFAULTS = {
    "--model": "runs/sft",
    "--data": "data/preferences.h5",
    "--dev": "data/preferences_dev.h5",
    "--out": "runs/reward",
}

if __name__ == "__main__":
    sys.exit(run("reward", DEFAULTS, sys.argv[1:]))
