"""Each check notices what it is for: the thing is broken on purpose, and the row must say fail."""

import json
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch

from whet.data.store import PackedStore
from whet.doctor import numbers, saving, stages, templates
from whet.doctor.command import examine
from whet.doctor.subject import judge, worse
from whet.generate.cache import Cache
from whet.model import decoder, kernels
from whet.model.hf.families import OWN_LAYOUT
from whet.rl import rollout_file
from whet.stages.reward import last_tokens

PACKED = {"packed equals separate: loss", "packed equals separate: gradient"}
LEAK = "changing a document moves no logit of another"
TEMPLATE = {
    "every reply is trained after its own prompt",
    "every trained reply ends with a stop token",
}
MADE_FOR = "the packed file was made for this model"
COUNTS = "the file's trained-token counts are true"
SAVED = "saved and loaded: the same logits"
EXPORT = {"transformers computes the same logits", "transformers tokenises the same"}
CACHE = "the cache chooses the tokens that no cache would"
NLL = {"token losses equal full logits: loss", "token losses equal full logits: gradient"}
START = "DPO begins at ln 2, IPO at 1/(4 beta^2)"
CACHED = "cached reference log-probs are those on the fly"
REWARD = "a reward is the same packed, padded and alone"
EQUAL = "replies of equal reward have no gradient"
SAMPLER = "the sampler's log-probs are the trainer's"
POLICY = "the first policy step: ratio 1, SFT's gradient"
ALL = {
    *NLL,
    START,
    CACHED,
    REWARD,
    EQUAL,
    SAMPLER,
    POLICY,
    *PACKED,
    LEAK,
    *TEMPLATE,
    MADE_FOR,
    COUNTS,
    SAVED,
    *EXPORT,
    CACHE,
}


def found(subject, checks) -> dict[str, str]:
    """Claim -> verdict; a claim with several rows passes if all of them do."""
    verdicts: dict[str, str] = {}
    for row in examine(subject, checks):
        if verdicts.get(row["claim"]) != "fail":
            verdicts[row["claim"]] = row["verdict"]
    return verdicts


def failing(subject, *functions) -> set[str]:
    checks = [(function.__name__, function) for function in functions]
    verdicts = found(subject, checks)
    return {claim for claim, verdict in verdicts.items() if verdict == "fail"}


def leaking(monkeypatch) -> None:
    """Attention over the whole row, as packing without isolation does it."""
    plan = decoder.plan_documents

    def leaky(shape, device, segments=None, weight=None):
        whole = None if segments is None else (segments != 0).long()
        return plan(shape, device, whole, weight)

    monkeypatch.setattr(decoder, "plan_documents", leaky)


def test_attention_that_leaks(subject, monkeypatch):
    leaking(monkeypatch)
    assert failing(subject, numbers.packed_equals_alone) == {*PACKED, LEAK}


def test_attention_that_leaks_a_little(subject, monkeypatch):
    """One part in a million of the row's mean: no loss shows it, the logits do."""
    documents = kernels.documents

    def leaky(q, k, v, *lengths, **rest):
        return documents(q, k, v, *lengths, **rest) + 1e-6 * v.mean(0).repeat_interleave(
            q.shape[1] // v.shape[1], 0
        )

    monkeypatch.setattr(kernels, "documents", leaky)
    assert failing(subject, numbers.packed_equals_alone) == {LEAK}


def test_positions_that_do_not_count(subject, monkeypatch):
    """Positions that run twice as fast in all documents of a batch but the first one."""
    plan_documents = decoder.plan_documents

    def wrong(*given):
        plan = plan_documents(*given)
        speed = torch.full((len(plan.sizes),), 2)
        speed[0] = 1
        speed = speed.repeat_interleave(torch.tensor(plan.sizes))
        return replace(plan, positions=plan.positions * speed)

    monkeypatch.setattr(decoder, "plan_documents", wrong)
    subject.model.layers.apply(sharpen)
    assert failing(subject, numbers.packed_equals_alone) == PACKED


def test_a_weight_that_changes_on_the_way(subject, monkeypatch):
    load = saving.load

    def nearly(path):
        model = load(path)
        with torch.no_grad():
            model.layers[1].mlp.up.weight[0, 0] += 1e-4
        return model

    monkeypatch.setattr(saving, "load", nearly)
    assert failing(subject, saving.saved_equals_loaded) == {SAVED}


def test_an_export_that_others_read_otherwise(subject):
    path = subject.saved_model() / "config.json"
    config = json.loads(path.read_text())
    config["rms_norm_eps"] = 1e-2
    path.write_text(json.dumps(config))
    assert failing(subject, saving.export_agrees) == {"transformers computes the same logits"}


def test_a_tokenizer_that_others_read_otherwise(subject):
    path = subject.saved_model() / "tokenizer.json"
    content = json.loads(path.read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "e"}, "content": "3"}
    path.write_text(json.dumps(content))
    assert failing(subject, saving.export_agrees) == {"transformers tokenises the same"}


def test_export_without_a_family(subject):
    subject.model.config = replace(subject.model.config, family=OWN_LAYOUT, hf={})
    verdicts = found(subject, [("export", saving.export_agrees)])
    assert set(verdicts.values()) == {"skipped"}


def test_a_cache_that_forgets(subject, monkeypatch):
    write = Cache.write

    def forgetful(self, layer, k, v, positions):
        keys, values = write(self, layer, k, v, positions)
        return keys, values * (torch.arange(keys.shape[1])[:, None, None] != 1)

    monkeypatch.setattr(Cache, "write", forgetful)
    subject.model.layers.apply(sharpen)
    assert failing(subject, numbers.cache_equals_none) == {CACHE}


def test_token_losses_whose_gradient_is_half(subject, monkeypatch):
    forward = decoder.Transformer.forward

    def half(self, *given, per_token=False, **rest):
        found = forward(self, *given, per_token=per_token, **rest)
        if not per_token:
            return found
        return found._replace(nll=(found.nll + found.nll.detach()) / 2)

    monkeypatch.setattr(decoder.Transformer, "forward", half)
    bad = failing(subject, stages.losses_and_samples)
    assert bad == {"token losses equal full logits: gradient", POLICY}


def test_dropout_in_the_reference_only(subject, monkeypatch):
    """A reference by another way than the policy: DPO does not begin at ln 2."""
    compute = stages.compute_reference

    def other(stores, reference, path, *arguments, **options):
        compute(stores, reference, path, *arguments, **options)
        for logp in reference.logp.values():
            logp *= np.where(np.arange(len(logp)) % 2, 1.01, 1)
        reference.save(path)

    monkeypatch.setattr(stages, "compute_reference", other)
    assert failing(subject, stages.losses_and_samples) == {START, CACHED}


def test_a_reward_that_is_read_one_token_too_early(subject, monkeypatch):
    """Where padding follows, as those do who look for it."""

    def early(segments):
        found = last_tokens(segments)
        padded = (segments == 0).any(1, keepdim=True)
        return torch.where(padded, found.roll(-1, 1), found)

    monkeypatch.setattr(stages, "last_tokens", early)
    assert failing(subject, stages.losses_and_samples) == {REWARD}


def test_equal_rewards_that_are_divided_by_a_rounding(subject, monkeypatch):
    given = rollout_file.group_advantages

    def rounded(rewards, kind):
        return given(rewards, kind) + (rewards.amax(1) == rewards.amin(1))[:, None] * 1e-9

    monkeypatch.setattr(rollout_file, "group_advantages", rounded)
    assert failing(subject, stages.losses_and_samples) == {EQUAL}


def test_a_sampler_of_another_temperature(subject, monkeypatch):
    sample = stages.sample
    monkeypatch.setattr(stages, "sample", lambda *a, **k: sample(*a, **k, temperature=0.5))
    subject.model.layers.apply(sharpen)
    assert failing(subject, stages.losses_and_samples) == {SAMPLER, POLICY}


def sharpen(module) -> None:
    """Larger weights than the initial ones: attention then decides something."""
    if isinstance(module, torch.nn.Linear):
        with torch.no_grad():
            module.weight.mul_(10)


def test_a_prompt_of_another_kind(subject, monkeypatch):
    monkeypatch.setattr(templates, "encode_prompt", lambda *args, **rest: [1, 2, 3])
    assert failing(subject, templates.certificate) == {
        "every reply is trained after its own prompt"
    }


def test_a_reply_without_its_end(subject, monkeypatch):
    encode = templates.encode_many

    def endless(*args):
        results = encode(*args)
        for result in results:
            for i, example in enumerate(result.examples):
                spans = tuple(replace(span, end=span.end - 1) for span in example.spans)
                result.examples[i] = replace(example, spans=spans)
        return results

    monkeypatch.setattr(templates, "encode_many", endless)
    assert failing(subject, templates.certificate) == {"every trained reply ends with a stop token"}


@pytest.mark.parametrize("claim", [MADE_FOR, COUNTS])
def test_a_file_of_another_model_or_with_wrong_counts(subject, ward, tmp_path, claim):
    path = tmp_path / "other.h5"
    path.write_bytes((ward / "train.h5").read_bytes())
    with h5py.File(path, "r+") as file:
        if claim == MADE_FOR:
            file.attrs["tokenizer_hash"] = "0" * 64
        else:
            file["loss_tokens"][3] += 1
    subject.store = PackedStore(path)
    assert failing(subject, templates.data_fit) == {claim}


@pytest.mark.parametrize("stops", [None, [7]])
def test_a_file_that_records_other_stop_ids(subject, ward, tmp_path, stops):
    path = tmp_path / "other.h5"
    path.write_bytes((ward / "train.h5").read_bytes())
    record = subject.chat.record()
    with h5py.File(path, "r+") as file:
        file.attrs["chat"] = json.dumps({**record, "stop_ids": stops or record["stop_ids"]})
    subject.store = PackedStore(path)
    assert failing(subject, templates.data_fit) == ({MADE_FOR} if stops else set())


def test_nan_is_never_a_pass():
    nan = float("nan")
    assert judge("x", nan, 1.0).verdict == "fail"
    for a, b in ((nan, 1.0), (1.0, nan)):
        assert worse(a, b) != worse(a, b)
    assert worse(1.0, 2.0) == worse(2.0, 1.0) == 2.0
    assert numbers.relative(0.0, 0.0) == 0.0
    assert numbers.relative(1.0, 0.0) == float("inf")
