"""TRL's DPOTrainer, RewardTrainer and GRPOTrainer on the benchmark's work on a CPU.

No evaluation, no saving, no gradient checkpointing; the reference's log-probabilities are computed
before the first step (DPO), there is no reference model (GRPO, TRL's default). TRL's padding-free
way is switched off in 1.16. Runs in its own virtual environment (requirements-trl.txt).
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)


class Clock(TrainerCallback):
    """Time and processor time from the end of one step to that of the next: rollouts included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.losses: list[float] = []

    def on_train_begin(self, *_: object, **__: object) -> None:
        self.started, self.busy = time.perf_counter(), time.process_time()

    def on_step_end(self, *_: object, **__: object) -> None:
        now, busy = time.perf_counter(), time.process_time()
        self.seconds.append(now - self.started)
        self.cpu_seconds.append(busy - self.busy)
        self.started, self.busy = now, busy

    def on_log(self, args, state, control, logs=None, **_: object) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["dpo", "reward", "grpo"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch_size", type=int, required=True, help="pairs or replies of a step")
    parser.add_argument("--pass_size", type=int, required=True, help="so many in a forward pass")
    parser.add_argument("--precision", choices=["float32", "bf16"], required=True)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--group_size", type=int, default=8)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.work / "model")
    tokenizer.pad_token = tokenizer.eos_token
    settings: dict[str, Any] = {
        "output_dir": str(args.work / "trl"),
        "per_device_train_batch_size": args.pass_size,
        "gradient_accumulation_steps": args.batch_size // args.pass_size,
        "max_steps": args.steps,
        "learning_rate": 1e-6,
        "max_grad_norm": 1.0,
        "bf16": args.precision == "bf16",
        "fp16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "seed": 0,
        "disable_tqdm": True,
    }
    clock = Clock()
    build = {"dpo": dpo, "reward": reward, "grpo": grpo}[args.kind]
    trainer = build(args, settings, tokenizer, clock)
    trainer.train()
    history = [line for line in trainer.state.log_history if "loss" in line]
    counted = args.batch_size
    per_step = [counted] * len(clock.seconds)
    if args.kind == "grpo":
        per_step = [round(counted * line["completions/mean_length"]) for line in history]
    print(
        json.dumps(
            {
                "seconds": clock.seconds,
                "cpu_seconds": clock.cpu_seconds,
                "tokens": per_step,
                "losses": clock.losses,
                "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
                "versions": {
                    "torch": torch.__version__,
                    "trl": trl.__version__,
                    "transformers": transformers.__version__,
                },
            }
        )
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def dpo(args: Any, settings: dict[str, Any], tokenizer: Any, clock: Clock) -> Any:
    model = AutoModelForCausalLM.from_pretrained(args.work / "model", dtype=torch.float32)
    pairs = Dataset.from_list(lines(args.work / "pairs.jsonl")[: args.steps * args.batch_size])
    config = trl.DPOConfig(
        **settings,
        beta=0.1,
        max_length=1024,
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=args.pass_size,
    )
    return trl.DPOTrainer(
        model, args=config, train_dataset=pairs, processing_class=tokenizer, callbacks=[clock]
    )


def reward(args: Any, settings: dict[str, Any], tokenizer: Any, clock: Clock) -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(
        args.work / "model", num_labels=1, dtype=torch.float32
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    pairs = Dataset.from_list(lines(args.work / "pairs.jsonl")[: args.steps * args.batch_size])
    config = trl.RewardConfig(**settings, max_length=1024)
    return trl.RewardTrainer(
        model, args=config, train_dataset=pairs, processing_class=tokenizer, callbacks=[clock]
    )


def grpo(args: Any, settings: dict[str, Any], tokenizer: Any, clock: Clock) -> Any:
    model = AutoModelForCausalLM.from_pretrained(args.work / "model", dtype=torch.float32)
    prompts = [{"prompt": line["prompt"]} for line in lines(args.work / "pairs.jsonl")]
    config = trl.GRPOConfig(
        **settings,
        num_generations=args.group_size,
        steps_per_generation=args.batch_size // args.pass_size,
        max_completion_length=args.new_tokens,
        beta=0.0,
    )

    def vowels(completions: list, **_: object) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in texts]

    return trl.GRPOTrainer(
        model=model,
        reward_funcs=[vowels],
        args=config,
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
        callbacks=[clock],
    )


if __name__ == "__main__":
    main()
