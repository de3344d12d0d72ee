"""`whet chat`: talk to a model, answer once (`--prompt`), or continue a text (`--raw`).

Replies are printed as they come. What a user types is plain text to the model, control tokens
included. Standard output holds replies only; everything else goes to standard error, so that
`whet chat RUN --prompt "..." > reply.txt` does what it looks like.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from whet.chat.chat import Chat
from whet.chat.encode import encode_prompt
from whet.errors import UserError
from whet.flags.chat import Config
from whet.generate.engine import Sampling, stream
from whet.generate.opened import open_asked
from whet.generate.text import TextStream
from whet.model.decoder import Transformer

LEAST_ROOM = 32
"""Tokens that a reply should have at least; older turns make room for them."""
HELP = "/reset forgets the conversation, /exit leaves; Ctrl-C stops a reply"


def main(config: Config) -> int:
    """Run `whet chat`."""
    talk = Talk(*open_asked(config.run, config), config)
    answer = talk.continue_text if config.raw else talk.answer
    if config.prompt is not None:
        _print_pieces(answer(config.prompt))
        return 0
    if sys.stdin.isatty():
        import readline  # noqa: F401  (arrow keys and the history of what was typed)

        _tell(f"{'Continuing texts' if config.raw else 'Talking'} with {config.run}. {HELP}.")
    repl(_typed_lines(), answer, talk.reset)
    return 0


@dataclass
class Talk:
    """A conversation in progress."""

    model: Transformer
    chat: Chat
    config: Config
    messages: list[dict[str, str]] = field(default_factory=list)
    replies: int = 0

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages = []

    def answer(self, text: str) -> Iterator[str]:
        """The reply to `text` in pieces; both join the conversation, also if it is broken off."""
        self.messages.append({"role": "user", "content": text})
        try:
            prompt = self._prompt_that_fits()
        except UserError:
            self.messages.pop()
            raise
        said: list[str] = []
        try:
            for piece in self._pieces(prompt, show_control=False):
                said.append(piece)
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": "".join(said)})

    def continue_text(self, text: str) -> Iterator[str]:
        """What the model writes after `text`, control tokens included."""
        tokenizer = self.chat.tokenizer
        prompt = tokenizer.encode(text, ends=True)  # with what the tokenizer puts first
        begin = next((i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None), 0)
        yield from self._pieces(prompt or [begin], show_control=True)

    def _prompt_that_fits(self) -> list[int]:
        """The conversation as ids, without the oldest turns if it leaves no room for a reply."""
        limit = self.model.config.max_positions
        forgotten = 0
        while True:
            system = [{"role": "system", "content": self.config.system}] * bool(self.config.system)
            prompt = encode_prompt(system + self.messages, self.chat)
            if len(prompt) + LEAST_ROOM <= limit or len(self.messages) <= 1:
                break
            del self.messages[:2]
            forgotten += 1
        if forgotten:
            turns = (
                "the oldest turn was" if forgotten == 1 else f"the oldest {forgotten} turns were"
            )
            _tell(f"(the model's {limit:,} positions are full: {turns} forgotten)")
        if len(prompt) >= limit:
            raise UserError(
                f"this message makes a prompt of {len(prompt):,} tokens, the model has "
                f"{limit:,} positions: shorten it"
            )
        return prompt

    def _pieces(self, prompt: list[int], show_control: bool) -> Iterator[str]:
        config = self.config
        # A question asked again gets another sample.
        seed = config.seed + self.replies
        self.replies += 1
        tokens = stream(
            self.model,
            prompt,
            max_new_tokens=config.max_new_tokens,
            stop_ids=self.chat.stop_ids,
            sampling=Sampling(config.temperature, config.top_k, config.top_p, seed),
        )
        return text_pieces(tokens, self.chat, prompt, show_control)


def text_pieces(
    tokens: Iterable[int], chat: Chat, prompt: list[int], show_control: bool
) -> Iterator[str]:
    """The text of `tokens` as it becomes certain: half a character waits for its other half."""
    text = TextStream(chat.tokenizer, prompt[-4:] if show_control else (), show_control)
    for token in tokens:
        if not show_control and token in chat.stop_ids:
            break
        yield text.push(token)
    yield text.end()


def repl(
    lines: Iterable[str], answer: Callable[[str], Iterator[str]], reset: Callable[[], None]
) -> None:
    """Answer line after line until they end or say /exit."""
    for line in lines:
        command = line.strip()
        if command in ("/exit", "/quit"):
            return
        if command == "/reset":
            reset()
            _tell("(forgotten)")
        elif command == "/help":
            _tell(HELP)
        elif command:
            try:
                _print_pieces(answer(line))
            except KeyboardInterrupt:
                _tell("(stopped)")
            except UserError as error:  # this line can't be answered; the next one may
                _tell(f"whet: error: {error}")


def _typed_lines() -> Iterator[str]:
    """What is typed, or piped in, until its end (Ctrl-D)."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return
        except KeyboardInterrupt:
            print(flush=True)
            return


def _print_pieces(pieces: Iterable[str]) -> None:
    """Print a reply and end its line, also where it breaks off."""
    said = False
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            said = True
        said = True  # an empty reply is a line, too
    finally:
        if said:
            print(flush=True)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
