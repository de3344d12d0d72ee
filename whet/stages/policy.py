"""A stage that trains a policy on rewards for its own replies: what GRPO and PPO share."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from torch import nn

from whet.chat.chat import Chat
from whet.config import collected, problems
from whet.data.batches import Batch
from whet.errors import UserError
from whet.flags.policy import parse_reward
from whet.rl.prompts import Prompts, load_prompts
from whet.rl.remote import Remote
from whet.rl.rewards import NEEDS_GOLD, open_rewards
from whet.rl.rollouts import Complete, Rollouts
from whet.rl.sampling import BATCH, PolicyConfig, Sampler, fill_cache, policy_of
from whet.rl.server import Server
from whet.stages.model import Opened, writer
from whet.train.distributed import Ranks
from whet.train.session import total_steps
from whet.train.stage import Stage, Sums

ADAPTER_LR = 1e-5
"""Usual learning rate of an adapter here."""


def policy_stage(
    config: PolicyConfig,
    ranks: Ranks,
    opened: Opened,
    loss_fn: Callable[[nn.Module, Batch], Sums],
    *,
    name: str,
    complete: Complete | None = None,
) -> Stage:
    """The stage that samples replies to `config.prompts`, and trains them with `loss_fn`.

    Raises UserError for prompts and rewards that do not fit the model.
    """
    quiet = config.quiet or not ranks.first
    chat = opened.chat
    if chat is None:
        raise UserError(f"--model {config.model}: holds no tokenizer; add --tokenizer DIR")
    prompts, dev, notes = _open_prompts(config, opened.model.config.max_positions, chat, quiet)
    terms = open_rewards(
        config.reward,
        chat,
        ExitStack(),  # processes of the user's functions end with this one
        max_new_tokens=config.max_new_tokens,
        seconds=config.reward_seconds,
        device=ranks.device,
    )
    facts = {
        "prompts": str(config.prompts),
        "reward": list(config.reward),
        "data_hash": prompts.fingerprint,
        "tokenizer_hash": chat.tokenizer.hash,
    }
    save = writer(config, opened, name, facts)
    remote, by_whom = None, "by this process"
    if config.rollout_url is not None:
        remote = Remote(
            Server(config.rollout_url.rstrip("/"), config.rollout_seconds),
            config,
            replace(save, out_ckpt=None),
            opened.lora is not None,
            prompts.prompts[0].ids,
            opened.model.config.max_positions,
            tuple(chat.stop_ids),
        )
        by_whom = remote.connect(max(len(prompt.ids) for prompt in prompts.prompts))
    sampler = Sampler(prompts, config, terms, chat, quiet, remote)
    rollouts = Rollouts(sampler, ranks, complete)

    def dry_rollout(model: nn.Module) -> None:
        rollouts.dry_rollout(model)
        if dev is not None:
            longest = sorted((prompt.ids for prompt in dev.prompts), key=len)[-BATCH:]
            fill_cache(policy_of(model), longest, config.max_new_tokens, 0.0, BATCH)

    updates = f"{rollouts.per_rollout} updates" if rollouts.per_rollout > 1 else "1 update"
    a_rollout = min(config.batch_size, len(prompts))
    return Stage(
        model=opened.model,
        documents=rollouts,
        dev=dev,
        total_steps=total_steps(config, rollouts.rollouts_per_epoch * rollouts.per_rollout),
        batches=rollouts.batches,
        loss_fn=loss_fn,
        evaluate=None if dev is None else replace(sampler, prompts=dev).evaluate,
        save_model=save,
        rehearse=save.rehearse,
        before_step=rollouts.before_step,
        dry_steps=rollouts.dry_steps,
        dry_rollout=dry_rollout,
        rows="prompts",
        best="dev_reward",
        higher_is_better=True,
        header=[
            *opened.header,
            ("prompts", f"{prompts.path}: {len(prompts):,}, {len(dev) if dev else 0:,} held out"),
            (
                "rollout",
                f"{a_rollout} prompts x {config.group_size} replies of up to "
                f"{config.max_new_tokens} tokens, {updates}, {by_whom}",
            ),
            ("reward", " + ".join(f"{term.weight:g} x {term.name}" for term in terms)),
            *(("note", note) for note in notes),
        ],
    )


def _open_prompts(
    config: PolicyConfig, max_positions: int, chat: Chat, quiet: bool
) -> tuple[Prompts, Prompts | None, list[str]]:
    names = [parse_reward(text)[0] for text in config.reward]
    needs_gold = next((name for name in names if name in NEEDS_GOLD), "")
    load = partial(load_prompts, longest=max_positions - 1, needs_gold=needs_gold, quiet=quiet)
    loaded, found, notes = dict[str, Prompts](), list[str](), list[str]()
    training = "--prompts", config.prompts, config.overfit_rows
    for flag, path, limit in (training, ("--dev", config.dev, config.dev_limit)):
        with collected(found):
            if path is not None:
                loaded[flag], more = load(path, chat, limit=limit, flag=flag)
                notes += more
    problems(found)
    return loaded["--prompts"], loaded.get("--dev"), notes
