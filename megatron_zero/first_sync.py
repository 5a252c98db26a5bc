"""A run's first weight sync, verified on real tokens before anything depends on it.

The engine draws a few short responses to the run's own prompts, the policy computes the logprobs
of the same tokens, and the run stops unless they are the same distribution: within a bound that is
tighter than that of the later steps, and whatever the responses are worth. It costs one short
generation and one pass without a gradient; no prompt is used up and no seed of a step is drawn.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from megatron_zero.batching import Packing, build_pass
from megatron_zero.config import MISMATCH_REASONS
from megatron_zero.determinism import derive_seed
from megatron_zero.losses import kl_estimate
from megatron_zero.rollout.engine import SamplingSettings
from megatron_zero.rollout.sampler import Sampler, merged
from megatron_zero.types import GlobalBatch, Prompt, Response, RolloutGroup, TrainSample

if TYPE_CHECKING:
    from megatron_zero.policy.policy import Policy

PROMPTS_PER_ENGINE = 4
MAX_TOKENS = 16  # of a response: one comes from reading the prompt, the others one by one


def draw(
    sampler: Sampler, prompts: Sequence[Prompt], settings: SamplingSettings, *, version: int
) -> list[RolloutGroup]:
    """One response of a few tokens to every prompt; collective, the same on every rank."""

    def seed_of(place: int, prompt: Prompt, sample: int) -> int:
        return derive_seed("first sync", place, prompt.index, sample)

    return sampler.sample(prompts, settings, group_size=1, seed_of=seed_of, policy_version=version)


def policy_logprobs(
    policy: "Policy", groups: Sequence[RolloutGroup], packing: Packing
) -> dict[int, list[float]]:
    """The policy's logprobs of every response's tokens, by group; collective, all on every rank."""
    samples = []
    for group in groups:
        (response,) = group.responses
        samples.append(
            TrainSample(
                token_ids=group.prompt.token_ids + response.token_ids,
                prompt_length=len(group.prompt.token_ids),
                rollout_logprobs=response.rollout_logprobs,
                advantage=0.0,
            )
        )
    batch = policy.with_old_logprobs(GlobalBatch(minibatches=(build_pass(samples, packing),)))
    own: dict[int, list[float]] = {}
    if policy.topology.is_last_stage:
        for microbatch in batch.minibatches[0].microbatches:
            assert microbatch.old_logprobs is not None
            values = microbatch.old_logprobs.cpu()
            masks = dict(microbatch.by_sample(microbatch.loss_mask))
            for i, logprobs in microbatch.by_sample(values):
                own[i] = logprobs[masks[i]].tolist()
    return merged(own, policy.topology.host_group)


def compare(
    groups: Sequence[RolloutGroup], logprobs: Mapping[int, Sequence[float]], *, max_kl: float
) -> str:
    """One sentence on how far engine and policy are apart.

    Args:
        groups: of one response each, with the engine's logprobs.
        logprobs: the policy's, by group.
        max_kl: k3 estimate of KL(engine || policy) per token that is allowed.

    Raises:
        RuntimeError: it is above `max_kl`, or no number.
    """
    places: list[tuple[Prompt, Response, int]] = []
    engine: list[float] = []
    policy: list[float] = []
    for i, group in enumerate(groups):
        (response,) = group.responses
        places += [(group.prompt, response, t) for t in range(len(response.token_ids))]
        engine += response.rollout_logprobs
        policy += logprobs[i]
    of_engine = torch.tensor(engine, dtype=torch.float64)
    of_policy = torch.tensor(policy, dtype=torch.float64)
    kl = kl_estimate(of_engine, of_policy).mean().item()
    differences = (of_policy - of_engine).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    worst = int(differences.argmax())
    largest = f"largest difference of a logprob {differences[worst].item():.3g}"
    if kl <= max_kl:
        return f"engine and policy agree on {len(engine)} tokens: KL {kl:.1e}, {largest}"
    prompt, response, t = places[worst]
    # above the bound by itself: k3 of a small difference d is d^2 / 2
    num_beyond = int((differences > (2 * max_kl) ** 0.5).sum())
    raise RuntimeError(
        f"engine and policy disagree after the first weight sync: KL(engine || policy) is {kl:.3g} "
        f"on {len(engine)} tokens, above mismatch.max_first_kl={max_kl:.3g}, and {num_beyond} of "
        f"them are above it by themselves; {largest}, at token {t + 1} of "
        f"{len(response.token_ids)} of the response to prompt {prompt.index} of {prompt.source!r} "
        f"(token id {response.token_ids[t]}, engine {response.engine_index}: {engine[worst]:.4f}, "
        f"policy: {policy[worst]:.4f}). Nothing was trained. {MISMATCH_REASONS}."
    )
