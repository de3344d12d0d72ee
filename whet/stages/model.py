"""The model of a stage: opened for training, and written. What all stages do in the same way.

Flags and inputs are checked before the weights are read; then model, tokenizer and adapter are
opened, what is not trained is frozen, and data that do not fit are refused. `ModelWriter` writes
the model, whole or its adapter, with its lineage; and a `.pt` if asked.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from whet.chat.chat import ANOTHER_TEMPLATE, Chat, add_chat_tokens, read_chat
from whet.config import as_toml, collected, problems
from whet.data.store import PackedStore
from whet.errors import UserError
from whet.files import nearest
from whet.flags.training import TrainSettings, parameters, unfit_flags
from whet.hub import find_model, is_adapter
from whet.model.decoder import Transformer
from whet.model.embedding import grow_embedding
from whet.model.hf.checkpoint import NO_PT, save_model, save_pt, saved_bytes
from whet.model.hf.weights import rounding, saved_as
from whet.model.lora.lora import LoRA, adapters, apply_lora, kind_of, merge_lora, quantize_base
from whet.model.lora.read import base_of, continue_adapter, find_base, tokenizer_home
from whet.model.lora.write import save_adapter
from whet.model.open import is_foreign, load_backbone_from_ckpt, misfits, template_misfit
from whet.tokenizer_files import find_convertible
from whet.train.distributed import Ranks, is_first, unwrap, whole_weights
from whet.train.optim import parse_lr_groups
from whet.train.proposal import with_proposal
from whet.train.session import run_stage
from whet.train.stage import Stage

C = TypeVar("C", bound=Any)
USUAL_ADAPTER_LR = 1e-4
REHEARSED_BYTES = 2_000_000_000
"""Weights up to this size are written and read back before the first step: some seconds."""


@dataclass(frozen=True)
class Opened:
    """A model that is ready to be trained."""

    model: Transformer
    chat: Chat | None
    lora: LoRA | None
    """The adapter that is trained in place of the model."""
    lineage: dict[str, Any]
    """The base, and the adapter that is trained further."""
    header: list[tuple[str, str]]


def open_for_training(
    config: Any,
    ranks: Ranks,
    found: list[str],
    data: Mapping[str, PackedStore],
    *,
    score: bool = False,
    adapter_lr: float = USUAL_ADAPTER_LR,
) -> Opened:
    """Open `config.model`; `data` are packed files that it must fit, by flag. With `score` it gives
    scores in place of logits, and an adapter is merged. A new adapter trained with less than half
    of `adapter_lr` is noted.

    Raises UserError with the problems in `found`, which the stage has met with its own inputs, and
    later with all that does not fit the opened model.
    """
    quiet = config.quiet or not ranks.first
    problems(found)
    path = find_model(config.model, config.revision, quiet=quiet)
    adapter = path if is_adapter(path) and not score else None
    problems(unfit_flags(config, adapter))
    base = path if adapter is None else find_base(adapter, quiet=quiet)
    problems(_unfit_for_others(config) if is_foreign(base) else [])
    # A frozen base needs no float32 copy: it is only multiplied, in bf16.
    halved = config.precision == "bf16" and (adapter is not None or config.lora_rank is not None)
    model = load_backbone_from_ckpt(
        base, dtype=torch.bfloat16 if halved else torch.float32, quiet=quiet, score=score
    )
    model.recompute = config.recompute
    header = [("model", f"{config.model}: {describe(model)}")]
    if line := rounding("same", model.config):
        header.append(("note", line))
    chat, new_rows = find_chat(config.tokenizer, path, config.chat_template), list[int]()
    if config.chat_template is not None and chat is not None:
        chat, new_rows = add_tokens(model, chat, config.chat_template)
    lora = None
    with collected(found):
        if chat is not None:
            chat = rendered_as_data(chat, config.chat_template, data, found, header)
    with collected(found):
        if adapter is not None or config.lora_rank is not None:
            lora = put_adapter(model, config, adapter, new_rows, ranks.device)
        elif config.train == "all":
            model.requires_grad_(True)
        else:
            select_trainable(model, config.train)
        if score and lora is not None:
            model.score.requires_grad_(True)
        if config.lr_groups:
            parse_lr_groups(
                config.lr_groups, [n for n, p in model.named_parameters() if p.requires_grad]
            )
    for flag, store in data.items():
        found += misfits(model, chat, store, flag)
        switch = getattr(model, "switch", None)
        if config.shard and ranks.size > 1 and switch and store.context_length > switch.length:
            found.append(
                f"--shard: positions of this architecture change beyond {switch.length:,} tokens, "
                "so its documents run in passes whose number differs between ranks; leave --shard "
                f"out, or prepare {flag} with --context_length {switch.length}"
            )
    problems(found)
    if lora is not None:
        header.append(("adapter", adapter_in_words(lora, config.lora_4bit)))
        if config.lr < adapter_lr / 2:
            usual = f"usual for an adapter is {adapter_lr:g} or more: ten times that of all weights"
            header.append(("note", f"--lr {config.lr:g}: {usual}"))
    name, revision = base_of(adapter) if adapter else (config.model, config.revision)
    lineage = {"base": name, "revision": revision}
    lineage |= {"adapter": str(adapter)} if adapter else {}
    return Opened(model, chat, lora, lineage, header)


def _unfit_for_others(config: Any) -> list[str]:
    """The flags that architectures other than Whet's own have no use for."""
    found = []
    if config.float8:
        found.append("--float8: works on Whet's own families only; leave it out")
    if config.out_ckpt is not None:
        found.append(f"--out_ckpt: {NO_PT}, which --out does")
    return found


def rendered_as_data(
    chat: Chat,
    chat_template: str | None,
    data: Mapping[str, PackedStore],
    found: list[str],
    header: list[tuple[str, str]],
) -> Chat:
    """`chat` with the template, its variables and date that the first of `data`, which is trained,
    was rendered with: what the trained model is asked with, and saved with. Prompts of a policy are
    no packed data: they are rendered with the model's own."""
    if not data:
        return chat
    (_, trained), *others = data.items()
    if "chat" not in trained.attrs:  # somebody else's, or text
        return chat
    rendered = chat.rendering_as(trained.attrs["chat"], str(trained.path))
    if difference := rendered.difference(chat):
        if chat_template is not None and difference == ANOTHER_TEMPLATE:
            found.append(
                f"--chat_template {chat_template}: {trained.path} was rendered with another one; "
                "prepare it again with this one, or give here what it was prepared with"
            )
        header.append(("template", f"of {trained.path}: {difference}; it's saved with the model"))
    for flag, store in others:
        found += template_misfit(rendered, store, flag, str(trained.path))
    return rendered


def add_tokens(model: Transformer, chat: Chat, chat_template: str) -> tuple[Chat, list[int]]:
    """Give tokenizer and model the control tokens of a template that the base does not know.

    Returns the new chat and the ids whose rows are new.
    """
    chat, added = add_chat_tokens(chat, chat_template)
    if isinstance(model, Transformer):
        grow_embedding(model, chat.tokenizer.vocab_size)
    else:
        model.grow(chat.tokenizer.vocab_size)  # another architecture: foreign.py
    ids = [chat.tokenizer.backend.token_to_id(token) for token in added]
    return chat, [i for i in ids if i is not None]


def put_adapter(
    model: Transformer,
    config: Any,
    adapter: Path | None,
    new_rows: list[int],
    device: torch.device,
) -> LoRA:
    """Freeze everything but an adapter and the new rows: a new one by the flags, or that in the
    directory `adapter`, which is trained further. Returns its settings."""
    if adapter is not None and new_rows:
        raise UserError(
            f"{adapter}: an adapter can't be given tokens that it lacks; merge it first: "
            f"whet export {adapter} --merge --out DIR"
        )
    if config.lora_4bit:
        quantize_base(model, device)
    if adapter is not None:
        return continue_adapter(model, adapter)
    lora = LoRA(
        config.lora_rank,
        config.lora_alpha,
        config.lora_targets,
        config.lora_dropout,
        dora=config.lora_dora,
    )
    apply_lora(model, lora, new_rows, config.seed)
    if isinstance(model, Transformer):
        return lora
    kinds = dict.fromkeys(kind_of(name) for name, _ in adapters(model))
    return replace(lora, targets=",".join(kinds))  # another architecture's: which ones it got


def select_trainable(model: nn.Module, pattern: str) -> list[str]:
    """Train the parameters that `pattern` names, freeze the others, and return the trained names.

    `pattern` is `re:` and a regular expression that is searched for in Whet's parameter names:
    `re:mlp` (every MLP), `re:layers[.]2[0-3][.]` (four layers), `re:norm`. Raises UserError for
    another form, a wrong expression, and one that matches nothing.
    """
    if wrong := parameters(pattern):
        raise UserError(f"--train {pattern}: {wrong}")
    names = [name for name, _ in model.named_parameters()]
    chosen = [name for name in names if re.search(pattern.removeprefix("re:"), name)]
    if not chosen:
        some = ", ".join(names[:: max(1, len(names) // 4)])
        raise UserError(f"--train {pattern}: matches no parameter; names look like {some}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in set(chosen))
    return chosen


def adapter_in_words(lora: LoRA, four_bits: bool) -> str:
    """The adapter's settings in one line."""
    kinds = [("rsLoRA", lora.rslora), ("DoRA", lora.dora), ("on a base in 4 bits", four_bits)]
    words = [f"rank {lora.rank}, alpha {lora.alpha:g}, on {lora.targets}"]
    words += [f"dropout {lora.dropout:g}"] if lora.dropout else []
    return ", ".join(words + [word for word, used in kinds if used])


def find_chat(directory: Path | None, model: Path, chat_template: str | None) -> Chat | None:
    """--tokenizer's, or the model's own; a `.pt` has none, and a directory may have none."""
    home = directory or (tokenizer_home(model) if is_adapter(model) else model)
    has_one = (home / "tokenizer.json").is_file() or find_convertible(home) is not None
    return read_chat(home, chat_template) if directory or has_one else None


def run_tuned(config: C, command: str, build: Callable[[C, Ranks], Stage]) -> int:
    """`run_stage`, with the settings that fit into the memory where --auto asks for them."""
    fit = partial(with_proposal, build=build) if config.auto else None
    return run_stage(config, command, build, fit)


def describe(model: Transformer) -> str:
    """The model in one line."""
    count, config = sum(p.numel() for p in model.parameters()), model.config
    return (
        f"{count:,} parameters, {config.n_layers} layers of width {config.width}, "
        f"vocabulary {config.vocab_size:,}"
    )


@dataclass(frozen=True)
class ModelWriter:
    """Writes the trained model, or its adapter, with its lineage; and the `.pt` if asked for."""

    chat: Chat | None
    lineage: dict[str, Any] = field(default_factory=dict)
    out_ckpt: Path | None = None
    """A `.pt` file besides, of the final model."""
    out: Path | None = None
    """The run folder, where the final model goes."""
    lora: LoRA | None = None
    dtype: torch.dtype | None = None
    """What the weights are rounded to; None: as they are. An adapter stays in float32."""
    without_weights: bool = False
    """Write all but the weights: of large models a rehearsal does no more."""

    def __call__(self, model: nn.Module, directory: Path, metrics: dict[str, float]) -> None:
        """All ranks call it: a sharded model is gathered first. Only rank 0 writes."""
        state = whole_weights(model)
        if not is_first():
            return
        whole: Any = unwrap(model)
        lineage = {**self.lineage, "metrics": metrics}
        if self.lora is not None and getattr(whole.config, "score", False):
            # PEFT would save the score beside the adapter; a whole model opens everywhere.
            whole = deepcopy(whole).float()
            merge_lora(whole)
        elif self.lora is not None:
            base = str(self.lineage["base"])
            save_adapter(whole, directory, self.lora, base, self.chat, lineage, state=state)
            return
        save_model(
            whole,
            directory,
            self.chat,
            lineage,
            self.dtype,
            state=state,
            without_weights=self.without_weights,
        )
        if self.out_ckpt is not None and directory == self.out and not self.without_weights:
            step, stage = int(metrics.get("step", 0)), self.lineage["stage"]
            save_pt(whole, self.out_ckpt, stage, step, metrics, self.dtype, state=state)

    def rehearse(self, model: nn.Module) -> None:
        """Write beside `out` what will be written at the end, read it back and remove it.

        On rank 0, before the model is spread. Of weights above `REHEARSED_BYTES` only the space is
        looked for, and of other architectures the layout. Raises UserError for whatever fails: it
        would have cost the training.
        """
        assert self.out is not None, "a rehearsal needs a run folder"
        aside = nearest(self.out) / f".rehearsal.{os.getpid()}.saving"
        trial = replace(
            self,
            out=aside,
            out_ckpt=self.out_ckpt and aside / "model.pt",
            without_weights=saved_bytes(model.state_dict(), self.dtype) > REHEARSED_BYTES,
        )
        try:
            with torch.random.fork_rng(devices=[]):
                trial(model, aside, {})
        except (UserError, MemoryError):
            raise
        except Exception as error:  # whatever it is, the end of the training would meet it
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            raise UserError(
                f"--out {self.out}: the trained model could not be saved, so training does not "
                f"begin: {reason}"
            ) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def writer(
    config: TrainSettings, opened: Opened, stage: str, facts: Mapping[str, Any]
) -> ModelWriter:
    """Saves the model of `stage` with where it comes from: `facts` of its data, its base, and the
    settings, as the SHA-256 of the run's config.toml."""
    digest = hashlib.sha256(as_toml(config).encode()).hexdigest()
    lineage = {"stage": stage, **facts, **opened.lineage, "config_hash": digest}
    dtype = saved_as("same", opened.model.config.hf)
    return ModelWriter(opened.chat, lineage, config.out_ckpt, config.out, opened.lora, dtype)
