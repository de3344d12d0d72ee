"""Opening and saving other architectures through transformers' own classes (`foreign.py`).

Neither pickles nor code that comes with a model are run.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whet.errors import UserError
from whet.files import read_json
from whet.model.foreign import UNLIKE, ForeignModel
from whet.model.precision import quiet_torchao

WAYS = {
    "positions": "documents are packed; restarting positions keep them apart",
    "mask": "documents are packed; a mask keeps them apart",
    "alone": "it can't keep packed documents apart, so it runs one document a row",
}
_DEQUANTIZED = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}
"""Quantised files that transformers opens as plain matrices."""


def load_foreign(
    directory: Path, *, dtype: torch.dtype, device: torch.device, quiet: bool = False
) -> ForeignModel:
    """Open a model directory as a `ForeignModel`; files in mxfp4 or fp8 become plain matrices.

    Raises UserError without transformers, for an architecture it does not know or that is no causal
    language model, for other quantised files, and if weights are missing, left over or misshaped.
    """
    inner = _open(directory, dtype)
    inner.to(device)
    try:
        model = ForeignModel(inner)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from None
    except UNLIKE as error:
        other = "" if dtype == torch.float32 else f" in {dtype}; float32 may do"
        raise UserError(
            f"{directory}: {type(inner).__name__} does not run on tokens alone, as a causal "
            f"language model of transformers does ({_reason(error)}){other}; Whet can't train this "
            "architecture"
        ) from None
    # transformers puts the opened precision in its place; saving asks for what the file has.
    said = read_json(directory / "config.json")
    own = said.get("dtype") or said.get("torch_dtype")
    model.config = replace(model.config, hf=model.config.hf | {"dtype": own})
    if not quiet:
        note = f"{directory}: {type(inner).__name__} of transformers; {WAYS[model.way]}"
        print(note, file=sys.stderr, flush=True)
    return model


def quiet_transformers() -> Any:
    """The module transformers, which prints nothing of its own, nor of torchao, which it imports.

    Raises ImportError where it is not installed.
    """
    quiet_torchao()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _open(directory: Path, dtype: torch.dtype) -> Any:
    """The model of transformers with every weight of the files. Nothing is computed."""
    try:
        transformers = quiet_transformers()
    except ImportError:
        raise UserError(
            f"{directory}: this architecture is not Whet's own; pip install whet[transformers] "
            "opens it through transformers"
        ) from None
    safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(directory, **safe)
        plain = _plain_matrices(directory, config)
        opened: Any = transformers.AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **plain,
            **safe,
        )
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # an architecture's code fails in ways of all kinds
        reason = _reason(error)
        if "custom code" in reason:
            reason = "it needs code that comes with it, and Whet runs none"
        raise UserError(f"{directory}: transformers can't open it: {reason}") from None
    inner, info = opened
    if plain:
        inner._weight_conversions = None  # saving must not go back to the quantised layout
        for parameter in inner.parameters():
            if parameter.dtype != torch.float32:  # which the class may keep
                parameter.data = parameter.data.to(dtype)
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(key):
            some = ", ".join(str(name) for name in sorted(info[key], key=str)[:5])
            raise UserError(f"{directory}: weights do not fit the configuration: {key}: {some}")
    return inner


def _plain_matrices(directory: Path, config: Any) -> dict[str, Any]:
    """Arguments with which transformers opens quantised files as plain matrices."""
    said = getattr(config, "quantization_config", None)
    if said is None:
        return {}
    import transformers

    values = said if isinstance(said, dict) else said.to_dict()
    method = str(values.get("quant_method"))
    if method not in _DEQUANTIZED:
        raise UserError(
            f"{directory}: quantised ({method}): could not be saved after training; open the model "
            f"it was made from, or have transformers write plain matrices of it first "
            "(from_pretrained, dequantize, save_pretrained)"
        )
    plain = getattr(transformers, _DEQUANTIZED[method])(dequantize=True)
    return {"quantization_config": plain}


def _reason(error: Exception) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    plain = isinstance(error, ValueError | OSError | ImportError)
    return (first.strip() if plain and first else f"{type(error).__name__}: {first}")[:300]


@torch.no_grad()
def write_foreign(
    model: ForeignModel,
    state: dict[str, Tensor],
    directory: Path,
    dtype: torch.dtype | None,
    shard_bytes: int,
) -> None:
    """Write weights and config by transformers, open them again and compare every weight.

    `state` has the names of `model`; `dtype` is what weights are rounded to, None leaves them as
    they are. Nothing is computed. Raises RuntimeError if what is read back differs.
    """
    values = _rounded(model, state, dtype)
    model.inner.save_pretrained(directory, state_dict=dict(values), max_shard_size=shard_bytes)
    again = _open(directory, dtype or next(iter(values.values())).dtype).state_dict()
    differs = sorted(set(values) ^ set(again))
    differs += [k for k in again if k in values and not _equal(values[k], again[k])]
    if differs:
        raise RuntimeError(f"{directory}: {differs[0]} was saved, but read back it differs")


def check_writable(model: ForeignModel) -> None:
    """Try what `write_foreign` does to names and layouts, without values."""
    from transformers.core_model_loading import revert_weight_conversion

    revert_weight_conversion(
        model.inner, {name: value.to("meta") for name, value in model.inner.state_dict().items()}
    )


def _rounded(
    model: ForeignModel, state: dict[str, Tensor], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """`state` with transformers' names, in `dtype` but for what the class keeps in float32."""
    inner = model.inner
    kept = {
        *(getattr(inner, "_keep_in_fp32_modules", None) or ()),
        *(getattr(inner, "_keep_in_fp32_modules_strict", None) or ()),
    }
    values = {}
    for full_name, value in state.items():
        name = full_name.removeprefix("inner.")
        exact = not value.is_floating_point() or not kept.isdisjoint(name.split("."))
        values[name] = value.to("cpu", None if exact else dtype)
    return values


def _equal(saved: Tensor, found: Tensor) -> bool:
    return saved.shape == found.shape and torch.equal(saved.to(found.dtype), found)
