"""The flags of `whet serve`."""

from dataclasses import dataclass
from typing import Annotated

from whet.config import POSITIONAL, Place, above_0, at_least, from_0, from_1
from whet.flags.use import Asked
from whet.hub import known_model


def port(value: int) -> str:
    """A port to listen on."""
    return "" if 0 <= value < 1 << 16 else "expected a port from 0 to 65535"


@dataclass(kw_only=True)
class Config(Asked):
    """Serve models with OpenAI's API and a chat page.

    whet serve runs/sft
    whet serve runs/base runs/sft runs/dpo --port 9000
    """

    run: Annotated[tuple[Annotated[Place, known_model], ...], POSITIONAL]
    """Run folders, model directories, Hub names; several stand side by side on the chat page."""
    port: Annotated[int, port] = 8000
    """Port to listen on; 0 takes a free one."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in: set --api_key then."""
    api_key: str | None = None
    """Requests must show this key; in a --config file other users of the machine don't see it."""
    context_length: Annotated[int, at_least(2)] = 4096
    """Longest prompt and reply together, in tokens; at most the model's positions."""
    batch_size: Annotated[int, from_1] = 16
    """Replies of a model that are computed at once; others wait."""
    queue: Annotated[int, from_0] = 256
    """Replies of a model that may wait; further requests are refused with 429."""
    timeout: Annotated[float, above_0] = 600.0
    """Seconds that a request may take, waiting included."""
    verbose: bool = False
    """Log every request."""


def flaws(config: Config) -> list[str]:
    """Flags that do not go together."""
    found = []
    if not config.run:
        found.append("RUN: is missing; see whet serve --help")
    if config.api_key == "":
        found.append("--api_key: is empty; leave it out to let everybody in")
    return found
