"""Prompts -> groups of responses, spread over all engines of the job, the same on every rank.

Which engine draws a response does not matter: its seed is a function of what it is.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from megatron_zero.rollout.engine import Request, RolloutEngine, SamplingSettings
from megatron_zero.types import Prompt, RolloutGroup

SeedFunction = Callable[[int, Prompt, int], int]  # place in the batch, prompt, sample -> seed


class Sampler:
    """Feeds one engine and exchanges responses with the other ranks."""

    def __init__(self, engine: RolloutEngine, host_group: dist.ProcessGroup) -> None:
        self.engine = engine
        self.host_group = host_group

    def sample(
        self,
        prompts: Sequence[Prompt],
        settings: SamplingSettings,
        *,
        group_size: int,
        seed_of: SeedFunction,
        policy_version: int,
    ) -> list[RolloutGroup]:
        """`group_size` responses to every prompt, in the order of `prompts`, on every rank.

        Args:
            prompts: the same on every rank.
            settings: length, temperature, stop strings.
            seed_of: the seed of each response.
            policy_version: the weights that the responses must come from.

        Raises:
            RuntimeError: an engine is on other weights.
        """
        own = range(self.engine.engine_index, len(prompts), self.engine.num_engines)
        requests = [
            Request(prompt_token_ids=prompts[p].token_ids, seed=seed_of(p, prompts[p], sample))
            for p in own
            for sample in range(group_size)
        ]
        responses = self.engine.generate(requests, settings)
        drawn = {
            p: tuple(responses[i * group_size : (i + 1) * group_size]) for i, p in enumerate(own)
        }
        by_prompt = merged(drawn if self.engine.is_engine_leader else {}, self.host_group)
        for group in by_prompt.values():
            for response in group:
                if response.policy_version != policy_version:
                    raise RuntimeError(
                        f"engine {response.engine_index} generated with the weights of version "
                        f"{response.policy_version} where version {policy_version} was wanted"
                    )
        return [
            RolloutGroup(prompt=prompt, responses=by_prompt[p]) for p, prompt in enumerate(prompts)
        ]


def merged(own: dict[int, Any], host_group: dist.ProcessGroup) -> dict[int, Any]:
    """Every rank's part of what is kept by prompt, in one dictionary on all of them."""
    parts = [own]
    if host_group.size() > 1:
        parts = [{} for _ in range(host_group.size())]
        dist.all_gather_object(parts, own, group=host_group)
    return {p: value for part in parts for p, value in part.items()}
