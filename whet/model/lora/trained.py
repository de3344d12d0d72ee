"""Choosing by name what is trained."""

import re

from torch import nn

from whet.errors import UserError
from whet.flags.training import parameters


def select_trainable(model: nn.Module, pattern: str) -> list[str]:
    """Train the parameters that `pattern` names, freeze the others, and return the trained names.

    `pattern` is `all`, or `re:` and a regular expression that is searched for in Whet's parameter
    names: `re:mlp` (every MLP), `re:layers[.]2[0-3][.]` (four layers), `re:norm`. Raises UserError
    for another form, a wrong expression, and one that matches nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    expression = read_pattern(pattern)
    chosen = [name for name in names if expression.search(name)]
    if not chosen:
        some = ", ".join(names[:: max(1, len(names) // 4)])
        raise UserError(f"--train {pattern}: matches no parameter; names look like {some}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in set(chosen))
    return chosen


def read_pattern(pattern: str) -> re.Pattern[str]:
    """The expression of such a `pattern`; raises UserError for another form and a wrong one."""
    if wrong := parameters(pattern):
        raise UserError(f"--train {pattern}: {wrong}")
    return re.compile("" if pattern == "all" else pattern[3:])
