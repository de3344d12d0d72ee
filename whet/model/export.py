"""`whet export`: write a model for other tools, merge an adapter into its base.

Whatever is written is opened again and compared with the model it was made from. `gguf` is what
llama.cpp and Ollama run (`gguf.py`); `gguf-ready` is the `hf` layout with a check that llama.cpp's
`convert_hf_to_gguf.py` knows the architecture and every name of a tensor; its tables
(`gguf-py/gguf/tensor_mapping.py`) gave the names here.
"""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from whet.chat.chat import Chat, load_tokenizer
from whet.config import problems
from whet.errors import UserError
from whet.files import PT, read_json, replaced, replaced_folder, unwritable, unwritable_folder
from whet.flags.export import Config
from whet.hub import find_model, is_adapter
from whet.model.config import ModelConfig
from whet.model.decoder import Transformer
from whet.model.gguf import notes, write_gguf
from whet.model.gguf_tokenizer import modelfile, tokenizer_metadata
from whet.model.hf.checkpoint import (
    check_vocabulary,
    file_places,
    probe,
    relative_difference,
    save_model,
    save_pt,
)
from whet.model.hf.config import to_hf
from whet.model.hf.families import CLASSES, OWN_LAYOUT
from whet.model.hf.weights import rounding, saved_as
from whet.model.lora import read as adapter
from whet.model.lora.lora import merge_lora
from whet.model.open import is_foreign, load_backbone_from_ckpt, open_adapter
from whet.progress import say

_GGUF_NAME = re.compile(
    r"model\.embed_tokens\.weight|model\.norm\.weight|lm_head\.weight"
    r"|model\.layers\.\d+\.(self_attn\.([qkvo]_proj|qkv_proj)|mlp\.(gate|up|down|gate_up)_proj)"
    r"\.(weight|bias)"
    r"|model\.layers\.\d+\.(self_attn\.[qk]_norm|(input|post_attention|pre_feedforward|"
    r"post_feedforward)_layernorm)\.weight"
    r"|transformer\.(wte|wpe)\.weight|transformer\.ln_f\.(weight|bias)"
    r"|transformer\.h\.\d+\.(ln_[12]|attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)"
    r"\.(weight|bias)"
)
_VOCABULARIES = ("tokenizer.model", "tokenizer.json")


def main(config: Config) -> int:
    """Run `whet export`."""
    path = find_model(config.run, config.revision)
    _check_out(path, config)
    model = _open(path, config)
    chat = _chat(path, config)
    lineage = _lineage(path)
    if config.to == "gguf":
        return _write_gguf(model, chat, config)
    assert config.dtype != "q8_0", "checked with the flags"
    dtype = saved_as(config.dtype, model.config.hf)
    if line := rounding(config.dtype, model.config):
        say(line)
    if config.to == "pt":
        metrics = dict(lineage.get("metrics", {}))
        step = int(metrics.get("step", lineage.get("step", 0)))
        save_pt(model, config.out, str(lineage.get("stage", "export")), step, metrics, dtype)
        say(f"{config.out}: one file, read back and equal")
        return 0
    if model.config.family == OWN_LAYOUT:
        raise UserError(
            f"{config.run}: no family of transformers computes what this model does "
            "(learned positions with a bias on the head); --to pt can be written"
        )
    if config.to == "gguf-ready":
        check_gguf(model.config, path if config.tokenizer is None else config.tokenizer)
    save_model(model, config.out, chat, lineage, dtype)
    if config.to == "gguf-ready":
        _copy_sentencepiece(config.tokenizer or path, config.out)
        say(f"python convert_hf_to_gguf.py {config.out}    # in llama.cpp")
    say(f"{config.out}: a model directory, read back and equal")
    return 0


def _write_gguf(model: Transformer, chat: Chat | None, config: Config) -> int:
    """A folder with `model.gguf` and Ollama's Modelfile."""
    assert chat is not None, "only a .pt is written without a tokenizer"
    kind = (
        "Q8_0" if config.dtype == "q8_0" else _GGUF_TYPES[saved_as(config.dtype, model.config.hf)]
    )
    check_vocabulary(model.config, chat, config.run)
    tokenizer = tokenizer_metadata(chat, model.config.vocab_size)
    nbytes = sum(p.numel() * (1 if kind == "Q8_0" else 4) for p in model.parameters())
    with replaced_folder(config.out, nbytes) as aside:
        write_gguf(model, aside / "model.gguf", kind, config.out.name, tokenizer)
        text = modelfile(chat, model.config, "model.gguf")
        (aside / "Modelfile").write_text(text, encoding="utf-8")
    for note in notes(model.config):
        print(f"note: {note}", file=sys.stderr)
    say(f"{config.out / 'model.gguf'}: {kind}, read back and equal")
    say(f"llama-cli -m {config.out / 'model.gguf'}    # llama.cpp")
    say(f"ollama create NAME -f {config.out / 'Modelfile'}    # Ollama")
    return 0


_GGUF_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def _check_out(path: Path, config: Config) -> None:
    """Refuse an `--out` that is read, too: an adapter's base, once merged, would be merged again
    whenever the adapter is opened."""
    inputs = [path, config.tokenizer]
    if path.is_dir() and is_adapter(path):
        inputs.append(Path(adapter.base_of(path)[0]))
    if config.to == "pt":
        problems(unwritable("--out", config.out, inputs, PT))
    else:
        problems(unwritable_folder("--out", config.out, inputs))


def _open(path: Path, config: Config) -> Transformer:
    base = adapter.find_base(path) if path.is_dir() and is_adapter(path) else path
    if config.to != "hf" and is_foreign(base):
        raise UserError(
            f"--to {config.to}: {base} is of an architecture that is not Whet's own; --to hf "
            "writes a model directory, which llama.cpp's own converter may know"
        )
    if not (path.is_dir() and is_adapter(path)):
        if config.merge:
            raise UserError(f"--merge: {config.run} is a whole model, it has no adapter to merge")
        return load_backbone_from_ckpt(path, score=None)
    if not config.merge:
        raise UserError(
            f"{config.run}: is an adapter of {adapter.base_of(path)[0]}; it can be used as it is, "
            "or --merge makes a whole model of both"
        )
    model = open_adapter(path)
    merge_checked(model)
    return model


@torch.no_grad()
def merge_checked(model: Transformer) -> None:
    """Merge the adapter of a float32 `model`. Raises RuntimeError if its logits change."""
    before = probe(model.eval())
    merge_lora(model)
    difference = relative_difference(probe(model), before)
    if not difference <= 1e-4:
        raise RuntimeError(f"merged, the model's logits differ by {difference:.2g} (relative)")
    say(f"merged: the logits differ by {difference:.1g} (relative) from those of base and adapter")


def check_gguf(config: ModelConfig, tokenizer: Path) -> None:
    """Raise UserError if llama.cpp's converter would not know what is written for `config`."""
    values = to_hf(config)
    expected = CLASSES.get(values["model_type"])
    said = values.get("architectures") or []
    found = []
    if expected is None or expected not in said:
        found.append(
            f"config.json: architectures is {said}, model_type {values['model_type']!r}; "
            f"the converter expects {expected or 'one of ' + ', '.join(CLASSES)}"
        )
    unknown = [n for n in {p.name for p in file_places(config).values()} if not is_gguf_name(n)]
    found += [f"{name}: llama.cpp's converter knows no tensor of this name" for name in unknown]
    if not any((tokenizer / name).is_file() for name in _VOCABULARIES):
        found.append(f"{tokenizer}: the converter needs {' or '.join(_VOCABULARIES)}")
    problems(found)


def is_gguf_name(name: str) -> bool:
    """Whether llama.cpp's converter knows a tensor of this name."""
    return _GGUF_NAME.fullmatch(name) is not None


def _copy_sentencepiece(source: Path, directory: Path) -> None:
    """The converter prefers `tokenizer.model` where a model was made with one."""
    if (source / "tokenizer.model").is_file():
        with replaced(directory / "tokenizer.model") as aside:
            shutil.copyfile(source / "tokenizer.model", aside)


def _chat(path: Path, config: Config) -> Chat | None:
    """The chat to write; a `.pt` has none."""
    if config.to == "pt":
        return None
    directory = config.tokenizer or adapter.tokenizer_home(path)
    if directory.is_file():
        raise UserError(
            f"{config.run}: a .pt has no tokenizer; name its directory: --tokenizer DIR"
        )
    return load_tokenizer(directory)


def _lineage(path: Path) -> dict[str, Any]:
    lineage = path / "whet.json"
    known = read_json(lineage) if path.is_dir() and lineage.is_file() else {}
    return {**known, "exported_from": str(path)}
