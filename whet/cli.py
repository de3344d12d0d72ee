"""`whet <command>`: the table of commands, and how each ends.

A command `NAME` is a dataclass `Config` in `whet/flags/NAME.py` and a function `main(config)` in
the module that this table names. That module is imported when flags and files have passed their
checks: help and a typing error need no torch.
"""

import errno
import importlib
import os
import sys
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any

PATIENCE = 15  # seconds: longer than processes started together are apart, even on a busy machine
COMMANDS = {
    # command: (module, one line of help)
    "demo": ("whet.demo.run", "build a tiny world, pretrain, fine-tune and measure: 5 minutes"),
    "pretrain": ("whet.stages.pretrain", "train a small base model on plain text"),
    "prepare": ("whet.data.prepare", "conversations -> packed rows with loss mask"),
    "inspect": ("whet.report.inspect", "see what is trained, token by token"),
    "report": ("whet.report.command", "one page of a run: curves, samples, incidents, lineage"),
    "plan": ("whet.stages.plan", "what `whet sft` will need, and settings that fit"),
    "sft": ("whet.stages.sft", "fine-tune a base model on packed rows"),
    "reward": ("whet.stages.reward", "train a reward model on pairs of replies"),
    "dpo": ("whet.stages.dpo", "train a model on pairs of replies (DPO, IPO, SimPO, ORPO, KTO)"),
    "grpo": ("whet.stages.grpo", "train a model on rewards for its own replies"),
    "ppo": ("whet.stages.ppo", "the same with a critic"),
    "configs": ("whet.recipes", "list the configurations that come with Whet, or print one"),
    "compare": ("whet.compare.command", "several models on the same problems: what changed"),
    "eval": ("whet.evaluate.command", "dev loss and GSM8K accuracy of a model"),
    "chat": ("whet.generate.chat", "talk to a model"),
    "serve": ("whet.serve.command", "models with OpenAI's API, and a chat page"),
    "export": ("whet.model.export", "write a model for other tools, merge adapters"),
    "push": ("whet.push", "put a model on the Hugging Face Hub, with a card"),
    "doctor": ("whet.doctor.command", "prove it: every promise on your model, data and machine"),
    "replay": ("whet.stages.replay", "run one step of a run again and look at it"),
    "ledger": ("whet.stages.ledger", "which documents a step saw, which steps saw a document"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 a bad flag, file or datum, 130 Ctrl-C."""
    from whet.errors import UserError, tell
    from whet.progress import say

    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        say(_help())
        return 0 if words else 2
    if words[0] in ("--version", "version"):
        from importlib.metadata import version

        say(f"whet {version('whet')}")
        return 0
    try:
        return _run(words[0], words[1:])
    except UserError as error:
        tell(error)
        return 2
    except KeyboardInterrupt:
        print("whet: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `whet chat … | head`: the reader has gone, nothing is left to say
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        tell(UserError(f"{str(error.filename)[:60]}…: the name is too long to be that of a file"))
        return 2


def _run(command: str, flags: list[str]) -> int:
    from whet.command_line import parse
    from whet.elsewhere import nearest_command
    from whet.errors import UserError

    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}{nearest_command(command, list(COMMANDS))}")
    try:
        flaws = getattr(flags_of(command), "flaws", lambda config: ())
        config: Any = parse(config_class(command), flags, command, flaws)
    except UserError:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            # Of a machine's processes the first reports what all of them have found. torchrun ends
            # the others when it has; if one ended before, torchrun would end the first, unheard.
            time.sleep(PATIENCE)
        raise
    return importlib.import_module(COMMANDS[command][0]).main(config) or 0


def flags_of(command: str) -> ModuleType:
    """The module with the command's `Config`, and maybe `flaws(config)`."""
    return importlib.import_module(f"whet.flags.{command}")


def config_class(command: str) -> type:
    """The flags of a command."""
    return flags_of(command).Config


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {line}" for name, (_, line) in COMMANDS.items())
    return (
        "whet sharpens a pretrained base language model into an assistant.\n\n"
        f"usage: whet COMMAND [flags]    whet COMMAND --help\n\n{rows}\n\n"
        "Every flag can also stand in a TOML file: whet COMMAND --config FILE.toml; flags win."
    )


if __name__ == "__main__":
    sys.exit(main())
