"""Train on rewards with the pipeline's defaults; every flag of `whet grpo` overrides one.

python scripts/train_grpo.py --group_size 8
torchrun --standalone --nproc_per_node=2 scripts/train_grpo.py
"""

import sys

from walk_through import run

DEFAULTS = {
    "--model": "runs/sft",
    "--prompts": "data/prompts.jsonl",
    "--dev": "data/prompts_dev.jsonl",
    "--out": "runs/grpo",
}

if __name__ == "__main__":
    sys.exit(run("grpo", DEFAULTS, sys.argv[1:]))
