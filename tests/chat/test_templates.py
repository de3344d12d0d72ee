"""Every real template, over every kind of conversation: encoded by the rules or refused by name."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.chat import rules, suite
from whet.chat.certificate import REASONS, Refused

OUTCOMES = Path(__file__).with_name("outcomes.json")
ALL_TOKENIZERS = ("gpt2", "qwen2", "tinyllama", "mistral_7b", "phi3", "minimind", "olmo2", "pythia")
A_FEW = (
    "qwen-qwen3-0.6b.jinja",
    "mistral-common-v1_spm.jinja",
    "llama4.jinja",
    "gemma3n.jinja",
    "vllm-chatml.jinja",
    "phi_4.jinja",
)


def outcomes(tokenizer_folder: Path, template: Path) -> dict[str, list[str]]:
    """Outcome -> conversations, and the stop tokens; every encoded one is checked by the rules."""
    chat = suite.fitted(tokenizer_folder, template)
    oracle = rules.Oracle(chat)
    found: dict[str, list[str]] = {
        "stops": [chat.tokenizer.decode([i], skip_special=False) for i in chat.stop_ids]
    }
    for name, messages, tools in suite.everything():
        try:
            encoded = rules.check(messages, tools, chat, oracle)
            one = "encoded" if len(encoded.examples) == 1 else "split"
            outcome = "composed" if encoded.certificate.composed else one
        except Refused as refused:
            outcome = refused.refusal.kind
        except AssertionError as error:
            raise AssertionError(f"{template.name}, {name}: {error}") from error
        found.setdefault(outcome, []).append(name)
    assert set(found) <= {"stops", "encoded", "split", "composed", *REASONS}
    return found


def brief(found: dict[str, list[str]]) -> dict[str, list[str] | str]:
    """`found` as it is kept: "all" where every conversation has one outcome."""
    everything = [name for name, _, _ in suite.everything()]
    return {k: "all" if names == everything else names for k, names in found.items()}


def templates(shared_data: Path) -> list[Path]:
    return sorted((shared_data / "chat_templates").glob("*.jinja"))


@pytest.mark.parametrize("part", range(4))
def test_every_template(shared_data: Path, part: int) -> None:
    """With a byte-level tokenizer. What becomes of each conversation is held in outcomes.json."""
    known = json.loads(OUTCOMES.read_text(encoding="utf-8"))
    chosen = templates(shared_data)[part::4]
    for template in chosen:
        found = outcomes(shared_data / "tokenizers" / "minimind", template)
        assert brief(found) == known[template.name], template.name


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["tinyllama", "phi3", "pythia"])
def test_every_template_with_another_tokenizer(shared_data: Path, tokenizer: str) -> None:
    counts: Counter[str] = Counter()
    for template in templates(shared_data):
        found = outcomes(shared_data / "tokenizers" / tokenizer, template)
        counts.update({outcome: len(names) for outcome, names in found.items()})
    assert counts["encoded"] > 1650
    assert counts["tokens"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ALL_TOKENIZERS)
@pytest.mark.parametrize("template", A_FEW)
def test_every_tokenizer(shared_data: Path, tokenizer: str, template: str) -> None:
    folder = shared_data / "tokenizers" / tokenizer
    found = outcomes(folder, shared_data / "chat_templates" / template)
    assert len(found.get("encoded", []) + found.get("split", []) + found.get("composed", [])) > 8
    assert "tokens" not in found


def main(shared: Path) -> None:
    """Write outcomes.json anew: read the difference before you commit it."""
    lines = []
    for template in templates(shared):
        found = json.dumps(brief(outcomes(shared / "tokenizers/minimind", template)))
        lines.append(f'"{template.name}": {found}')
    OUTCOMES.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(__file__).resolve().parents[3] / "shared" / "data")
