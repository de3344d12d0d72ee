"""What a decoder is made of: sizes, norms, positions and the few scales in which families differ.

`ModelConfig` holds numbers and choices, never a model's name; the decoder reads nothing else.
`hf/config.py` reads it from the `config.json` of a model directory.

Shape letters: D width, N heads, K key/value heads, H head size, V vocabulary.
"""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from whet.config import above_0, from_0, problems, wrong_values

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
Positive = Annotated[float, above_0]


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number, and no truth value."""
    return type(value) in (int, float) and math.isfinite(value)


def finite(value: float) -> str:
    """A check of a number."""
    return "" if math.isfinite(value) else "expected a number"


def positive(value: int) -> str:
    """A check of a count; how large it may be is for the model to say."""
    return "" if value > 0 else "expected a whole number above 0"


Count = Annotated[int, positive]


@dataclass(frozen=True)
class Rope:
    """Rotary positions of one layer (Su et al. 2021) and how they are stretched to longer texts.

    `rope.py` turns this into frequencies. Fields that a `kind` does not use stay at their default.
    """

    theta: Positive
    """Base of the wavelengths."""
    size: Count
    """How many of a head's H numbers are rotated; the rest pass unchanged."""
    kind: RopeKind = "default"
    factor: Positive = 1.0
    original_positions: Annotated[int, from_0] = 0
    """Longest text of the pretraining before it was stretched."""
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    truncate: bool = True
    short_factors: tuple[Positive, ...] = ()
    long_factors: tuple[Positive, ...] = ()
    output_scale: Positive = 1.0
    """Multiplies cosine and sine (yarn and longrope: their `attention_factor`)."""

    def __post_init__(self) -> None:
        found = wrong_values(self) or self._disagreements()
        problems([f"model config: rope: {problem}" for problem in found])

    def _disagreements(self) -> list[str]:
        """What is wrong with values that are each of the right kind."""
        found = []
        if self.kind not in ("default", "linear") and self.original_positions == 0:
            found.append("original_positions is 0; expected a whole number above 0")
        if self.kind == "longrope":
            found += [
                f"{name} is {list(values)}; expected {self.size // 2} numbers above 0"
                for name in ("short_factors", "long_factors")
                if len(values := getattr(self, name)) != self.size // 2
            ]
        if self.kind == "yarn" and (self.theta <= 1 or self.beta_fast < self.beta_slow):
            found.append(
                f"theta is {self.theta}, beta_fast {self.beta_fast}, beta_slow {self.beta_slow}; "
                "yarn needs a theta above 1, and a beta_fast of at least beta_slow"
            )
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            found.append(
                f"low_freq_factor is {self.low_freq_factor}; "
                f"expected less than high_freq_factor, {self.high_freq_factor}"
            )
        return found


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only Transformer."""

    vocab_size: Count
    width: Count
    n_layers: Count
    n_heads: Count
    n_kv_heads: Count
    head_size: Count
    mlp_width: Count
    max_positions: Count
    """Longest text it is made for; with learned positions a hard limit."""
    ropes: tuple[Rope | None, ...] = ()
    """One per layer; None is a layer without rotary positions. Empty: none in any layer."""
    windows: tuple[Count | None, ...] = ()
    """One per layer: a token sees itself and the `window - 1` tokens before it. Empty: no limit."""
    learned_positions: bool = False
    """Adds a trained vector per position to the embedding (GPT-2)."""
    tied: bool = False
    """The head is the embedding matrix."""
    score: bool = False
    """One number a token in place of logits: a reward model or a critic (a row of weights, no
    bias)."""

    norm: Literal["rms", "layer"] = "rms"
    norm_eps: Annotated[float, from_0] = 1e-5
    norm_offset: Annotated[float, from_0] = 0.0
    """RMSNorm multiplies by (offset + weight). Gemma's offset of 1 is kept as arithmetic and not
    added to the stored weights, so that a bfloat16 checkpoint is saved back bit for bit."""
    pre_norm: bool = True
    """A norm on the way into attention and MLP."""
    post_norm: bool = False
    """A norm on what attention and MLP give, before it is added to the residual stream."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMSNorm of queries and keys: over each head's H numbers, or over all heads at once."""

    activation: Activation = "silu"
    gated_mlp: bool = True
    """down(act(gate(x)) * up(x)) rather than down(act(up(x)))."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False

    attention_scale: Annotated[float | None, finite] = None
    """Multiplies q.k; None is 1 / sqrt(head_size)."""
    attention_softcap: Positive | None = None
    """Attention scores s become cap * tanh(s / cap) (Gemma 2)."""
    embed_scale: Positive = 1.0
    residual_scale: Positive = 1.0
    """Multiplies what attention and MLP add to the residual stream (Granite)."""
    logit_scale: Positive = 1.0
    logit_softcap: Positive | None = None

    init_std: Annotated[float, from_0] = 0.02
    family: str = "whet"
    """The ecosystem's `model_type`: how files name and lay out the weights. "whet" is Whet's own
    layout, for what no family of the ecosystem computes."""
    hf: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The `config.json` this was read from, so that saving keeps what Whet does not need."""
    generation: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """Its `generation_config.json`, for the same reason."""
    file_dtype: str = field(default="", compare=False, repr=False)
    """The precision of the weights in its files; `config.json` may name another."""

    def __post_init__(self) -> None:
        problems([f"model config: {problem}" for problem in wrong_values(self)])
        found = []
        heads = self.n_heads * self.head_size
        if max(heads, self.width, self.vocab_size, self.mlp_width) > 2**28 or self.n_layers > 1024:
            found.append(
                "model config: Whet reads no model of more than 1,024 layers or with a side above "
                f"{2**28:,}: it has {self.n_layers} layers, width {self.width}, {heads} in all "
                f"heads, MLP {self.mlp_width}, vocabulary {self.vocab_size}"
            )
        if self.n_heads % self.n_kv_heads:
            found.append(
                f"model config: {self.n_heads} heads can't share {self.n_kv_heads} key/value heads"
            )
        for name in ("ropes", "windows"):
            length = len(getattr(self, name))
            if length not in (0, self.n_layers):
                found.append(
                    f"model config: {name} has {length} entries for {self.n_layers} layers"
                )
        found += [
            f"model config: rotary size {rope.size} is odd or over the head size {self.head_size}"
            for rope in {rope for rope in self.ropes if rope is not None}
            if rope.size % 2 or rope.size > self.head_size
        ]
        if self.tied and self.head_bias:
            found.append("model config: a tied head has no bias")
        problems(found)

    def rope(self, layer: int) -> Rope | None:
        """Rotary positions of layer number `layer`, or None."""
        return self.ropes[layer] if self.ropes else None

    def window(self, layer: int) -> int | None:
        """Sliding window of layer number `layer` in tokens, or None."""
        return self.windows[layer] if self.windows else None

    @property
    def scale(self) -> float:
        """The factor on q.k."""
        return self.head_size**-0.5 if self.attention_scale is None else self.attention_scale


def llama(
    vocab_size: int,
    width: int,
    n_layers: int,
    n_heads: int,
    *,
    n_kv_heads: int | None = None,
    mlp_width: int | None = None,
    max_positions: int = 1024,
    tied: bool = True,
) -> ModelConfig:
    """A new model in the Llama layout: RMSNorm, rotary positions, SwiGLU, grouped key/value heads.

    `mlp_width` defaults to 8/3 of the width, rounded up to a multiple of 64: three matrices of that
    size hold as many numbers as the classical two of 4 x width. Initial weights have a standard
    deviation of sqrt(2 / (5 x width)) (arXiv:1910.05895): 0.02 is right for widths near 1,000 and
    much too small for tiny models.
    """
    head_size = width // n_heads
    if head_size * n_heads != width or head_size % 2:
        problems([f"model width {width} does not divide into {n_heads} heads of an even size"])
    return ModelConfig(
        vocab_size=vocab_size,
        width=width,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads or n_heads,
        head_size=head_size,
        mlp_width=mlp_width or -(-8 * width // 3 // 64) * 64,
        max_positions=max_positions,
        ropes=(Rope(10_000.0, head_size),) * n_layers,
        tied=tied,
        init_std=math.sqrt(2 / (5 * width)),
        family="llama",
    )
