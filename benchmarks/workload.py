"""The work that every side of a training benchmark does: same weights, same documents, same masks.

`build(folder)` writes, once, a randomly initialised Llama-layout model directory (about 28 M
parameters with GPT-2's vocabulary padded to 50,304) and GSM8K as token ids with their loss masks.
Peers read `examples.jsonl`; Whet reads the same ids and masks from its own packed file.
"""

import json
import os
from pathlib import Path

ROW = 1024
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 50304,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}


def data_folder() -> Path:
    """The folder of real data; WHET_SHARED_DATA names it where it is not beside the repository."""
    beside = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    return Path(os.environ.get("WHET_SHARED_DATA", beside))


def build(folder: Path, documents: int = 1000) -> None:
    """Write model, examples and packed rows into `folder` unless they are there already."""
    from whet.chat.chat import load_tokenizer
    from whet.chat.encode import encode_chat
    from whet.data.formats import to_example

    done = folder / "done"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    chat = load_tokenizer(data_folder() / "tokenizers" / "gpt2")
    model = folder / "model"
    _write_model(model, chat)
    gsm8k = data_folder() / "gsm8k" / "train.jsonl"
    lines = gsm8k.read_text(encoding="utf-8").splitlines()[:documents]
    with open(folder / "examples.jsonl", "w") as out:
        for number, line in enumerate(lines, 1):
            conversation = to_example(json.loads(line), None, str(gsm8k), number)
            encoded = encode_chat(conversation, chat)
            mask = [int(weight) for weight in encoded.loss_mask]
            ids = [int(token) for token in encoded.ids]
            out.write(json.dumps({"input_ids": ids, "assistant_masks": mask}) + "\n")
    (folder / "gsm8k.jsonl").write_text("\n".join(lines) + "\n")
    done.touch()


def _write_model(folder: Path, chat: object) -> None:
    from whet.model.decoder import Transformer, init_weights
    from whet.model.hf.checkpoint import save_model
    from whet.model.hf.config import from_hf

    model = Transformer(from_hf(MODEL))
    init_weights(model, seed=0)
    save_model(model, folder, chat, lineage={"made_by": "benchmarks.workload"})
