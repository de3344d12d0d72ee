"""Parameter groups, optimizers and the learning rate as a pure function of the step."""

import fnmatch
import math
import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from whet.errors import UserError
from whet.flags.choices import Schedule
from whet.model.embedding import TrainableRows
from whet.model.precision import quiet_torchao

BETA1 = 0.9  # of AdamW's gradient average; nobody sets another
WSD_DECAY_SHARE = 0.2  # arXiv:2410.11840 finds 10-20 % of the steps enough for the decay


def lr_at(
    step: int,
    total_steps: int,
    *,
    peak: float,
    schedule: Schedule = "cosine",
    warmup: float = 0.0,
    final: float = 0.0,
) -> float:
    """Learning rate of optimizer step `step` (0-based) out of `total_steps`.

    `warmup` is a fraction of the steps if below 1, else a number of steps; the rate rises linearly
    and reaches `peak` on the step after it. The last step has `final * peak`.
    """
    warmup_steps = warmup_length(total_steps, warmup)
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    begin = decay_begin(total_steps, schedule, warmup)
    if schedule == "constant" or step < begin:
        return peak
    # 0 on the first step after `begin`, 1 on the last step of the run
    done = min(1.0, (step - begin) / max(1, total_steps - 1 - begin))
    left = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return peak * (final + (1 - final) * left)


def warmup_length(total_steps: int, warmup: float) -> int:
    """Steps of the warm-up."""
    return min(int(warmup if warmup >= 1 else warmup * total_steps), total_steps)


def decay_begin(total_steps: int, schedule: Schedule, warmup: float) -> int:
    """The step (0-based) from which the learning rate falls; `total_steps` if it never does."""
    if schedule == "constant":
        return total_steps
    begin = warmup_length(total_steps, warmup)
    if schedule == "wsd":
        begin = max(begin, total_steps - round(WSD_DECAY_SHARE * total_steps))
    return begin


def matches(pattern: str, name: str) -> bool:
    """`re:EXPRESSION` searches the name; anything else is a shell pattern for the whole name."""
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def parse_lr_groups(texts: Sequence[str], names: Iterable[str]) -> list[tuple[str, float]]:
    """Read `PATTERN=FACTOR` flags; each pattern must match a trained parameter."""
    groups, known = [], list(names)
    for text in texts:
        pattern, _, factor = text.rpartition("=")
        try:
            groups.append((pattern, float(factor)))
        except ValueError:
            raise UserError(f"--lr_groups {text}: expected PATTERN=FACTOR, as embed*=0.1") from None
        if not 0 <= groups[-1][1] < math.inf:
            raise UserError(f"--lr_groups {text}: the factor must be finite, 0 or more")
        try:
            found = any(matches(pattern, name) for name in known)
        except re.error as error:
            raise UserError(f"--lr_groups {text}: not a regular expression: {error}") from None
        if not pattern or not found:
            raise UserError(f"--lr_groups {text}: matches none of the trained parameters")
    return groups


def parameter_groups(
    model: nn.Module, weight_decay: float, lr_groups: Sequence[tuple[str, float]] = ()
) -> list[dict]:
    """Split the trained parameters into groups with their own weight decay and `lr_factor`.

    Decay pulls weights towards zero. That is right for matrices that multiply activations; it is
    wrong for gains (their neutral value is 1), for biases, and for embeddings, whose rows of rare
    tokens would decay at every step and learn at few; so for the rows of new tokens. The first
    matching entry of `lr_groups` wins.
    """
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding | TrainableRows)
        for parameter in module.parameters()
    }
    groups: dict[tuple[bool, float, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = parameter.ndim >= 2 and id(parameter) not in embeddings
        factor = next((f for pattern, f in lr_groups if matches(pattern, name)), 1.0)
        # An untied output head is a matrix, but its rows are tokens, not directions to
        # orthogonalise: https://kellerjordan.github.io/posts/muon/
        for_muon = parameter.ndim == 2 and is_matrix and not name.endswith("head.weight")
        group = groups.setdefault(
            (is_matrix, factor, for_muon),
            {
                "params": [],
                "weight_decay": weight_decay if is_matrix else 0.0,
                "lr_factor": factor,
                "for_muon": for_muon,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def make_optimizers(kind: str, groups: list[dict], *, beta2: float) -> list[torch.optim.Optimizer]:
    """Build the optimizer(s) for `groups`; `set_lr` gives them their learning rates.

    Raises UserError if `kind` is adamw8bit and torchao is not installed.
    """
    betas = (BETA1, beta2)
    if kind == "adamw8bit":
        quiet_torchao()
        try:
            from torchao.optim import AdamW8bit
        except ImportError:
            raise UserError(
                "--optimizer adamw8bit: torchao is not installed; pip install 'whet[cuda]'"
            ) from None
        return [AdamW8bit(groups, lr=0.0, betas=betas)]
    for_muon = [group for group in groups if kind == "muon" and group["for_muon"]]
    rest = [group for group in groups if not (kind == "muon" and group["for_muon"])]
    optimizers: list[torch.optim.Optimizer] = []
    if for_muon:
        # "match_rms_adamw" scales the update so that AdamW's learning rate and decay fit Muon
        # (arXiv:2502.16982, section 2.2).
        optimizers.append(torch.optim.Muon(for_muon, lr=0.0, adjust_lr_fn="match_rms_adamw"))
    if rest:
        optimizers.append(torch.optim.AdamW(rest, lr=0.0, betas=betas, fused=True))
    return optimizers


def set_lr(optimizers: Sequence[torch.optim.Optimizer], lr: float) -> None:
    """Give every group its learning rate: `lr` times its own factor."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            value = lr * group["lr_factor"]
            if isinstance(group["lr"], Tensor):  # torchao's, which compiles its step around it
                group["lr"].fill_(value)
            else:
                group["lr"] = value


def create_state(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Make the optimizers' state tensors exist, so that saved ones can be read into them.

    A step with zero gradients and a learning rate of 0 changes no weight.
    """
    set_lr(optimizers, 0.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def plain_tensors(name: str, value: Tensor) -> dict[str, Tensor]:
    """`value` as tensors that a file can hold: itself, or the parts of a quantised one by name.

    torchao's 8-bit moments are 8-bit codes, a scale for each block of 256 and a table.
    """
    if not is_traceable_wrapper_subclass(value) or hasattr(value, "full_tensor"):
        return {name: value}
    parts, _ = value.__tensor_flatten__()
    return {f"{name}.{part}": getattr(value, part) for part in parts}
