"""A tokenizer as GGUF's metadata, and Ollama's Modelfile.

llama.cpp tokenises by code of its own. Of byte-level BPE it knows the ways to split a text by name
(`tokenizer.ggml.pre`), found here by the pattern in `tokenizer.json`; a pattern without a name is
refused. SentencePiece's BPE merges by the score of each piece; where a `tokenizer.json` lists
merges, a piece's score is minus the rank of its merge, which gives the same order.
"""

import json
import re
from typing import Any

from whet.chat.chat import Chat
from whet.chat.dialect import beginning_of
from whet.errors import UserError
from whet.model.config import ModelConfig

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BY_PATTERN = {
    # (digits a piece, whether whole words skip the merges): llama.cpp's name
    (r"\p{N}{1,3}", True): "llama-bpe",
    (r"\p{N}{1,3}", False): "dbrx",
    (r"\p{N}", False): "qwen2",
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens, by llama.cpp's numbers."""


def tokenizer_metadata(chat: Chat, rows: int) -> dict[str, Any]:
    """The keys below `tokenizer.`; `rows` of the embedding, of which the last may have no token.

    Raises UserError for a tokenizer that llama.cpp does not have.
    """
    tokenizer = chat.tokenizer
    described = json.loads(tokenizer.backend.to_str())
    model = described["model"]
    if model.get("type") != "BPE":
        raise UserError(f"--to gguf: a tokenizer of type {model.get('type')} is not supported")
    vocabulary = {**model["vocab"], **tokenizer.added}
    texts = {number: text for text, number in vocabulary.items()}
    pieces = [texts.get(number, f"[PAD{number}]") for number in range(rows)]
    added = {token["id"]: token["special"] for token in described.get("added_tokens") or []}
    unknown = vocabulary.get(model.get("unk_token"))
    kinds = [
        UNUSED
        if number not in texts
        else UNKNOWN
        if number == unknown
        else (CONTROL if added[number] or number in chat.control.values() else USER_DEFINED)
        if number in added
        else BYTE
        if model.get("byte_fallback") and re.fullmatch("<0x..>", text)
        else NORMAL
        for number, text in enumerate(pieces)
    ]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    stops = list(chat.stop_ids)
    values: dict[str, Any] = {"ggml.tokens": pieces, "ggml.token_type": kinds}
    if model.get("byte_fallback"):
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(merges):
            ranks.setdefault("".join(merge.split(" ")), rank)
        scores = [-float(ranks.get(piece, len(merges))) for piece in pieces]
        before = '"Prepend"' in json.dumps(described.get("normalizer"))
        values |= {"ggml.model": "llama", "ggml.pre": "default", "ggml.scores": scores}
        values["ggml.add_space_prefix"] = before or "Metaspace" in json.dumps(described)
    else:
        values |= {"ggml.model": "gpt2", "ggml.pre": _splitting(described), "ggml.merges": merges}
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": stops[0] if stops else tokenizer.eos_id,
        "eot_token_id": stops[1] if len(stops) > 1 else None,
        "unknown_token_id": unknown,
        "padding_token_id": tokenizer.pad_id,
    }
    values |= {f"ggml.{name}": number for name, number in ids.items() if number is not None}
    begun = tokenizer.backend.encode("a").ids
    values["ggml.add_bos_token"] = bool(begun) and begun[0] == tokenizer.bos_id
    values["ggml.add_eos_token"] = False
    values["chat_template"] = chat.template.source
    return values


def _splitting(described: dict[str, Any]) -> str:
    """llama.cpp's name for the way a byte-level tokenizer splits texts."""
    steps = described.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers") or [steps]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        pattern = steps[0].get("pattern", {}).get("Regex", "")
        skips = bool(described["model"].get("ignore_merges"))
        for (digits, skipping), name in _BY_PATTERN.items():
            if pattern == f"{_ENGLISH}{digits}{_REST}" and skips == skipping:
                return name
    raise UserError(
        f"--to gguf: this tokenizer splits texts in a way that Whet knows no name of llama.cpp's "
        f"for ({json.dumps(described.get('pre_tokenizer'))[:160]}); --to gguf-ready writes a "
        "directory for llama.cpp's own converter"
    )


def modelfile(chat: Chat, config: ModelConfig, weights: str) -> str:
    """Ollama's Modelfile for the file `weights` beside it."""
    texts = [chat.tokenizer.backend.id_to_token(number) for number in chat.stop_ids]
    lines = [f"FROM ./{weights}", *(f"PARAMETER stop {json.dumps(text)}" for text in texts)]
    lines.append(f"PARAMETER num_ctx {min(config.max_positions, 8192)}")
    found = ollama_template(chat)
    if found is None:
        lines.append("# Its chat template has no form of Ollama's: the one in the file holds.")
    else:
        lines.append(f'TEMPLATE """{found}"""')
    return "\n".join(lines) + "\n"


def ollama_template(chat: Chat) -> str | None:
    """The chat template in Ollama's language, where each message is its words between two texts.

    None where such a template would write another text than the real one.
    """
    said = [("system", "Sss."), ("user", "Qqq."), ("assistant", "Www."), ("user", "Eee.")]
    system, user, reply, again = ({"role": role, "content": text} for role, text in said)
    conversations = ([user], [user, reply, again], [system, user])
    try:
        rendered = [chat.dialect.render(messages, prompt=True) for messages in conversations]
    except UserError:
        return None
    begun = chat.tokenizer.backend.encode("a").ids[:1]
    if begun == [chat.tokenizer.bos_id]:  # llama.cpp writes it, by the file's metadata
        bos = str(chat.tokenizer.backend.id_to_token(begun[0]))
        rendered = [text.removeprefix(bos) for text in rendered]
    first, whole, instructed = rendered
    before, _, after = first.partition("Qqq.")
    between = whole.partition("Www.")[2].partition("Eee.")[0]
    header = beginning_of(before[::-1], between[::-1])[::-1]  # the end that both have
    opening, end = before.removesuffix(header), between.removesuffix(header)
    turn = instructed.removeprefix(opening).removesuffix(f"{header}Qqq.{after}")
    texts = (opening, header, after, end, turn)
    if (
        whole != f"{first}Www.{end}{header}Eee.{after}"
        or instructed != f"{opening}{turn}{header}Qqq.{after}"
        or turn.count("Sss.") != 1
        or any("{{" in text or '"""' in text for text in texts)
    ):
        return None
    parts = {
        "system": turn.replace("Sss.", "{{ .Content }}"),
        "user": f"{header}{{{{ .Content }}}}{after}",
        "assistant": f"{{{{ .Content }}}}{end}",
    }
    cases = [f'{{{{ if eq .Role "{role}" }}}}{text}{{{{ end }}}}' for role, text in parts.items()]
    return f"{opening}{{{{ range .Messages }}}}{''.join(cases)}{{{{ end }}}}"
