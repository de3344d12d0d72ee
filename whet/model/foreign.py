"""Any other architecture through transformers, behind the same forward as Whet's own decoder.

How documents of a packed row are kept apart differs between architectures, and some (recurrent
ones) can't. So it is tried on the instance, when it is opened: with a row of two documents, the
second must have the hidden states that it has alone, whatever stands in the first. The ways, in
this order: positions that restart (transformers makes the mask from them), a mask of our own, and
otherwise one document a row. In the same way it is tried how logits follow from hidden states, so
that the loss can be formed at trained positions only, and that no hidden state depends on later
tokens.

Shape letters: B batch, T tokens, D width, V vocabulary.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from whet.errors import UserError
from whet.files import read_json
from whet.model.attention import KVCache
from whet.model.decoder import TokenLoss
from whet.model.loss import linear_cross_entropy, linear_nll, linear_probability
from whet.progress import say

Way = Literal["positions", "mask", "alone"]
SAYING = {
    "positions": "documents are packed; restarting positions keep them apart",
    "mask": "documents are packed; a mask keeps them apart",
    "alone": "it can't keep packed documents apart, so it runs one document a row",
}


_UNLIKE = (AssertionError, AttributeError, LookupError, TypeError, ValueError)
"""What an architecture's code fails with when it is called in a way that it does not know."""


@dataclass(frozen=True)
class ForeignConfig:
    """What the rest of Whet asks a model's configuration for."""

    vocab_size: int
    width: int
    max_positions: int
    n_layers: int
    hf: dict[str, Any]

    @property
    def family(self) -> str:
        """The ecosystem's `model_type`."""
        return str(self.hf.get("model_type"))


class ForeignModel(nn.Module):
    """A causal language model of transformers with Whet's forward."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        values = inner.config.get_text_config().to_dict()
        self.config = ForeignConfig(
            vocab_size=inner.get_input_embeddings().weight.shape[0],
            width=inner.get_input_embeddings().weight.shape[1],
            max_positions=values.get("max_position_embeddings") or 1 << 20,
            n_layers=values.get("num_hidden_layers") or 0,
            hf=inner.config.to_dict(),
        )
        self.logit_scale, self.softcap = _head(inner)
        _refuse_looking_ahead(self)
        self.way: Way = _way(self)

    @property
    def recompute(self) -> str:
        """Which activations are made again in the backward pass: `none`, or all: `full`."""
        return "full" if self.inner.is_gradient_checkpointing else "none"

    @recompute.setter
    def recompute(self, which: str) -> None:
        if which == "none":
            return
        try:
            self.inner.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError:
            raise UserError(f"--recompute {which}: {type(self.inner).__name__} can't") from None

    @torch.no_grad()
    def grow(self, n_tokens: int, multiple: int = 64) -> None:
        """Rows for `n_tokens` tokens; see `embedding.grow_embedding`."""
        old = self.config.vocab_size
        if n_tokens <= old:
            return
        new = -(-n_tokens // multiple) * multiple
        self.inner.resize_token_embeddings(new, mean_resizing=False)
        for module in (self.inner.get_input_embeddings(), self.inner.get_output_embeddings()):
            for values in (module.weight, getattr(module, "bias", None)):
                if values is not None:
                    values[old:] = values[:old].float().mean(dim=0).to(values.dtype)
        kept = {"dtype": self.config.hf.get("dtype"), **_dropouts(self.config.hf)}
        hf = self.inner.config.to_dict() | kept
        self.config = replace(self.config, vocab_size=new, hf=hf)

    @torch.no_grad()
    def try_adapters(self) -> None:
        """Raise UserError if the architecture looks into the modules that have adapters now."""
        try:
            self._run(_probe_tokens(self.inner, 4, seed=5))
        except AttributeError as error:
            raise UserError(
                f"--lora_targets: {type(self.inner).__name__} does not only call its linear "
                f"modules, it looks into some ({error}); leave those out, or train it whole"
            ) from None

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        weight: Tensor | None = None,
        per_token: bool = False,
        temperature: float = 1.0,
        watch: int | None = None,
        cache: KVCache | None = None,
        logits_at: Tensor | None = None,
        plan: Any = None,
    ) -> Tensor | TokenLoss:
        """As `Transformer.forward`. `plan` is not used.

        `cache` holds the tokens themselves and each step computes them all again: right for every
        architecture, and slow for long replies.
        """
        if cache is not None:
            return self._with_cache(tokens, positions, cache, logits_at)
        if segments is None:
            segments = torch.ones_like(tokens)
        hidden = self._hidden(tokens, segments)
        if targets is None:
            return self._logits(hidden, logits_at)
        assert weight is not None, "targets need weights"
        where = weight.flatten().nonzero()[:, 0]
        head = self.inner.get_output_embeddings()
        cap = self.softcap
        shape: dict[str, Any] = {
            "bias": getattr(head, "bias", None),
            "softcap": None if cap is None else cap / temperature,
            "logit_scale": self.logit_scale / temperature,
        }
        inputs = (hidden.flatten(0, 1)[where], head.weight, targets.flatten()[where])

        def spread(values: Tensor) -> Tensor:
            return weight.new_zeros(weight.numel()).index_put((where,), values).view_as(weight)

        if watch is not None:
            nll, watched = linear_probability(*inputs, watch, **shape)
            return TokenLoss((weight * spread(nll)).sum(), spread(nll), spread(watched))
        if per_token:
            found = spread(linear_nll(*inputs, **shape))
            return TokenLoss((weight * found).sum(), found)
        loss, nll = linear_cross_entropy(*inputs, weight.flatten()[where], **shape)
        return TokenLoss(loss, spread(nll))

    def _hidden(self, tokens: Tensor, segments: Tensor) -> Tensor:
        """tokens (B, T) -> hidden states (B, T, D), each document as if it were alone."""
        one_each = bool((segments == segments[:, :1]).all())
        if one_each:
            return self._run(tokens)
        if self.way == "alone":
            return self._one_document_a_row(tokens, segments)
        restarted = _restarted(segments)
        if self.way == "positions":
            return self._run(tokens, position_ids=restarted)
        T = tokens.shape[1]
        same = segments[:, :, None] == segments[:, None, :]
        seen = same & torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril()
        return self._run(tokens, position_ids=restarted, attention_mask=seen[:, None])

    def _run(self, tokens: Tensor, **how: Tensor) -> Tensor:
        return _body(self.inner)(tokens, use_cache=False, **how).last_hidden_state

    def _one_document_a_row(self, tokens: Tensor, segments: Tensor) -> Tensor:
        begins = segments != segments.roll(1, dims=1)
        begins[:, 0] = True
        document = begins.flatten().cumsum(0) - 1
        place = _restarted(segments).flatten()
        rows = tokens.new_zeros(int(document[-1]) + 1, int(place.max()) + 1)
        rows[document, place] = tokens.flatten()
        return self._run(rows)[document, place].view(*tokens.shape, -1)

    def _logits(self, hidden: Tensor, logits_at: Tensor | None) -> Tensor:
        if logits_at is not None:
            hidden = hidden.gather(1, logits_at[:, :, None].expand(-1, -1, hidden.shape[-1]))
        return _from_hidden(self.inner, hidden, self.logit_scale, self.softcap)

    def _with_cache(
        self, tokens: Tensor, positions: Tensor | None, cache: KVCache, logits_at: Tensor | None
    ) -> Tensor:
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        stored = tokens[:, :, None, None]
        seen = cache.write(0, stored, stored, positions)[0][:, :, 0, 0]
        hidden = self._run(seen)
        if seen.shape[1] != tokens.shape[1]:
            hidden = hidden.gather(1, positions[:, :, None].expand(-1, -1, hidden.shape[-1]))
        return self._logits(hidden, logits_at)


def load_foreign(
    directory: Path, *, dtype: torch.dtype, device: torch.device, quiet: bool = False
) -> ForeignModel:
    """Open a model directory by transformers' own class. Neither pickles nor foreign code are run.

    Raises UserError without transformers, for an architecture it does not know or that is no causal
    language model, and if weights are missing, left over or misshaped.
    """
    try:
        import transformers
    except ImportError:
        raise UserError(
            f"{directory}: this architecture is not Whet's own; pip install whet[transformers] "
            "opens it through transformers"
        ) from None
    safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(directory, **safe)
        _drop_nothing(config)
        opened: Any = transformers.AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **safe,
        )
    except (ValueError, OSError, ImportError, KeyError) as error:
        reason = str(error).strip().split("\n")[0][:300]
        if "custom code" in reason:
            reason = "it needs code that comes with it, and Whet runs none"
        raise UserError(f"{directory}: transformers can't open it: {reason}") from None
    inner, info = opened
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(key):
            some = ", ".join(str(name) for name in sorted(info[key], key=str)[:5])
            raise UserError(f"{directory}: weights do not fit the configuration: {key}: {some}")
    inner.to(device)
    try:
        model = ForeignModel(inner)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from None
    except (*_UNLIKE, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:200]
        raise UserError(
            f"{directory}: {type(inner).__name__} does not run on tokens alone, as a causal "
            f"language model of transformers does ({reason}); Whet can't train this architecture"
        ) from None
    # transformers puts the opened precision in its place, and we no dropout; saving asks for what
    # the file has.
    said = read_json(directory / "config.json")
    own = {"dtype": said.get("dtype") or said.get("torch_dtype"), **_dropouts(said)}
    model.config = replace(model.config, hf=model.config.hf | own)
    if not quiet:
        say(f"{directory}: {type(inner).__name__} of transformers; {SAYING[model.way]}")
    return model


def _drop_nothing(config: Any) -> None:
    """Set every dropout of a configuration to 0, as Whet's own models have none: a step's loss
    must not depend on how it is cut into micro-batches and ranks."""
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):  # the text part of a larger model
            _drop_nothing(value)
        elif "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)


def _dropouts(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if "drop" in key}


@torch.no_grad()
def write_foreign(
    model: ForeignModel,
    state: dict[str, Tensor],
    directory: Path,
    dtype: torch.dtype | None,
    shard_bytes: int,
) -> None:
    """Write weights and config by transformers, and open them again.

    `state` has the names of `model`. Raises RuntimeError if what is read back differs.
    """
    values = {
        name.removeprefix("inner."): value.to("cpu", dtype if value.is_floating_point() else None)
        for name, value in state.items()
    }
    model.inner.save_pretrained(directory, state_dict=dict(values), max_shard_size=shard_bytes)
    own = next(iter(values.values())).dtype
    again = load_foreign(directory, dtype=own, device=torch.device("cpu"), quiet=True)
    for name, value in again.inner.state_dict().items():
        if not torch.equal(values[name], value):
            raise RuntimeError(f"{directory}: {name} was saved, but read back it differs")


def _restarted(segments: Tensor) -> Tensor:
    """Positions (B, T) that count from 0 at each change of `segments` (B, T)."""
    at = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    begins = segments != segments.roll(1, dims=1)
    begins[:, 0] = True
    return at - (at * begins).cummax(dim=1).values


def _from_hidden(inner: Any, hidden: Tensor, scale: float, softcap: float | None) -> Tensor:
    logits = inner.get_output_embeddings()(hidden) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _body(inner: Any) -> Any:
    """The part of the model that gives hidden states: all but the head."""
    if inner.base_model is not inner:
        return inner.base_model
    return inner.model  # where the class's name for its body is not the one it is kept under


def _probe_tokens(model: Any, n: int, seed: int) -> Tensor:
    embedding = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(embedding.shape[0], (1, n), generator=generator).to(embedding.device)


def _close(found: Tensor, expected: Tensor) -> bool:
    """Equal up to rounding in the model's precision."""
    allowed = 1e-4 if found.dtype == torch.float32 else 0.05
    return float((found - expected).float().norm()) <= allowed * float(expected.float().norm())


@torch.no_grad()
def _head(inner: Any) -> tuple[float, float | None]:
    """(scale, softcap) by which the model's logits follow from its last hidden states."""
    tokens = _probe_tokens(inner, 8, seed=1)
    training = inner.training
    inner.eval()
    expected = inner(tokens, use_cache=False).logits
    hidden = _body(inner)(tokens, use_cache=False).last_hidden_state
    inner.train(training)
    config = inner.config.get_text_config()
    scales = {1.0, float(getattr(config, "logit_scale", None) or 1.0)}
    scales |= {1.0 / float(getattr(config, "logits_scaling", None) or 1.0)}
    for scale in sorted(scales):
        for cap in {None, getattr(config, "final_logit_softcapping", None)}:
            if _close(_from_hidden(inner, hidden, scale, cap), expected):
                return scale, cap
    raise UserError(
        f"{type(inner).__name__}: its logits are not its head's product with the last hidden "
        "state; Whet can't form the loss of this architecture"
    )


@torch.no_grad()
def _refuse_looking_ahead(model: ForeignModel) -> None:
    """Raise UserError if hidden states change with tokens that come later."""
    head, tail = _probe_tokens(model.inner, 7, seed=2), _probe_tokens(model.inner, 9, seed=4)
    other = (tail + 1) % model.config.vocab_size  # no token stays
    training = model.training
    model.eval()
    expected = model._run(torch.cat([head, tail], dim=1))[:, :7]
    found = model._run(torch.cat([head, other], dim=1))[:, :7]
    model.train(training)
    if not _close(found, expected):
        raise UserError(
            f"{type(model.inner).__name__}: what it gives for a token changes with the tokens that "
            "come later, so it is no causal language model, and Whet trains no other; are "
            "is_decoder and is_causal right in its config.json?"
        )


@torch.no_grad()
def _way(model: ForeignModel) -> Way:
    """The first way that keeps two documents of one row apart on this very model."""
    a, other = _probe_tokens(model.inner, 7, seed=2), _probe_tokens(model.inner, 7, seed=3)
    b = _probe_tokens(model.inner, 9, seed=4)
    segments = torch.tensor([[1] * 7 + [2] * 9], device=a.device)
    windowed = getattr(model.inner.config.get_text_config(), "sliding_window", None)
    training = model.training
    model.eval()
    expected = torch.cat([model._run(a), model._run(b)], dim=1)
    ways: tuple[Way, ...] = ("positions", "mask")
    for way in ways:
        if way == "mask" and windowed:
            continue  # a mask of our own would replace the window's
        model.way = way
        try:
            found = model._hidden(torch.cat([a, b], dim=1), segments)
            moved = model._hidden(torch.cat([other, b], dim=1), segments)
        except (*_UNLIKE, RuntimeError):
            continue  # the architecture takes no such argument
        if _close(found, expected) and _close(moved[:, 7:], expected[:, 7:]):
            model.train(training)
            return way
    model.train(training)
    return "alone"
