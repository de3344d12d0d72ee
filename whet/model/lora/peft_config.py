"""An adapter's `adapter_config.json`: which modules have adapters, of which rank and scale.

The keys and how names are matched are PEFT's; PEFT itself is the tests' oracle. The file is checked
as a whole, so that the rest of Whet finds values of the kinds it expects.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet.config import problems
from whet.files import read_json
from whet.model.config import is_number
from whet.model.hf.keys import LARGEST

CONFIG = "adapter_config.json"
_UNSUPPORTED = (
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "megatron_config",
)


@dataclass(frozen=True)
class PeftConfig:
    """What the file says; module names are the family's, without PEFT's prefix."""

    rank: int
    alpha: float
    dropout: float
    rslora: bool
    dora: bool
    targets: str | list[str] | None
    """A regular expression, `all-linear`, or ends of names; None: the file does not say."""
    excluded: str | list[str]
    whole: list[str]
    """Modules that are saved whole beside the adapter (`modules_to_save`)."""
    layers: list[int]
    """The numbers of the layers that have adapters; empty: all."""
    layer_lists: list[str]
    """The names under which layers stand (`layers_pattern`); empty: any."""
    ranks: dict[str, int]
    alphas: dict[str, float]
    rows: list[int] | dict[str, list[int]]
    """Trained token rows: of the embedding, or {module: ids}."""
    task: str | None = None
    """PEFT's task type: SEQ_CLS is a model with a score in place of logits."""

    def rank_of(self, module: str) -> int:
        """The rank of the adapter on `module`."""
        return next((self.ranks[key] for key in self.ranks if _fits(key, module)), self.rank)

    def scale_of(self, module: str) -> float:
        """s = alpha / r, or with rsLoRA alpha / sqrt(r)."""
        rank = self.rank_of(module)
        alpha = next((self.alphas[key] for key in self.alphas if _fits(key, module)), self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def rows_of(self, module: str, embedding: bool) -> list[int]:
        """The ids of the trained rows of `module`, which is the embedding or the head."""
        if not isinstance(self.rows, dict):
            return self.rows if embedding else []
        return next((ids for key, ids in self.rows.items() if _ends(module, [key])), [])

    def trained_whole(self, module: str) -> bool:
        """Whether `module` is saved whole, trained as a copy of its own: PEFT looks at the end of
        its name, so that `norm` means every module that ends so."""
        return module.endswith(tuple(self.whole))

    @property
    def names_targets(self) -> bool:
        """Whether the targets may be other modules than linear layers without the head."""
        return self.targets is not None and self.targets != "all-linear"

    def targeted(self, module: str) -> bool:
        """Whether `module` has an adapter; all-linear does not mean the head.

        Only if `targets` is not None.
        """
        if isinstance(self.excluded, str):
            if re.fullmatch(self.excluded, module):
                return False
        elif _ends(module, self.excluded):
            return False
        if any(f".{name}." in f".{module}." for name in self.whole):
            return False
        if isinstance(self.targets, str):
            every = self.targets.lower() == "all-linear"
            return every or re.fullmatch(self.targets, module) is not None
        assert self.targets is not None
        if module in self.targets:  # a whole name holds whatever the layers
            return True
        return _ends(module, self.targets) and self._in_chosen_layers(module)

    def _in_chosen_layers(self, module: str) -> bool:
        if not self.layers:
            return True
        lists = "|".join(f"(?:{name})" for name in self.layer_lists) or r"[^.]*"
        found = re.match(rf"(?:.*?\.)?(?:{lists})\.(\d+)\.", module)
        return found is not None and int(found[1]) in self.layers


def _fits(key: str, module: str) -> bool:
    """Whether the key of a pattern, a regular expression for the end of a name, means `module`."""
    return re.fullmatch(rf"(.*\.)?({key})", module) is not None


def _ends(module: str, ends: Iterable[str]) -> bool:
    return any(f".{module}".endswith(f".{end}") for end in ends)


def read_peft_config(directory: Path) -> PeftConfig:
    """Read and check the file in `directory`. Raises UserError for any adapter but LoRA, rsLoRA and
    DoRA on linear layers, and for values of the wrong kind, all at once."""
    path = directory / CONFIG
    values = read_json(path)
    found = [f"{key} = {values[key]!r} is not supported" for key in _UNSUPPORTED if values.get(key)]
    if values.get("peft_type") != "LORA":
        found.append(f"peft_type is {values.get('peft_type')!r}; only LORA is supported")
    if values.get("bias", "none") != "none":
        found.append(f"bias = {values['bias']!r}: trained biases are not supported")
    start = values.get("init_lora_weights", True)
    if isinstance(start, str) and start not in ("gaussian", "eva", "orthogonal"):
        found.append(
            f"init_lora_weights = {start!r} changes the base; convert the adapter first "
            "(PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    checks = {
        "r": (_is_rank, "a whole number above 0"),
        "lora_alpha": (_is_positive, "a number above 0"),
        "lora_dropout": (_is_share, "a number from 0 to 1"),
        "use_rslora": (_is_flag, "true or false"),
        "use_dora": (_is_flag, "true or false"),
        "target_modules": (_is_choice, "names of modules, or a regular expression"),
        "exclude_modules": (_is_choice, "names of modules, or a regular expression"),
        "modules_to_save": (_are_names, "names of modules"),
        "layers_to_transform": (_are_layers, "numbers of layers"),
        "layers_pattern": (_is_choice, "names"),
        "rank_pattern": (_pattern_of(_is_rank), "{regular expression: whole number above 0}"),
        "alpha_pattern": (_pattern_of(_is_positive), "{regular expression: number above 0}"),
        "trainable_token_indices": (_are_rows, "different token ids, or {module: token ids}"),
    }
    values = {"lora_dropout": 0.0, "use_rslora": False, "use_dora": False} | values
    may_be_null = set(checks) - {"r", "lora_alpha", "lora_dropout"}
    found += [
        f"{key} is {values.get(key)!r}; expected {what}"
        for key, (is_right, what) in checks.items()
        if not is_right(values.get(key)) and not (values.get(key) is None and key in may_be_null)
    ]
    problems([f"{path}: {problem}" for problem in found])
    layers, lists = values.get("layers_to_transform"), values.get("layers_pattern")
    return PeftConfig(
        rank=values["r"],
        alpha=values["lora_alpha"],
        dropout=values["lora_dropout"],
        rslora=bool(values["use_rslora"]),
        dora=bool(values["use_dora"]),
        targets=values.get("target_modules"),
        excluded=values.get("exclude_modules") or [],
        whole=values.get("modules_to_save") or [],
        layers=[layers] if isinstance(layers, int) else layers or [],
        layer_lists=[lists] if isinstance(lists, str) else lists or [],
        ranks=values.get("rank_pattern") or {},
        alphas=values.get("alpha_pattern") or {},
        rows=values.get("trainable_token_indices") or [],
        task=values.get("task_type"),
    )


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < LARGEST


def _is_positive(value: Any) -> bool:
    return is_number(value) and value > 0


def _is_share(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_choice(value: Any) -> bool:
    return _is_regex(value) if isinstance(value, str) else _are_names(value)


def _is_regex(text: str) -> bool:
    try:
        re.compile(rf"(.*\.)?({text})")
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _are_layers(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return all(type(number) is int and number >= 0 for number in numbers)


def _pattern_of(is_right: Any) -> Any:
    """A check for a table from regular expressions to what `is_right` accepts."""
    return lambda value: (
        isinstance(value, dict)
        and all(_is_regex(key) and is_right(entry) for key, entry in value.items())
    )


def _are_rows(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(ids, list) and _are_rows(ids) for ids in value.values())
    return (
        isinstance(value, list)
        and all(type(i) is int and 0 <= i < LARGEST for i in value)
        and len(set(value)) == len(value)
    )
