"""What users of other tools type, and the flag of Whet that does it."""

import difflib
from collections.abc import Collection

ELSEWHERE = {
    # name in TRL, Axolotl, LLaMA-Factory, Unsloth or torchtune: a flag, or what to do instead
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "per_device_train_batch_size": "micro_batch_size",
    "micro_batch": "micro_batch_size",
    "per_device_eval_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "batch_size is the whole step, over all ranks; "
    "--micro_batch_size is one forward pass, and Whet accumulates what lies between",
    "max_seq_length": "context_length",
    "max_length": "context_length",
    "sequence_len": "context_length",
    "cutoff_len": "context_length",
    "max_seq_len": "context_length",
    "block_size": "context_length",
    "model_name_or_path": "model",
    "model_name": "model",
    "base_model": "model",
    "output_dir": "out",
    "out_dir": "out",
    "dataset": "data",
    "datasets": "data",
    "dataset_name": "data",
    "train_file": "data",
    "eval_dataset": "dev",
    "validation_file": "dev",
    "lr_scheduler_type": "schedule",
    "lr_scheduler": "schedule",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
    "lr_warmup_steps": "warmup",
    "num_warmup_steps": "warmup",
    "max_grad_norm": "clip",
    "gradient_clip_val": "clip",
    "clip_grad_norm": "clip",
    "grad_clip": "clip",
    "optim": "optimizer",
    "adam_beta2": "beta2",
    "lora_r": "lora_rank",
    "rank": "lora_rank",
    "r": "lora_rank",
    "lora_target_modules": "lora_targets",
    "lora_target": "lora_targets",
    "target_modules": "lora_targets",
    "use_rslora": "--lora_alpha times the square root of the rank is the same scale",
    "use_dora": "lora_dora",
    "load_in_4bit": "lora_4bit",
    "quantization_bit": "lora_4bit",
    "gradient_checkpointing": "recompute",
    "enable_activation_checkpointing": "recompute",
    "bf16": "precision",
    "fp16": "precision",
    "mixed_precision": "precision",
    "dtype": "precision",
    "torch_dtype": "precision",
    "torch_compile": "compile",
    "report_to": "wandb_project",
    "save_steps": "save_every",
    "eval_steps": "eval_every",
    "save_total_limit": "keep",
    "resume_from_checkpoint": "resume",
    "fsdp": "shard",
    "deepspeed": "shard",
    "template": "chat_template",
    "temp": "temperature",
    "max_tokens": "max_new_tokens",
    "packing": "whet prepare always packs, and documents in a row do not see each other",
    "sample_packing": "whet prepare always packs, and documents in a row do not see each other",
    "train_on_inputs": "the prompt is never trained; raw text is, by whet prepare --format text",
    "assistant_only_loss": "only the assistant's tokens are trained; it needs no flag",
    "completion_only_loss": "only the assistant's tokens are trained; it needs no flag",
    "logging_steps": "every step is logged, in metrics.jsonl; it needs no flag",
    "flash_attention": "the fastest attention that is there is taken; it needs no flag",
    "attn_implementation": "the fastest attention that is there is taken; it needs no flag",
    "neftune_noise_alpha": "Whet has no noise on embeddings",
    "label_smoothing_factor": "Whet has no label smoothing",
}
"""What users of other tools type. Names that both use (seed, weight_decay …) need no entry."""

COMMANDS = {
    "train": "sft",
    "finetune": "sft",
    "tune": "sft",
    "tokenize": "prepare",
    "generate": "chat",
}
COMMANDS |= {"evaluate": "eval", "merge": "export --merge", "merge_and_unload": "export --merge"}


def nearest_command(word: str, names: Collection[str]) -> str:
    """What to say after an unknown command."""
    if word in COMMANDS:
        return f"; here it is {COMMANDS[word]!r}"
    near = difflib.get_close_matches(word, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; commands: {', '.join(names)}"


def nearest_flag(key: str, names: Collection[str], prefix: str = "") -> str:
    """What to say after an unknown `key`: the flag that it means, elsewhere or by spelling."""
    known = ELSEWHERE.get(key)
    if known is not None and known in names:
        return f"; here it is {prefix}{known}"
    if known is not None and " " in known:
        return f"; {prefix if known.split()[0] in names else ''}{known}"
    if known == "context_length":
        return "; rows are made by whet prepare: it has --context_length"
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{near[0]}?" if near else ""
