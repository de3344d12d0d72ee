"""Train on preferences with the pipeline's defaults; every flag of `whet dpo` overrides one.

python scripts/train_dpo.py --loss dpo --beta 0.1
torchrun --standalone --nproc_per_node=2 scripts/train_dpo.py
"""

import sys

from walk_through import run

DEFAULTS = {
    "--model": "runs/sft",
    "--data": "data/preferences.h5",
    "--dev": "data/preferences_dev.h5",
    "--out": "runs/dpo",
}

if __name__ == "__main__":
    sys.exit(run("dpo", DEFAULTS, sys.argv[1:]))
