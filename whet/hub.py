"""Models by name: from this machine, or from the Hugging Face Hub through huggingface_hub.

Its own variables hold: `HF_HOME` (cache), `HF_HUB_OFFLINE=1` (no network), `HF_TOKEN` (private and
gated models), `HF_ENDPOINT` (a mirror). Interrupted downloads go on where they stopped. Only
safetensors are fetched, never pickles.
"""

import errno
import os
import re
from pathlib import Path

from whet.errors import UserError

MODEL_FILES = (
    *("config.json", "generation_config.json", "model*.safetensors", "*.safetensors.index.json"),
    *("adapter_config.json", "adapter_model.safetensors"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template*", "additional_chat_templates/*"),
)
"""Patterns of the files that make a model."""
_UNWANTED = ["*/*.safetensors", "*/*.json", "*/tokenizer*", "*.bin", "*.pt", "*.pth"]
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def find_model(
    name: str | Path, revision: str | None = None, quiet: bool = False, weights: bool = True
) -> Path:
    """The directory or file of the model `name`: a path, or `owner/model` on the Hub.

    A path that exists wins. `revision` is a branch, tag or commit of the Hub. Without `weights`
    only configuration and tokenizer are fetched. Raises UserError, one line, for what is neither,
    for an unknown, private or gated model, and when there is no network or no space.
    """
    path = Path(name)
    if path.exists():
        if revision is not None:
            raise UserError(f"--revision {revision}: {name} is a path; only Hub models have one")
        return path
    check_name(name)
    return Path(_download(str(name), revision, quiet, weights))


def check_name(name: str | Path) -> None:
    """Raise UserError if `name` is neither a path that is there nor a name as the Hub has them."""
    if wrong := known_model(str(name)):
        raise UserError(f"{name}: {wrong}")


def known_model(name: str) -> str:
    """A check of a flag: what is wrong with the path or Hub name of a model, or nothing."""
    path = Path(name)
    local = len(path.parts) == 2 and path.parent.is_dir()  # runs/sft beside other runs: a slip
    if path.exists() or (_NAME.fullmatch(name) and not local):
        return ""
    return "there is no such path, and it is not a Hub name such as owner/model"


def is_adapter(path: Path) -> bool:
    """Whether `path` is a directory that holds an adapter in PEFT's format.

    Some tools write the base's `config.json` beside it. Raises UserError if the weights of a whole
    model are there as well: with and without the adapter they would be two models.
    """
    if not (path / "adapter_config.json").is_file():
        return False
    names = ("model.safetensors", "model.safetensors.index.json")
    whole = [name for name in names if (path / name).is_file()]
    if whole and (path / "config.json").is_file():
        raise UserError(
            f"{path}: holds a whole model ({whole[0]}) and an adapter (adapter_config.json): which "
            "one is meant? Move the adapter's files into a directory of their own, or remove them"
        )
    return True


def is_hub_name(name: str) -> bool:
    """Whether `name` has the form of a Hub name, OWNER/NAME."""
    return _NAME.fullmatch(name) is not None


def hub_name(name: str) -> str:
    """`is_hub_name` as a check of a flag: what is wrong, or nothing."""
    return "" if is_hub_name(name) else "expected a name on the Hub, such as owner/model"


def _download(name: str, revision: str | None, quiet: bool, weights: bool) -> str:
    import huggingface_hub as hub
    from huggingface_hub.utils import disable_progress_bars

    if quiet:
        disable_progress_bars()
    unwanted = _UNWANTED if weights else [*_UNWANTED, "*.safetensors"]
    wanted = [*MODEL_FILES, "whet.json", "*.tiktoken"]
    try:
        return hub.snapshot_download(
            name, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted
        )
    except Exception as error:
        if not (reason := _reason(error, revision)):
            raise
        raise UserError(f"{name}{f'@{revision}' if revision else ''}: {reason}") from None


def _reason(error: Exception, revision: str | None) -> str:
    """Why a download failed and what to do, in a line; empty for a defect of Whet."""
    from huggingface_hub import constants, errors

    log_in = "log in (hf auth login, or HF_TOKEN)"
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub did not answer"
    if isinstance(error, errors.HFValidationError):
        return f"there is no such path, and it is not a Hub name: {first_line(error)}"
    if isinstance(error, errors.GatedRepoError):
        return f"its owners ask for consent: accept the terms on the model's page, then {log_in}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no revision {revision}; see its page for branches"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such model on the Hub, and no such path; if it is private, {log_in}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"not (wholly) in the cache, and {why}; connect once to download it, or give a path"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        cache = os.environ.get("HF_HOME", "~/.cache/huggingface")
        return f"no space in the cache {cache}; free some, or set HF_HOME to another disk"
    if isinstance(error, OSError) or is_of_network(error):
        broken_off = f"the download broke off ({first_line(error)})"
        return f"{broken_off}; run the command again, it goes on from there"
    return ""


def is_of_network(error: Exception) -> bool:
    """Whether a library for connections raised it; huggingface_hub lets these through."""
    library = type(error).__module__.split(".")[0].rstrip("0123456789")
    return library in ("httpx", "httpcore", "requests", "urllib")


def first_line(error: Exception) -> str:
    """What `error` says, in a line."""
    return str(error).split("\n")[0][:200] or type(error).__name__
