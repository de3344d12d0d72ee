"""A tiny model directory with a tokenizer and the plain template."""

from pathlib import Path

import pytest

from whet.chat.chat import Chat
from whet.chat.tokenizer import train_tokenizer
from whet.model.config import llama
from whet.model.decoder import Transformer, init_weights
from whet.model.hf.checkpoint import save_model

TEXTS = ["How many eggs does she sell? She sells 16 - 3 = 13 eggs.", "<think></think><answer>"]


@pytest.fixture(scope="session")
def chat() -> Chat:
    return Chat(train_tokenizer(TEXTS * 5, 300))


@pytest.fixture(scope="session")
def model(chat: Chat) -> Transformer:
    model = Transformer(llama(chat.tokenizer.vocab_size, 32, 2, 4, max_positions=128))
    init_weights(model, seed=0)
    return model


@pytest.fixture(scope="session")
def run(model: Transformer, chat: Chat, tmp_path_factory) -> Path:
    """A model directory as a run leaves it."""
    directory = tmp_path_factory.mktemp("runs") / "tiny"
    save_model(model, directory, chat, {})
    return directory
