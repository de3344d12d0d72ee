"""The engine equals decoding without a cache, token for token."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.without_cache import generate_without_cache
from whet.errors import UserError
from whet.generate import engine, rows
from whet.generate.engine import Sampling, generate, sample, stream
from whet.generate.rows import Row, Rows
from whet.model.config import ModelConfig, Rope, llama
from whet.model.decoder import Transformer, init_weights

VOCABULARY = 61


def tiny(**changes) -> ModelConfig:
    config = llama(VOCABULARY, 32, 3, 4, n_kv_heads=2, max_positions=96)
    return dataclasses.replace(config, init_std=0.3, **changes)  # large weights: varied replies


CONFIGS = {
    "grouped heads": tiny(),
    "sliding window": tiny(windows=(5, None, 7)),
    "learned positions": tiny(ropes=(), learned_positions=True, norm="layer", gated_mlp=False),
    "layers without rope": tiny(ropes=(None, *tiny().ropes[1:])),
    "soft caps": tiny(attention_softcap=3.0, logit_softcap=5.0),
}


@pytest.fixture(params=CONFIGS, ids=lambda name: name.replace(" ", "_"))
def model(request: pytest.FixtureRequest) -> Transformer:
    return build(CONFIGS[request.param])


def build(config: ModelConfig) -> Transformer:
    model = Transformer(config)
    init_weights(model, seed=3)
    return model


def some_prompts(count: int, longest: int = 30, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [
        torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in lengths
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_greedy_equals_decoding_without_a_cache(model: Transformer, batch_size: int) -> None:
    prompts = some_prompts(7)
    options = {"max_new_tokens": 20, "stop_ids": range(0, VOCABULARY, 6)}
    expected = generate_without_cache(model, prompts, **options)
    assert generate(model, prompts, batch_size=batch_size, **options) == expected
    assert len({len(reply) for reply in expected}) > 2, "the replies should end at various places"


def test_texts_that_outgrow_the_switch_of_longrope() -> None:
    """Beyond 24 tokens all tokens of a text turn otherwise, those in the cache as well."""
    factors = {"short_factors": (1.0, 1.1, 1.3, 1.5), "long_factors": (1.0, 3.0, 5.0, 9.0)}
    rope = Rope(10_000.0, 8, kind="longrope", original_positions=24, **factors)
    model = build(tiny(ropes=(rope,) * 3))
    prompts = some_prompts(7, longest=40)
    assert {len(prompt) > 24 for prompt in prompts} == {True, False}
    expected = generate_without_cache(model, prompts, max_new_tokens=30, stop_ids=())
    found = generate(model, prompts, max_new_tokens=30, stop_ids=(), batch_size=3)
    assert found == expected


@pytest.mark.parametrize("check_every", [2, 5, 16, 64])
def test_looking_seldom_changes_nothing(monkeypatch, check_every: int) -> None:
    """As on a GPU, where rows run on behind their stop token until the host looks."""
    model = build(CONFIGS["learned positions"])
    prompts = some_prompts(9, longest=90)
    options = {"max_new_tokens": 30, "stop_ids": [4, 9], "temperature": 0.7, "batch_size": 4}
    expected = generate(model, prompts, **options)
    monkeypatch.setitem(engine.CHECK_EVERY, "cpu", check_every)
    assert generate(model, prompts, **options) == expected


@pytest.mark.parametrize("sampling", [Sampling(1.0, seed=1), Sampling(0.8, top_k=9, top_p=0.8)])
def test_samples_do_not_depend_on_the_batch(sampling: Sampling) -> None:
    model = build(CONFIGS["grouped heads"])
    prompts = [*some_prompts(5), [1, 2, 3], [1, 2, 3]]
    options = {"max_new_tokens": 12, "stop_ids": [4]}
    expected = generate_without_cache(model, prompts, sampling=sampling, **options)
    for batch_size in (1, 3, 8):
        replies = generate(
            model, prompts, batch_size=batch_size, **dataclasses.asdict(sampling), **options
        )
        assert replies == expected
    assert expected[-1] != expected[-2], "a prompt given twice is sampled twice"
    other_seed = dataclasses.replace(sampling, seed=99)
    assert generate_without_cache(model, prompts, sampling=other_seed, **options) != expected


def test_a_prompt_given_often_is_computed_once() -> None:
    """As the replies of a group are sampled; each is the one that its prompt gets alone."""
    model = build(CONFIGS["sliding window"])
    first, second = some_prompts(2)
    shapes: list[tuple[int, ...]] = []
    hook = model.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    prompts = [first, second, first, first]
    options = {"max_new_tokens": 9, "stop_ids": [4], "temperature": 1.0}
    together = generate(model, prompts, batch_size=4, **options)
    hook.remove()
    assert shapes[0] == (2, max(len(first), len(second)))
    assert together == generate(model, prompts, batch_size=1, **options)


class Waits(TorchDispatchMode):
    """Remembers operations whose result the host has to wait for."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if any(name in op.__name__ for name in self.NAMES):
            self.seen.append(op.__name__)
        return op(*args, **(kwargs or {}))


def test_rows_join_and_leave_at_any_time_each_with_settings_of_its_own() -> None:
    """Every reply is the one that its prompt gets alone, whoever else runs and leaves."""
    model = build(CONFIGS["sliding window"])
    settings = [Sampling(), Sampling(0.8), Sampling(1.2, top_k=9), Sampling(0.7, top_p=0.8)]
    prompts = some_prompts(8)
    stops = list(range(0, VOCABULARY, 9))
    running = Rows(model, 3, slots=60, max_new_tokens=30, stop_ids=set(stops), measured=1.0)
    waiting = [
        Row(
            i, (settings[i % 4].seed, 0), list(prompt), len(prompt) + 30, settings[i % 4], top=i % 3
        )
        for i, prompt in enumerate(prompts)
    ]
    replies, left = {i: [] for i in range(8)}, 2
    for step in range(200):
        pieces = running.begin([waiting.pop(0)]) if waiting and len(running.live) < 3 else []
        pieces += running.step(1 + step % 3) if running.live else []
        for piece in pieces:
            replies[piece.index] += piece.tokens
            for token, logp, top in zip(piece.tokens, piece.logp, piece.top, strict=True):
                assert logp <= 0
                if settings[piece.index % 4].temperature == 0 and top:
                    assert top[0] == (token, pytest.approx(logp))
        if step == 3:
            running.leave(left)
        if not waiting and not running.live:
            break
    for i, prompt in enumerate(prompts):
        sampling = settings[i % 4]
        (alone,) = generate_without_cache(
            model, [prompt], max_new_tokens=30, stop_ids=stops, sampling=sampling
        )
        assert replies[i] == (alone[: len(replies[i])] if i == left else alone)


def running_rows(sampling: Sampling, device: str = "cpu") -> Rows:
    model = build(CONFIGS["sliding window"]).to(device)
    rows = Rows(model, rows=4, slots=60, max_new_tokens=20, stop_ids=set())
    prompts = enumerate(some_prompts(3))
    rows.begin([Row(i, (0, i), prompt, 60, sampling) for i, prompt in prompts])
    return rows


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, top_k=9, top_p=0.8)])
def test_steps_never_wait_for_the_device(sampling: Sampling) -> None:
    rows = running_rows(sampling)
    with Waits() as waits:
        assert rows.run(4)[0].shape == (3, 4)
    assert waits.seen == []


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, top_k=9, top_p=0.8)])
def test_steps_never_wait_for_a_real_gpu(sampling: Sampling) -> None:
    rows = running_rows(sampling, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows.run(4)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_stop_token_is_part_of_the_reply_and_ends_it() -> None:
    model = build(CONFIGS["grouped heads"])
    prompts = some_prompts(6)
    free = generate(model, prompts, max_new_tokens=16, stop_ids=[])
    assert all(len(reply) == 16 for reply in free)
    stop = free[0][5]
    for reply, full in zip(
        generate(model, prompts, max_new_tokens=16, stop_ids=[stop]), free, strict=True
    ):
        cut = full.index(stop) + 1 if stop in full else 16
        assert reply == full[:cut]


def test_a_reply_ends_where_the_positions_do() -> None:
    model = build(CONFIGS["learned positions"])
    prompts = [[1] * 90, [2] * 95, [3] * 10]
    replies = generate(model, prompts, max_new_tokens=12, stop_ids=[])
    assert [len(reply) for reply in replies] == [6, 1, 12]
    assert replies == generate_without_cache(model, prompts, max_new_tokens=12, stop_ids=[])


def test_prompts_that_cannot_be_answered() -> None:
    model = build(CONFIGS["grouped heads"])
    with pytest.raises(UserError, match=r"prompt 1 has 96 tokens.*96 positions"):
        generate(model, [[1], [1] * 96], max_new_tokens=2, stop_ids=[])
    with pytest.raises(UserError, match="prompt 0 has no tokens"):
        generate(model, [[]], max_new_tokens=2, stop_ids=[])
    assert generate(model, [], max_new_tokens=2, stop_ids=[]) == []
    assert generate(model, [[1], [2]], max_new_tokens=0, stop_ids=[]) == [[], []]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(1.0, 3)])
def test_a_model_of_nan_is_refused(sampling: Sampling) -> None:
    model = build(tiny())
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    with pytest.raises(UserError, match=r"no numbers \(NaN\)"):
        next(stream(model, [1, 2], max_new_tokens=3, stop_ids=(), sampling=sampling))


def test_a_small_prefill_budget_changes_nothing(monkeypatch) -> None:
    model = build(CONFIGS["grouped heads"])
    prompts = some_prompts(6)
    expected = generate(model, prompts, max_new_tokens=5, stop_ids=[])
    monkeypatch.setitem(rows.PREFILL_TOKENS, "cpu", 8)
    assert generate(model, prompts, max_new_tokens=5, stop_ids=[]) == expected


def test_stream_gives_the_reply_token_by_token() -> None:
    model = build(CONFIGS["grouped heads"])
    prompts = some_prompts(1)
    options = {"max_new_tokens": 9, "stop_ids": [4]}
    sampling = Sampling(0.9, seed=5)
    tokens = list(stream(model, prompts[0], sampling=sampling, **options))
    assert [tokens] == generate(model, prompts, temperature=0.9, seed=5, **options)


def test_the_model_is_left_as_it_was() -> None:
    model = build(CONFIGS["grouped heads"]).train()
    first = stream(model, [1, 2], max_new_tokens=3, stop_ids=[], sampling=Sampling())
    next(first)
    assert torch.is_grad_enabled()
    first.close()
    assert model.training
    generate(model.eval(), [[1, 2]], max_new_tokens=3, stop_ids=[])
    assert not model.training


def test_bfloat16_model_keeps_a_bfloat16_cache() -> None:
    model = build(CONFIGS["grouped heads"]).bfloat16()
    replies = generate(model, some_prompts(3), max_new_tokens=4, stop_ids=[])
    assert [len(reply) for reply in replies] == [4, 4, 4]


def test_a_really_pretrained_model_writes_what_its_author_documents(shared_data) -> None:
    """karpathy/tinyllamas: greedy text of stories260K; here 4 prompts beside it in the batch."""
    from whet.chat.chat import load_tokenizer
    from whet.model.open import load_backbone_from_ckpt

    folder = shared_data / "models/stories260K"
    model, chat = load_backbone_from_ckpt(folder, quiet=True), load_tokenizer(folder)
    prompts = [
        [1],
        *([1, *chat.tokenizer.encode(text)] for text in ("Tim", "One day, a dog", "Lily")),
    ]
    options = {"max_new_tokens": 40, "stop_ids": chat.stop_ids}
    replies = generate(model, prompts, batch_size=3, **options)
    assert chat.tokenizer.decode(replies[0]).startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside"
    )
    assert replies == generate_without_cache(model, prompts, **options)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_samplers_log_probabilities_are_the_trainers(
    model: Transformer, temperature: float
) -> None:
    """So the first ratio of a policy step is 1."""
    prompts, stops = some_prompts(5), range(0, VOCABULARY, 6)
    replies = sample(
        model,
        prompts,
        keys=[(3, i) for i in range(5)],
        max_new_tokens=12,
        stop_ids=stops,
        temperature=temperature,
        batch_size=3,
    )
    for prompt, reply in zip(prompts, replies, strict=True):
        tokens = torch.tensor([[*prompt, *reply.ids]])
        weight = torch.zeros(tokens.shape)
        weight[0, len(prompt) - 1 : -1] = 1.0
        found = model(
            tokens,
            targets=tokens.roll(-1, 1),
            weight=weight,
            per_token=True,
            temperature=temperature,
        )
        assert len(reply.logp) == len(reply.ids) > 0
        trained = -found.nll[0, len(prompt) - 1 : -1]
        assert torch.allclose(trained, torch.tensor(reply.logp), atol=1e-5)
        assert reply.stopped == (reply.ids[-1] in stops)


def test_a_reply_depends_on_its_key_alone() -> None:
    model, stops = build(tiny()), range(0, VOCABULARY, 6)
    options = {"max_new_tokens": 9, "stop_ids": stops, "temperature": 1.0}
    prompts = some_prompts(1) * 5
    keys = [(1, 0, i) for i in range(5)]
    together = sample(model, prompts, keys=keys, **options)
    assert len({tuple(reply.ids) for reply in together}) > 1
    backwards = sample(model, prompts, keys=keys[::-1], batch_size=2, **options)
    assert [reply.ids for reply in backwards[::-1]] == [reply.ids for reply in together]
