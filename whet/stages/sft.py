"""Supervised fine-tuning.

A base model knows how texts go on; SFT shows it conversations and trains it on the assistant's
tokens alone: it minimises the sum of weight x -ln p(token | everything before it) over the sum of
the weights, where the weight is 1 on what the assistant says, its stop token included, and 0 on
everything else. The context is read but not learnt. What changes is less what the model knows than
what it does with it: it answers, in the answer's form, and stops.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from whet.chat.chat import Chat, load_tokenizer
from whet.config import as_toml, collected, problems, read_toml
from whet.data.batches import (
    Batch,
    global_batch_rows,
    micro_batch_count,
    micro_batches,
    read_batch,
    steps_per_epoch,
)
from whet.data.store import PackedStore
from whet.errors import UserError
from whet.evaluate.dev import misfits
from whet.evaluate.gsm8k import Problem, load_gsm8k
from whet.files import unwritable
from whet.hub import check_name, find_model
from whet.model.attention import plan_documents
from whet.model.decoder import Transformer
from whet.model.hf.checkpoint import NO_PT
from whet.model.hf.weights import PT, saved_as
from whet.model.lora.lora import LoRA
from whet.model.lora.read import base_of, find_base, is_adapter, tokenizer_home
from whet.model.lora.trained import read_pattern
from whet.model.open import is_foreign, load_backbone_from_ckpt
from whet.model.recompute import Recompute
from whet.stages.tuning import ModelWriter, add_tokens, choose_trained
from whet.tokenizer_files import find_convertible
from whet.train.distributed import Ranks
from whet.train.evaluation import Evaluator
from whet.train.optim import parse_lr_groups
from whet.train.session import run_stage, total_steps
from whet.train.settings import TrainSettings
from whet.train.stage import Documents, Stage, Sums

USUAL_ADAPTER_LR = 1e-4


@dataclass(kw_only=True)
class Inputs:
    """What fine-tuning starts from: a base of `Config` of its own, so that help begins with it."""

    model: str
    """Model to start from: a directory, a `.pt` file, OWNER/NAME on the Hugging Face Hub, or an
    adapter's directory, to train that adapter further."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    data: Path
    """Packed file to train on, made by `whet prepare`."""
    dev: Path | None = None
    """Packed file to evaluate on."""
    tokenizer: Path | None = None
    """Tokenizer directory; by default --model's own."""
    chat_template: str | None = None
    """chatml, plain or a file, for a base without chat tokens; the data must be made with it."""


@dataclass(kw_only=True)
class Config(TrainSettings, Inputs):
    """Fine-tune a base model on packed rows."""

    train: str = "all"
    """What is trained: all, or re:EXPRESSION on parameter names, such as 're:layers[.]1[.]'."""
    lora_rank: int | None = None
    """Train a LoRA adapter of this rank instead of the model."""
    lora_alpha: float = 32.0
    """Scale of the adapter: alpha / rank."""
    lora_targets: str = "all-linear"
    """all-linear, or some of q,k,v,o,gate,up,down (other architectures: their modules' names)."""
    lora_dropout: float = 0.0
    """Dropout before the adapter."""
    lora_rslora: bool = False
    """Scale by alpha / sqrt(rank)."""
    lora_dora: bool = False
    """DoRA: train the lengths of the rows apart from their directions."""
    lora_4bit: bool = False
    """QLoRA: hold the frozen base in 4 bits (NF4), through bitsandbytes."""
    recompute: Recompute = "none"
    """Make activations again in the backward pass, not keep them: less memory, more work."""
    auto: bool = False
    """Measure first, as `whet plan` does, and take its --micro_batch_size and --recompute."""
    memory_gb: float | None = None
    """Memory that --auto and `whet plan` may use on a rank; by default what there is."""
    gsm8k_dev: Path | None = None
    """GSM8K-like problems to answer at each evaluation."""
    gsm8k_limit: int = 100
    """How many of them."""


def build(config: Config, ranks: Ranks) -> Stage:
    """Load the model and the data, and check that they fit together."""
    store = PackedStore(config.data)
    dev = PackedStore(config.dev) if config.dev else None
    gsm8k = load_gsm8k(config.gsm8k_dev, config.gsm8k_limit) if config.gsm8k_dev else []
    quiet = config.quiet or not ranks.first
    path = find_model(config.model, config.revision, quiet=quiet)
    adapter = path if is_adapter(path) else None
    base = path if adapter is None else find_base(adapter, quiet=quiet)
    problems(unfit_flags(config, ranks, base, adapter))
    # A frozen base needs no float32 copy: it is only multiplied, in bf16.
    halved = config.precision == "bf16" and (adapter is not None or config.lora_rank is not None)
    model = load_backbone_from_ckpt(
        base, dtype=torch.bfloat16 if halved else torch.float32, quiet=quiet
    )
    model.recompute = config.recompute
    header = [("model", f"{config.model}: {describe(model)}")]
    chat, new_rows = find_chat(config.tokenizer, path), list[int]()
    if config.chat_template is not None and chat is not None:
        chat, new_rows = add_tokens(model, chat, config.chat_template)
    found, lora = list[str](), None
    with collected(found):
        lora = choose_trained(
            model,
            train=config.train,
            lora=lora_of(config) if adapter is None else None,
            adapter=adapter,
            new_rows=new_rows,
            four_bits=config.lora_4bit,
            device=ranks.device,
            seed=config.seed,
        )
        parse_lr_groups(
            config.lr_groups, [n for n, p in model.named_parameters() if p.requires_grad]
        )
    if lora is not None:
        header.append(("adapter", told(lora, config.lora_4bit)))
        if config.lr < USUAL_ADAPTER_LR / 2:
            usual = "usual for an adapter are 1e-4 to 2e-4: ten times those of all weights"
            header.append(("note", f"--lr {config.lr:g}: {usual}"))
    found += misfits(model, chat, store, "--data")
    switch = getattr(model, "switch", None)
    if config.shard and ranks.size > 1 and switch and store.context_length > switch.length:
        found.append(
            f"--shard: this architecture's positions change beyond {switch.length:,} tokens, so "
            "its documents run in passes whose number differs between ranks; leave --shard out, or "
            f"prepare with --context_length {switch.length}"
        )
    found += misfits(model, chat, dev, "--dev") if dev else []
    if gsm8k and chat is None:
        found.append(f"--gsm8k_dev: {config.model} holds no tokenizer; add --tokenizer DIR")
    problems(found)
    stage = make_stage(
        config,
        ranks,
        model,
        chat,
        store,
        dev,
        lineage=lineage(config, store, adapter),
        lora=lora,
        questions=gsm8k,
    )
    return replace(stage, header=[*header, *stage.header[1:]])


def make_stage(
    config: TrainSettings,
    ranks: Ranks,
    model: Transformer,
    chat: Chat | None,
    store: PackedStore,
    dev: PackedStore | None,
    *,
    lineage: dict[str, Any],
    lora: LoRA | None = None,
    questions: Sequence[Problem] = (),
) -> Stage:
    """The stage of a loaded model and opened data; pretraining is this stage on plain text.

    `questions` are answered at each evaluation. `lineage` gets the hashes of the data and of the
    settings: the latter is the SHA-256 of the run's config.toml.
    """
    n_rows = min(len(store), config.overfit_rows or len(store))
    steps = steps_per_epoch(n_rows, config.batch_size)
    trained = float(store.loss_tokens[:n_rows].sum())
    for each in filter(None, (store, dev)):
        if (least := each.loss_tokens.min()) < 0:
            raise UserError(
                f"{each.path}: the weights of row {each.loss_tokens.argmin()} add up to {least:g}; "
                "a loss is divided by the sum of its weights, so they must be 0 or more"
            )
    if trained == 0:
        raise UserError(f"{store.path}: no token of it is trained; see `whet inspect {store.path}`")
    assert config.micro_batch_size is not None, "resolved before"
    size = f"{n_rows:,} rows of {store.context_length:,}, {trained:,.0f} trained tokens"
    lineage = {
        **lineage,
        "data_hash": store.fingerprint,
        "config_hash": hashlib.sha256(as_toml(config).encode()).hexdigest(),
    }
    writer = ModelWriter(
        chat,
        lineage,
        config.out_ckpt,
        config.out,
        lora,
        saved_as(config.save_dtype, model.config.hf),
    )
    return Stage(
        model=model,
        documents=store,
        dev=dev,
        total_steps=total_steps(config, steps),
        batches=partial(
            batches_of_step,
            store=store,
            n_rows=n_rows,
            batch_size=config.batch_size,
            micro_batch_size=config.micro_batch_size,
            seed=config.seed,
            ranks=ranks,
        ),
        loss_fn=token_loss,
        evaluate=Evaluator(
            dev,
            chat,
            config.micro_batch_size,
            problems=questions,
            n_samples=config.samples,
            quiet=config.quiet or not ranks.first,
        ),
        save_model=writer,
        rehearse=writer.rehearse,
        header=[
            ("model", describe(model)),
            ("data", f"{store.path}: {size}, {steps:,} steps an epoch"),
            ("dev", f"{dev.path}: {len(dev):,} rows" if dev else "none, so there is no dev loss"),
        ],
    )


def token_loss(model: nn.Module, batch: Batch) -> Sums:
    """sum(weight x -ln p(target)) of a micro-batch."""
    found = model(
        batch.tokens,
        None,  # those of the plan: given ones would forbid to compute a common beginning once
        batch.segments,
        targets=batch.targets,
        weight=batch.weight,
        plan=batch.plan,
    )
    return Sums(found.loss, found.nll)


def batches_of_step(
    step: int,
    *,
    store: PackedStore,
    n_rows: int,
    batch_size: int,
    micro_batch_size: int,
    seed: int,
    ranks: Ranks,
) -> list[Batch]:
    """This rank's micro-batches of global batch `step`; equally many on every rank."""
    whole = global_batch_rows(n_rows, batch_size, seed, step)
    mine: np.ndarray = whole[ranks.rank :: ranks.size]
    share = read_batch(
        store,
        mine,
        total=float(store.loss_tokens[whole].sum()),
        epoch=step // steps_per_epoch(n_rows, batch_size),
    )
    count = micro_batch_count(len(whole), ranks.size, micro_batch_size)
    return [planned(micro) for micro in micro_batches(share, micro_batch_size, count)]


def planned(batch: Batch) -> Batch:
    """The batch with the plan that the model would make of it: here it costs a GPU no wait."""
    plan = plan_documents(batch.tokens.shape, batch.tokens.device, batch.segments, batch.weight)
    return replace(batch, plan=plan)


def lora_of(config: Config) -> LoRA | None:
    """The adapter's settings, or None if the model itself is trained."""
    if config.lora_rank is None:
        return None
    return LoRA(
        config.lora_rank,
        config.lora_alpha,
        config.lora_targets,
        config.lora_dropout,
        config.lora_rslora,
        config.lora_dora,
    )


def flaws(config: Config, ranks: Ranks) -> list[str]:
    """All that can be said against flags and files before the model is loaded."""
    found: list[str] = []
    with collected(found):
        check_name(config.model)
    for file in filter(None, (config.data, config.dev)):
        with collected(found):
            PackedStore(file)
    with collected(found):
        if config.gsm8k_dev:
            load_gsm8k(config.gsm8k_dev, config.gsm8k_limit)
    if config.tokenizer is not None and not config.tokenizer.is_dir():
        found.append(f"--tokenizer {config.tokenizer}: is no directory")
    with collected(found):
        read_pattern(config.train)
    path = Path(config.model)
    if path.exists():
        found += unfit_flags(config, ranks, path, path if is_adapter(path) else None)
    if config.out_ckpt is not None:
        others = [config.data, config.dev, config.gsm8k_dev, config.tokenizer, config.out]
        found += unwritable("--out_ckpt", config.out_ckpt, [config.model, *others], PT)
    return found


def unfit_flags(config: Config, ranks: Ranks, base: Path, adapter: Path | None) -> list[str]:
    """Flags that this model, or the `adapter` that is trained further, has no use for."""
    found = []
    if config.lora_4bit and config.shard and ranks.size > 1:
        found.append("--lora_4bit and --shard exclude each other: packed weights can't be sharded")
    fields = [f for f in dataclasses.fields(Config) if f.name.startswith("lora_")]
    given = [f.name for f in fields if getattr(config, f.name) != f.default]
    given = [name for name in given if name != "lora_4bit"]
    trains_adapter = adapter is not None or config.lora_rank is not None
    if config.lora_4bit and not trains_adapter:
        found.append("--lora_4bit: needs an adapter to train; add --lora_rank 16")
    if config.out_ckpt is not None and trains_adapter:
        found.append(
            "--out_ckpt: an adapter is trained, which is saved as a directory; afterwards: whet "
            "export RUN --merge --to pt --out FILE"
        )
    if config.float8 and is_foreign(base):
        found.append("--float8: works on Whet's own families only; leave it out")
    if config.out_ckpt is not None and not trains_adapter and is_foreign(base):
        found.append(f"--out_ckpt: {NO_PT}, which --out does")
    if config.train != "all" and trains_adapter:
        found.append("--train and an adapter exclude each other: the base is frozen")
    if adapter is not None:
        found += [
            f"--{name}: {adapter} is trained further, with its own settings; leave this out"
            for name in given
        ]
    elif config.lora_rank is None:
        found += [f"--{name}: there is no adapter; add --lora_rank 16" for name in given]
    return found


def told(lora: LoRA, four_bits: bool) -> str:
    """The adapter's settings in one line."""
    kinds = [("rsLoRA", lora.rslora), ("DoRA", lora.dora), ("on a base in 4 bits", four_bits)]
    words = [f"rank {lora.rank}, alpha {lora.alpha:g}, on {lora.targets}"]
    words += [f"dropout {lora.dropout:g}"] if lora.dropout else []
    return ", ".join(words + [word for word, used in kinds if used])


def find_chat(directory: Path | None, model: Path) -> Chat | None:
    """--tokenizer's, or the model's own; a `.pt` has none, and a directory may have none."""
    home = directory or tokenizer_home(model)
    has_one = (home / "tokenizer.json").is_file() or find_convertible(home) is not None
    return load_tokenizer(home) if directory or has_one else None


def describe(model: Transformer) -> str:
    """The model in one line."""
    count, config = sum(p.numel() for p in model.parameters()), model.config
    return (
        f"{count:,} parameters, {config.n_layers} layers of width {config.width}, "
        f"vocabulary {config.vocab_size:,}"
    )


def lineage(config: Config, store: PackedStore, adapter: Path | None) -> dict:
    """Where the model comes from, for its whet.json; the base of an adapter that goes on is its
    own."""
    attrs = store.attrs
    base, revision = base_of(adapter) if adapter else (config.model, config.revision)
    return {
        "stage": "sft",
        "base": base,
        "revision": revision,
        **({"adapter": str(adapter)} if adapter else {}),
        "data": str(config.data),
        "tokenizer_hash": attrs.get("tokenizer_hash"),
        "template_hash": attrs.get("template_hash"),
    }


def prepare(config: Config, ranks: Ranks) -> Config:
    """`--auto`: settings that fit; a continued run keeps those that it has."""
    problems(flaws(config, ranks))
    if not config.auto:
        return config
    saved = config.out / "config.toml"
    if saved.is_file():  # or the run would have been refused
        before = read_toml(Config, saved)
        kept = {name: before[name] for name in ("micro_batch_size", "recompute")}
        return replace(config, **kept)
    from whet.stages.plan import with_proposal  # it plans this module's own command

    return with_proposal(config, ranks)


def documents(config: Config) -> Documents:
    """What the ledger of a run with these settings names."""
    return PackedStore(config.data)


def main(config: Config) -> int:
    """`whet sft`."""
    return run_stage(config, "sft", build, prepare)
