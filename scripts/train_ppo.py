"""Train on rewards with the pipeline's defaults; every flag of `whet ppo` overrides one.

python scripts/train_ppo.py --group_size 8
torchrun --standalone --nproc_per_node=2 scripts/train_ppo.py
"""

import sys

from walk_through import run

DEFAULTS = {
    "--model": "runs/sft",
    "--prompts": "data/prompts.jsonl",
    "--dev": "data/prompts_dev.jsonl",
    "--out": "runs/ppo",
}

if __name__ == "__main__":
    sys.exit(run("ppo", DEFAULTS, sys.argv[1:]))
