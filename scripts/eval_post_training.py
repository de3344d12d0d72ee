"""The table across the stages: `whet compare` with the pipeline's defaults.

python scripts/eval_post_training.py
python scripts/eval_post_training.py runs/base runs/sft runs/grpo --samples 8
"""

import sys
from pathlib import Path

from whet.cli import main

STAGES = ("base", "sft", "reward", "dpo", "ppo", "grpo")

if __name__ == "__main__":
    words = sys.argv[1:]
    named = any(not word.startswith("-") for word in words[:1])
    models = [] if named else [f"runs/{s}" for s in STAGES if Path(f"runs/{s}").is_dir()]
    given = [] if "--gsm8k" in words else ["--gsm8k", "data/prompts_dev.jsonl"]
    sys.exit(main(["compare", *models, *words, *given]))
