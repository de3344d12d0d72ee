"""TRL's SFTTrainer on the benchmark's work, set up as its documentation recommends.

Packed by best fit decreasing, loss on the assistant's tokens only, no evaluation, no saving. With
`--cuda` Liger's kernels and flash attention, where its wheel is installed. Runs in its own virtual
environment (requirements-trl.txt).
"""

import argparse
import json
import resource
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.tokens: list[int] = []
        self.losses: list[float] = []

    def on_step_begin(self, *_: object, **__: object) -> None:
        self.started, self.busy = time.perf_counter(), time.process_time()
        self.tokens.append(0)

    def on_step_end(self, *_: object, **__: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.started)
        self.cpu_seconds.append(time.process_time() - self.busy)

    def on_log(self, args, state, control, logs=None, **_: object) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--precision", choices=["float32", "bf16"], required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--by_row", action="store_true", help="accumulate passes of one row")
    parser.add_argument("--row", type=int, default=1024, help="tokens in a packed row")
    parser.add_argument("--cuda", action="store_true")
    args = parser.parse_args()

    lines = (args.work / "examples.jsonl").read_text().splitlines()
    examples = [json.loads(line) for line in lines]
    tokenizer = AutoTokenizer.from_pretrained(args.work / "model")
    tokenizer.pad_token = tokenizer.eos_token
    flash = args.cuda and find_spec("flash_attn") is not None
    attention = "flash_attention_2" if flash else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(
        args.work / "model", dtype=torch.float32, attn_implementation=attention
    )
    config = SFTConfig(
        output_dir=str(args.work / "trl"),
        max_length=args.row,
        packing=True,
        packing_strategy="bfd",
        completion_only_loss=True,  # with ids given, this is the switch for the column of masks
        per_device_train_batch_size=1 if args.by_row else args.batch_size,
        gradient_accumulation_steps=args.batch_size if args.by_row else 1,
        max_steps=args.steps,
        learning_rate=1e-5,
        max_grad_norm=1.0,
        bf16=args.precision == "bf16",
        fp16=False,
        use_cpu=not args.cuda,
        use_liger_kernel=args.cuda,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        seed=0,
        disable_tqdm=True,
    )
    clock = Clock()
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(examples).rename_column(
            "assistant_masks", "completion_mask"
        ),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    step = trainer.training_step

    def counted(model, inputs, *rest):  # the documents' tokens that this step really trains on
        clock.tokens[-1] += int(inputs["input_ids"].numel())
        return step(model, inputs, *rest)

    trainer.training_step = counted
    trainer.train()
    if args.cuda:
        torch.cuda.synchronize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    versions = {"torch": torch.__version__, "trl": trl.__version__}
    versions["transformers"] = transformers.__version__
    if args.cuda:
        versions["liger-kernel"] = version("liger-kernel")
    print(
        json.dumps(
            {
                "side": "TRL",
                "seconds": clock.seconds,
                "cpu_seconds": clock.cpu_seconds,
                "tokens": clock.tokens,
                "losses": clock.losses,
                "peak_gib": peak,
                "peak_cuda_gb": torch.cuda.max_memory_allocated() / 1e9 if args.cuda else 0.0,
                "attention": attention,
                "versions": versions,
            }
        )
    )


if __name__ == "__main__":
    main()
