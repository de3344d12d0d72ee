"""What users of other tools type, and the flag of Whet that does it."""

import difflib
from collections.abc import Collection

_PACKED = "whet prepare always packs, and documents in a row do not see each other"
_MASK = "only the assistant's tokens are trained; it needs no flag"
_ATTENTION = "the fastest attention that is there is taken; it needs no flag"
_NAMES = {
    # flag of Whet: its names in TRL, Axolotl, LLaMA-Factory, Unsloth or torchtune
    "lr": "learning_rate",
    "epochs": "num_train_epochs num_epochs",
    "micro_batch_size": "per_device_train_batch_size micro_batch per_device_eval_batch_size",
    "context_length": "max_seq_length max_length sequence_len cutoff_len max_seq_len block_size",
    "model": "model_name_or_path model_name base_model",
    "out": "output_dir out_dir",
    "data": "dataset datasets dataset_name train_file",
    "dev": "eval_dataset validation_file",
    "schedule": "lr_scheduler_type lr_scheduler",
    "warmup": "warmup_ratio warmup_steps lr_warmup_steps num_warmup_steps",
    "clip": "max_grad_norm gradient_clip_val clip_grad_norm grad_clip",
    "optimizer": "optim",
    "beta2": "adam_beta2",
    "lora_rank": "lora_r rank r",
    "lora_targets": "lora_target_modules lora_target target_modules",
    "lora_dora": "use_dora",
    "lora_4bit": "load_in_4bit quantization_bit",
    "recompute": "gradient_checkpointing enable_activation_checkpointing",
    "precision": "bf16 fp16 mixed_precision dtype torch_dtype",
    "compile": "torch_compile",
    "wandb_project": "report_to",
    "save_every": "save_steps",
    "eval_every": "eval_steps",
    "keep": "save_total_limit",
    "resume": "resume_from_checkpoint",
    "shard": "fsdp deepspeed",
    "chat_template": "template",
    "temperature": "temp",
    "max_new_tokens": "max_tokens max_completion_length response_length generate_max_len",
    "workers": "dataset_num_proc preprocessing_num_workers num_proc dataset_processes",
    "dev_fraction": "val_size val_set_size test_size",
    "fields": "dataset_text_field",
    # of preferences and rewards
    "loss": "loss_type pref_loss rl",
    "beta": "pref_beta rl_beta kto_beta simpo_beta",
    "gamma": "simpo_gamma",
    "sft_weight": "pref_ftx rpo_alpha orpo_alpha",
    "reference": "ref_model ref_model_name_or_path precompute_ref_log_probs",
    "centre": "center_rewards_coefficient",
    "reward": "reward_funcs reward_model reward_model_path",
    "prompts": "prompt_data train_prompts",
    "critic": "value_model critic_model value_model_path",
    "group_size": "num_generations n_samples_per_prompt rollout_n",
    "updates": "num_iterations num_mini_batches",
    "passes": "num_ppo_epochs ppo_epochs",
    "clip_low": "epsilon cliprange eps_clip clip_ratio",
    "clip_high": "epsilon_high clip_ratio_high",
    "value_clip": "cliprange_value vf_clip value_clip_range",
    "value_weight": "vf_coef",
    "gae_lambda": "lam lambd lambda",
    "kl": "kl_coef init_kl_coef kl_loss_coef beta",
    "truncated": "mask_truncated_completions missing_eos_penalty overlong_filter",
    "advantage": "scale_rewards advantage_estimator",
    "rollout_url": "use_vllm vllm_server_base_url vllm_server_host",
}
_ADVICE = {
    # name that no single flag of Whet has: what to do instead
    "gradient_accumulation_steps": "batch_size is the whole step, over all ranks; "
    "--micro_batch_size is one forward pass, and Whet accumulates what lies between",
    "use_rslora": "--lora_alpha times the square root of the rank is the same scale",
    "packing": _PACKED,
    "sample_packing": _PACKED,
    "train_on_inputs": "the prompt is never trained; raw text is, by whet prepare --format text",
    "assistant_only_loss": _MASK,
    "completion_only_loss": _MASK,
    "logging_steps": "every step is logged, in metrics.jsonl; it needs no flag",
    "flash_attention": _ATTENTION,
    "attn_implementation": _ATTENTION,
    "neftune_noise_alpha": "Whet has no noise on embeddings",
    "label_smoothing_factor": "Whet has no label smoothing",
    "reward_weights": "--reward takes NAME=WEIGHT, such as --reward correct format=0.2",
    "max_prompt_length": "a prompt is never cut; one that leaves no room for a reply is left out",
    "whiten_rewards": "advantages are whitened over the whole rollout; it needs no flag",
    "load_in_8bit": "a base in 8 bits is not there; --lora_4bit holds it in 4",
    "use_liger_kernel": "the fused loss is always on; it needs no flag",
    "trust_remote_code": "code from a repository is never run",
}
ELSEWHERE = {name: flag for flag, names in _NAMES.items() for name in names.split()} | _ADVICE
"""What users of other tools type. Names that both use (seed, weight_decay …) need no entry."""
OF_PREPARE = ("context_length", "workers", "dev_fraction", "fields")
COMMANDS = {"train": "sft", "finetune": "sft", "tune": "sft", "tokenize": "prepare"}
COMMANDS |= {"generate": "chat", "evaluate": "eval"}
COMMANDS |= {"merge": "export --merge", "merge_and_unload": "export --merge"}


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
    if known in OF_PREPARE:
        return f"; rows are made by whet prepare: it has --{known}"
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{near[0]}?" if near else ""
