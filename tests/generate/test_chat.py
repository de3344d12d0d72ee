import io
import sys

import pytest

from whet.chat.chat import Chat
from whet.chat.encode import encode_prompt
from whet.chat.template import ChatTemplate
from whet.chat.tokenizer import train_tokenizer
from whet.cli import main
from whet.errors import UserError
from whet.generate.chat import LEAST_ROOM, Config, Talk, repl, text_pieces
from whet.generate.engine import generate
from whet.model.config import llama
from whet.model.decoder import Transformer, init_weights
from whet.model.hf.checkpoint import save_model


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(
        train_tokenizer(["Hello there! Schöne Grüße \N{SLIGHTLY SMILING FACE} 12"] * 5, 290)
    )


@pytest.fixture(scope="module")
def model(chat: Chat) -> Transformer:
    model = Transformer(llama(chat.tokenizer.vocab_size, 32, 2, 4, max_positions=128))
    init_weights(model, seed=0)
    return model


@pytest.fixture(scope="module")
def run(model, chat, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "tiny"
    save_model(model, directory, chat, {})
    return directory


def talk(model, chat, **flags) -> Talk:
    return Talk(model, chat, Config(run=None, max_new_tokens=8, **flags))


def test_a_reply_is_what_the_model_generates_for_the_prompt(model, chat) -> None:
    talking = talk(model, chat, system="Be brief.")
    reply = "".join(talking.answer("Hello <|endoftext|>"))
    asked = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello <|endoftext|>"},
    ]
    prompt = encode_prompt(asked, chat)
    [ids] = generate(model, [prompt], max_new_tokens=8, stop_ids=chat.stop_ids)
    assert reply == chat.tokenizer.decode(ids)
    assert talking.messages == [asked[1], {"role": "assistant", "content": reply}]
    turn_ends = prompt.count(chat.tokenizer.eos_id)
    assert turn_ends == 2, "what the user typed holds no control token"


def test_the_conversation_grows_and_is_forgotten(model, chat, monkeypatch) -> None:
    asked: list[list[dict]] = []

    def remember(messages, chat):
        asked.append(list(messages))
        return encode_prompt(messages, chat)

    monkeypatch.setattr("whet.generate.chat.encode_prompt", remember)
    talking = talk(model, chat)
    for text in ("one", "two"):
        "".join(talking.answer(text))
    assert [message["content"] for message in asked[1]][::2] == ["one", "two"]
    talking.reset()
    "".join(talking.answer("three"))
    assert [message["content"] for message in asked[2]] == ["three"]


def test_the_oldest_turns_make_room(model, chat, capsys) -> None:
    talking = talk(model, chat)
    for i in range(6):
        "".join(talking.answer(f"{i} Hello there! Hello there!"))
        prompt = encode_prompt(talking.messages[:-1], chat)
        assert len(prompt) + LEAST_ROOM <= 128
    assert talking.messages[0]["role"] == "user"
    assert talking.messages[0]["content"][0] > "0"
    assert "128 positions are full: the oldest turn was forgotten" in capsys.readouterr().err


def test_a_message_too_long_for_the_model_is_not_remembered(model, chat) -> None:
    talking = talk(model, chat)
    with pytest.raises(UserError, match=r"prompt of \d+ tokens, the model has 128 positions"):
        "".join(talking.answer("Hello there! " * 60))
    assert talking.messages == []
    assert "".join(talking.answer("Hello"))


def test_a_reply_that_is_broken_off_stays_as_far_as_it_came(model, chat) -> None:
    talking = talk(model, chat)
    pieces = talking.answer("Hello")
    first = next(pieces)
    pieces.close()
    assert talking.messages[-1] == {"role": "assistant", "content": first}


def test_half_characters_wait_for_their_other_half(chat) -> None:
    text = "Grüße \N{GRINNING FACE} ok"
    ids = chat.tokenizer.encode(text)
    pieces = list(text_pieces([*ids, chat.tokenizer.eos_id], chat, [], show_control=False))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    broken = list(text_pieces(chat.tokenizer.encode("\N{GRINNING FACE}")[:2], chat, [], False))
    assert "".join(broken) == "\ufffd", "what never completes is shown in the end"


def test_raw_shows_control_tokens_and_keeps_the_leading_space(chat) -> None:
    ids = [*chat.tokenizer.encode(" there"), chat.tokenizer.eos_id]
    prompt = chat.tokenizer.encode("Hello")
    assert "".join(text_pieces(ids, chat, prompt, True)) == " there<|endoftext|>"


def test_prompt_prints_the_reply_alone(run, chat, capsys) -> None:
    flags = ["--prompt", "Hello", "--max_new_tokens", "4"]
    assert main(["chat", str(run), *flags]) == 0
    reply = capsys.readouterr().out
    assert main(["chat", str(run), *flags]) == 0
    assert capsys.readouterr().out == reply
    assert reply.endswith("\n")


def test_raw_continues_the_text_itself(run, model, chat, capsys) -> None:
    assert main(["chat", str(run), "--raw", "--prompt", "Hello", "--max_new_tokens", "6"]) == 0
    prompts = [chat.tokenizer.encode("Hello")]
    [ids] = generate(model, prompts, max_new_tokens=6, stop_ids=chat.stop_ids)
    assert capsys.readouterr().out == chat.tokenizer.decode(ids, skip_special=False) + "\n"


def test_lines_from_a_pipe(run, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n\n/reset\n/exit\nnever\n"))
    assert main(["chat", str(run), "--max_new_tokens", "4"]) == 0
    told = capsys.readouterr()
    assert told.err.splitlines() == ["(forgotten)"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello"))
    assert main(["chat", str(run), "--max_new_tokens", "4"]) == 0
    assert capsys.readouterr().out == told.out


def test_one_line_that_fails_or_is_stopped_does_not_end_the_talk(capsys) -> None:
    def answer(text):
        yield "so"
        if text == "stop":
            raise KeyboardInterrupt
        if text == "long":
            raise UserError("too long")

    repl(["stop", "long", "/help", "fine"], answer, reset=lambda: None)
    told = capsys.readouterr()
    assert told.out.split() == ["so", "so", "so"]
    assert told.err.splitlines()[:2] == ["(stopped)", "whet: error: too long"]
    assert "/exit" in told.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-1"], "--temperature -1.0: expected 0 or more"),
        (["--temperature", "nan"], "--temperature nan: expected 0 or more"),
        (["--temperature", "inf"], "--temperature inf: expected 0 or more"),
        (["--seed", "-1", "--temperature", "1"], "--seed -1: expected 0 or more"),
        (["--top_p", "1.5", "--temperature", "1"], "--top_p 1.5: expected a number from 0 to 1"),
        (["--top_k", "0", "--temperature", "1"], "--top_k 0: expected 1 or more"),
        (["--top_k", "3"], "--top_k: does nothing without --temperature above 0"),
        (["--max_new_tokens", "0"], "--max_new_tokens 0: expected 1 or more"),
        (["--raw", "--system", "x"], "--system belongs to a conversation; --raw has none"),
    ],
)
def test_bad_flags_are_told_in_a_line(run, capsys, flags, message) -> None:
    assert main(["chat", str(run), *flags]) == 2
    assert capsys.readouterr().err.strip().startswith(f"whet: error: {message}")


def test_a_prompt_of_no_tokens_is_one_line(model, chat) -> None:
    silent = Chat(chat.tokenizer, ChatTemplate("{% if false %}x{% endif %}"))
    with pytest.raises(UserError, match="no tokens, so there is nothing to continue"):
        "".join(Talk(model, silent, Config(run=None)).answer("Hello"))
