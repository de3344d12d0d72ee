"""Any other architecture through transformers, with the same forward as Whet's own decoder.

How documents of a packed row are kept apart differs between architectures, and some (recurrent
ones) can't. So it is tried on the instance when it is opened: in a row of two documents the second
must have the hidden states that it has alone, whatever stands in the first. The ways, in this
order: positions that restart (transformers makes the mask from them), a mask of our own, and
otherwise one document a row. In the same way it is tried how logits follow from hidden states, so
that the loss can be formed at trained positions only, and that no hidden state depends on later
tokens. `foreign_files.py` opens and saves these models.

Shape letters: B batch, T tokens, D width, V vocabulary.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whet.errors import UserError
from whet.model.attention import KVCache, repeated_size
from whet.model.loss import Head, TokenLoss, compiles_each_shape, token_loss
from whet.model.recompute import Recompute, run_layer

Way = Literal["positions", "mask", "alone"]

UNLIKE = (AssertionError, AttributeError, LookupError, TypeError, ValueError, RuntimeError)
"""What an architecture's code fails with when it is called in a way that it does not know."""
_LIMITS = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"),
    *("n_ctx", "seq_length", "context_length", "max_target_positions"),
)
_UNLIMITED = 1 << 20
ROWS = 16
"""Rows of one document each come in multiples of it where each shape is compiled and kept."""


@dataclass(frozen=True)
class ForeignConfig:
    """What the rest of Whet asks a model's configuration for."""

    vocab_size: int
    width: int
    max_positions: int
    """The smallest length limit of the configuration, under any of its names; 2^20 without one."""
    n_layers: int
    hf: dict[str, Any]
    score: bool = False
    """Scores need one of Whet's own families."""

    @property
    def family(self) -> str:
        """The ecosystem's `model_type`."""
        return str(self.hf.get("model_type"))


class ForeignModel(nn.Module):
    """A causal language model of transformers with Whet's forward."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        text = inner.config.get_text_config()
        limits = [getattr(text, name, None) for name in _LIMITS]
        self.config = ForeignConfig(
            vocab_size=inner.get_input_embeddings().weight.shape[0],
            width=inner.get_input_embeddings().weight.shape[1],
            max_positions=min([n for n in limits if type(n) is int and n > 0], default=_UNLIMITED),
            n_layers=len(self.layers),
            hf=inner.config.to_dict(),
        )
        self.switch = _switch(inner)
        self.recomputing = False
        self.train()
        self.logit_scale, self.softcap = _head(inner)
        _refuse_looking_ahead(self)
        self.way: Way = _way(self)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers, which --recompute, --compile and --shard work on: of the lists that
        are not within another one that of the configured length, or the longest."""
        named = _body(self.inner).named_modules()
        lists = [m for name, m in named if isinstance(m, nn.ModuleList) and not _numbered(name)]
        count = getattr(self.inner.config.get_text_config(), "num_hidden_layers", None)
        return max(lists, key=lambda m: (len(m) == count, len(m)), default=nn.ModuleList())

    def train(self, mode: bool = True) -> "ForeignModel":
        """As `nn.Module.train`, for adapters only: transformers' own modules always compute as they
        do when they are used. Dropout, router jitter and sampled experts would make a step's loss
        depend on how it is cut into micro-batches and ranks."""
        super().train(mode)
        for module in self.inner.modules():
            if not type(module).__module__.startswith("whet."):
                module.training = False
        return self

    @property
    def recompute(self) -> Recompute:
        """Which activations are recomputed in the backward pass: `none`, or all of them: `full`."""
        return "full" if self.recomputing else "none"

    @recompute.setter
    def recompute(self, which: Recompute) -> None:
        # What `selective` keeps is changed in place by the layers of some architectures.
        if which != "none" and not self.recomputing:
            for layer in self.layers:
                layer.forward = partial(self._run_layer, layer.forward)
        self.recomputing = which != "none"

    def _run_layer(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        return run_layer(partial(forward, **kwargs), self.recompute, *args)

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
        hf = self.inner.config.to_dict() | {"dtype": self.config.hf.get("dtype")}
        self.config = replace(self.config, vocab_size=new, hf=hf)

    @torch.no_grad()
    def runs(self) -> bool:
        """Whether it computes with the modules that it has now, such as adapters."""
        try:
            self._run(_probe_tokens(self.inner, 4, seed=5))
        except UNLIKE:
            return False
        return True

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
        bias = getattr(head, "bias", None)
        trained = hidden.flatten(0, 1)[where]
        if compiles_each_shape(head.weight):
            trained = F.pad(trained, (0, 0, 0, repeated_size(len(where)) - len(where)))
        return token_loss(
            trained,
            Head(head.weight, bias, self.softcap, self.logit_scale).at(temperature),
            targets,
            weight,
            where,
            per_token=per_token,
            watch=watch,
        )

    def _hidden(self, tokens: Tensor, segments: Tensor) -> Tensor:
        """tokens (B, T) -> hidden states (B, T, D), each document as if it were alone."""
        B, T = tokens.shape
        if bool((segments == segments[:, :1]).all()):
            return self._rows(tokens, torch.full((B,), T, device=tokens.device))
        restarted = _restarted(segments)
        switched = self.switch is not None and int(restarted.max()) >= self.switch.length
        if self.way == "alone" or switched:
            return self._one_document_a_row(tokens, segments, restarted)
        if self.way == "positions":
            return self._run(tokens, position_ids=restarted)
        same = segments[:, :, None] == segments[:, None, :]
        seen = same & torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril()
        return self._run(tokens, position_ids=restarted, attention_mask=seen[:, None])

    def _run(self, tokens: Tensor, **how: Tensor) -> Tensor:
        return _body(self.inner)(tokens, use_cache=False, **how).last_hidden_state

    def _rows(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """tokens (B, T), a document of `lengths` (B,) in each row and padding -> (B, T, D).

        Rows on either side of a switch of positions run apart, without each other's padding. Rows
        without a document (length 0) give anything.
        """
        switch = self.switch
        if switch is None or tokens.shape[1] <= switch.length:
            return self._run(tokens)
        beyond = lengths if switch.at_each_length else torch.ones_like(lengths)
        group = torch.where(lengths > switch.length, beyond, 0)
        hidden = None
        for value in group[lengths > 0].unique().tolist():
            rows = (group == value).nonzero()[:, 0]
            longest = int(lengths[rows].max())
            switch.reset()
            found = self._run(tokens[rows, :longest])
            if hidden is None:
                hidden = found.new_zeros(*tokens.shape, found.shape[-1])
            columns = torch.arange(longest, device=rows.device)
            hidden = hidden.index_put((rows[:, None], columns), found)
        switch.reset()
        assert hidden is not None, "a batch has rows"
        return hidden

    def _one_document_a_row(self, tokens: Tensor, segments: Tensor, restarted: Tensor) -> Tensor:
        begins = segments != segments.roll(1, dims=1)
        begins[:, 0] = True
        document = begins.flatten().cumsum(0) - 1
        place = restarted.flatten()
        count, longest = int(document[-1]) + 1, int(place.max()) + 1
        if compiles_each_shape(self.inner.get_input_embeddings().weight):
            count, longest = -(-count // ROWS) * ROWS, repeated_size(longest)
        rows = tokens.new_zeros(count, longest)
        rows[document, place] = tokens.flatten()
        lengths = document.bincount(minlength=count)
        return self._rows(rows, lengths)[document, place].view(*tokens.shape, -1)

    def _logits(self, hidden: Tensor, logits_at: Tensor | None) -> Tensor:
        if logits_at is not None:
            hidden = hidden.gather(1, logits_at[:, :, None].expand(-1, -1, hidden.shape[-1]))
        raw = self.inner.get_output_embeddings()(hidden)
        return _capped(raw * self.logit_scale, self.softcap)

    def _with_cache(
        self, tokens: Tensor, positions: Tensor | None, cache: KVCache, logits_at: Tensor | None
    ) -> Tensor:
        T = tokens.shape[1]
        if positions is None:  # beginnings: the last token of each is the one that is asked for
            positions = torch.arange(T, device=tokens.device).expand_as(tokens)
            last = positions[:, -1] if logits_at is None else logits_at.amax(dim=1)
        else:
            last = positions[:, -1]
        stored = tokens[:, :, None, None]
        seen = cache.write(0, stored, stored, positions)[0][:, :, 0, 0]
        hidden = self._rows(seen, last + 1)
        if seen.shape[1] != T:
            hidden = hidden.gather(1, positions[:, :, None].expand(-1, -1, hidden.shape[-1]))
        return self._logits(hidden, logits_at)


@dataclass(frozen=True)
class Switch:
    """Rotary positions of which all differ in a text longer than `length`.

    transformers decides by the longest text of a whole batch, and `dynamic` positions remember the
    longest text so far: neither may reach another document.
    """

    length: int
    at_each_length: bool
    """Whether beyond it each length has positions of its own (`dynamic`), or all the same."""
    modules: list[nn.Module]

    def reset(self) -> None:
        """Forget the texts so far."""
        for module in self.modules:
            original: Any = getattr(module, "original_max_seq_len", self.length)
            for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
                setattr(module, name, original)
            for name, values in list(module.named_buffers(recurse=False)):
                if name.endswith("original_inv_freq"):
                    used = name.replace("original_", "")
                    module.register_buffer(used, values.clone(), persistent=False)


def _switch(inner: Any) -> Switch | None:
    """Where the positions of a model switch, read off its rotary modules."""
    modules, lengths, dynamic = [], [], False
    for module in inner.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
        if not any(kind == "longrope" or "dynamic" in str(kind) for kind in kinds):
            continue
        modules.append(module)
        dynamic = dynamic or any("dynamic" in str(kind) for kind in kinds)
        said = module.config.rope_parameters
        for values in [said, *(v for v in said.values() if isinstance(v, dict))]:
            lengths.append(values.get("original_max_position_embeddings"))
        lengths.append(getattr(module, "original_max_seq_len", None))
    found = [length for length in lengths if length]
    return Switch(min(found), dynamic, modules) if modules and found else None


def _numbered(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _restarted(segments: Tensor) -> Tensor:
    """Positions (B, T) that count from 0 at each change of `segments` (B, T)."""
    at = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    begins = segments != segments.roll(1, dims=1)
    begins[:, 0] = True
    return at - (at * begins).cummax(dim=1).values


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
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


def _difference(found: Tensor, expected: Tensor) -> float:
    """Relative norm of the difference."""
    return float((found - expected).float().norm() / expected.float().norm().clamp(min=1e-30))


def _allowed(values: Tensor) -> float:
    """What rounding in the model's precision explains of a difference."""
    return 1e-4 if values.dtype == torch.float32 else 0.05


def _close(found: Tensor, expected: Tensor) -> bool:
    return _difference(found, expected) <= _allowed(expected)


@torch.no_grad()
def _head(inner: Any) -> tuple[float, float | None]:
    """(scale, softcap) by which the model's logits follow from its last hidden states.

    Both are numbers of the configuration, whatever it calls them; the scale may be an inverse.
    """
    tokens = _probe_tokens(inner, 8, seed=1)
    expected = inner(tokens, use_cache=False).logits
    hidden = _body(inner)(tokens, use_cache=False).last_hidden_state
    raw = inner.get_output_embeddings()(hidden)
    said = inner.config.get_text_config().to_dict()
    numbers = {key: float(v) for key, v in said.items() if isinstance(v, float | int) and v}
    scales = dict.fromkeys([1.0, *numbers.values(), *(1.0 / n for n in numbers.values())])
    found = [
        (scale, cap, _difference(_capped(raw * scale, cap), expected))
        for cap in (None, *(n for key, n in numbers.items() if "cap" in key))
        for scale in scales
    ]
    scale, cap, difference = min(found, key=lambda each: each[2])
    if difference <= _allowed(expected):
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
    expected = model._run(torch.cat([head, tail], dim=1))[:, :7]
    found = model._run(torch.cat([head, other], dim=1))[:, :7]
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
    expected = torch.cat([model._run(a), model._run(b)], dim=1)
    ways: tuple[Way, ...] = ("positions", "mask")
    for way in ways:
        if way == "mask" and windowed:
            continue  # a mask of our own would replace the window's
        model.way = way
        try:
            found = model._hidden(torch.cat([a, b], dim=1), segments)
            moved = model._hidden(torch.cat([other, b], dim=1), segments)
        except UNLIKE:
            continue  # the architecture takes no such argument
        if _close(found, expected) and _close(moved[:, 7:], expected[:, 7:]):
            return way
    return "alone"
