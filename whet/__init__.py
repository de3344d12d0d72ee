"""Whet sharpens a pretrained base language model into an assistant.

The functions of the Python API are attributes of this package: docs/api.md. They are imported when
they are asked for, so that `import whet` takes no time and needs no torch.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names, for type checkers
    from whet.api import prepare, train
    from whet.chat.chat import load_tokenizer
    from whet.chat.encode import encode_chat, encode_prompt
    from whet.data.batches import get_sft_batch_iterator
    from whet.data.store import PackedStore
    from whet.errors import UserError
    from whet.generate.engine import generate
    from whet.model.loss import sft_loss
    from whet.model.open import load_backbone_from_ckpt

    __version__: str

_HOME = {
    "PackedStore": "whet.data.store",
    "UserError": "whet.errors",
    "encode_chat": "whet.chat.encode",
    "encode_prompt": "whet.chat.encode",
    "generate": "whet.generate.engine",
    "get_sft_batch_iterator": "whet.data.batches",
    "load_backbone_from_ckpt": "whet.model.open",
    "load_tokenizer": "whet.chat.chat",
    "prepare": "whet.api",
    "sft_loss": "whet.model.loss",
    "train": "whet.api",
}

__all__ = [
    "PackedStore",
    "UserError",
    "__version__",
    "encode_chat",
    "encode_prompt",
    "generate",
    "get_sft_batch_iterator",
    "load_backbone_from_ckpt",
    "load_tokenizer",
    "prepare",
    "sft_loss",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("whet")
    if name not in _HOME:
        raise AttributeError(f"module 'whet' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _CalledPackage(ModuleType):
    """The packages `whet.train` and `whet.generate` have the names of functions of the API. Python
    sets the attribute to the package when a module of it is imported; so the package is called."""

    def __call__(self, *args: Any, **named: Any) -> Any:
        name = self.__name__.removeprefix("whet.")
        return getattr(import_module(_HOME[name]), name)(*args, **named)


for _package in ("whet.train", "whet.generate"):
    import_module(_package).__class__ = _CalledPackage
