"""An adapter's `adapter_config.json`: which modules have adapters, of which rank and scale.

The keys and how names are matched are PEFT's; PEFT itself is the tests' oracle. The file is checked
as a whole, so that the rest of Whet finds values of the kinds it expects.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from whet.config import above_0, problems, share, wrong_values
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


def _rank(value: int) -> str:
    """A check of a number; like those of flags it returns what is wrong, or nothing."""
    return "" if 0 < value < LARGEST else "expected a whole number above 0"


def _names(value: Any) -> str:
    fine = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return "" if fine else "expected names of modules"


def _modules(value: Any) -> str:
    fine = _is_regex(value) if isinstance(value, str) else not _names(value)
    return "" if fine else "expected names of modules, or a regular expression"


def _is_regex(text: str) -> bool:
    try:
        re.compile(rf"(.*\.)?({text})")
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _layers(value: Any) -> str:
    numbers = value if isinstance(value, list) else [value]
    fine = all(type(number) is int and number >= 0 for number in numbers)
    return "" if fine else "expected numbers of layers"


def _patterns(value: Any, is_right: Callable[[Any], bool], what: str) -> str:
    fine = isinstance(value, dict)
    fine = fine and all(_is_regex(key) and is_right(entry) for key, entry in value.items())
    return "" if fine else f"expected {{regular expression: {what}}}"


def _ranks(value: Any) -> str:
    return _patterns(value, lambda n: type(n) is int and not _rank(n), "whole number above 0")


def _alphas(value: Any) -> str:
    return _patterns(value, lambda n: is_number(n) and n > 0, "number above 0")


def _rows(value: Any) -> str:
    each = value.values() if isinstance(value, dict) else [value]
    fine = all(
        isinstance(ids, list)
        and all(type(i) is int and 0 <= i < LARGEST for i in ids)
        and len(set(ids)) == len(ids)
        for ids in each
    )
    return "" if fine else "expected different token ids, or {module: token ids}"


@dataclass(frozen=True)
class PeftConfig:
    """The keys of the file that Whet reads; what is missing or null has the default. Module names
    are the family's, without PEFT's prefix."""

    r: Annotated[int, _rank]
    lora_alpha: Annotated[float, above_0]
    lora_dropout: Annotated[float, share] = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    target_modules: Annotated[Any, _modules] = None
    """A regular expression, `all-linear`, or ends of names; None: the file does not say."""
    exclude_modules: Annotated[Any, _modules] = field(default_factory=list)
    modules_to_save: Annotated[Any, _names] = field(default_factory=list)
    """Modules that are saved whole beside the adapter."""
    layers_to_transform: Annotated[Any, _layers] = field(default_factory=list)
    """The number, or numbers, of the layers that have adapters; empty: all."""
    layers_pattern: Annotated[Any, _modules] = field(default_factory=list)
    """The names under which layers stand; empty: any."""
    rank_pattern: Annotated[Any, _ranks] = field(default_factory=dict)
    alpha_pattern: Annotated[Any, _alphas] = field(default_factory=dict)
    trainable_token_indices: Annotated[Any, _rows] = field(default_factory=list)
    """Ids of the trained rows of the embedding, or {module: ids}."""
    task_type: Any = None
    """SEQ_CLS is a model with a score in place of logits."""

    def rank_of(self, module: str) -> int:
        """The rank of the adapter on `module`."""
        return next((n for key, n in self.rank_pattern.items() if _fits(key, module)), self.r)

    def scale_of(self, module: str) -> float:
        """s = alpha / r, or with rsLoRA alpha / sqrt(r)."""
        rank = self.rank_of(module)
        found = (x for key, x in self.alpha_pattern.items() if _fits(key, module))
        alpha = next(found, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def rows_of(self, module: str, embedding: bool) -> list[int]:
        """The ids of the trained rows of `module`, which is the embedding or the head."""
        rows = self.trainable_token_indices
        if not isinstance(rows, dict):
            return rows if embedding else []
        return next((ids for key, ids in rows.items() if _ends(module, [key])), [])

    def trained_whole(self, module: str) -> bool:
        """Whether `module` is saved whole, trained as a copy of its own: PEFT looks at the end of
        its name, so that `norm` means every module that ends so."""
        return module.endswith(tuple(self.modules_to_save))

    @property
    def names_targets(self) -> bool:
        """Whether the targets may be other modules than linear layers without the head."""
        return self.target_modules not in (None, "all-linear")

    def targeted(self, module: str) -> bool:
        """Whether `module` has an adapter; all-linear does not mean the head.

        Only if the file names targets.
        """
        excluded, targets = self.exclude_modules, self.target_modules
        if isinstance(excluded, str):
            if re.fullmatch(excluded, module):
                return False
        elif _ends(module, excluded):
            return False
        if any(f".{name}." in f".{module}." for name in self.modules_to_save):
            return False
        if isinstance(targets, str):
            every = targets.lower() == "all-linear"
            return every or re.fullmatch(targets, module) is not None
        if module in targets:  # a whole name holds whatever the layers
            return True
        return _ends(module, targets) and self._in_chosen_layers(module)

    def _in_chosen_layers(self, module: str) -> bool:
        chosen, lists = self.layers_to_transform, self.layers_pattern
        if chosen == []:
            return True
        names = "|".join(f"(?:{name})" for name in ([lists] if isinstance(lists, str) else lists))
        found = re.match(rf"(?:.*?\.)?(?:{names or '[^.]*'})\.(\d+)\.", module)
        return found is not None and int(found[1]) in ([chosen] if type(chosen) is int else chosen)


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
    known, never_null = {f.name for f in fields(PeftConfig)}, ("r", "lora_alpha", "lora_dropout")
    said: dict[str, Any] = {
        key: value
        for key, value in ({"r": None, "lora_alpha": None} | values).items()
        if key in known and (value is not None or key in never_null)
    }
    config = PeftConfig(**said)
    problems([f"{path}: {problem}" for problem in [*found, *wrong_values(config)]])
    return config
