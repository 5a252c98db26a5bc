"""Verifying a step's responses: each rank grades its share, all get every verdict."""

import functools
import logging
from collections.abc import Sequence
from typing import Optional

import torch.distributed as dist

from megatron_zero.config import RunConfig
from megatron_zero.rewards.base import apply_truncation
from megatron_zero.rewards.golds import check_readable
from megatron_zero.rewards.verifier_pool import VerifierPool
from megatron_zero.rollout.sampler import merged
from megatron_zero.types import Graded, Prompt, RolloutGroup

logger = logging.getLogger(__name__)


def verifier_pool(config: RunConfig) -> VerifierPool:
    """A rank's verifier workers, as `reward` and the template say."""
    return VerifierPool(
        num_workers=config.reward.num_workers,
        timeout_s=config.reward.timeout_s,
        memory_mb=config.reward.memory_limit_mib,
        answer_format=config.answer_format,
    )


def check_golds(prompts: Sequence[Prompt], *, setting: str, value: str) -> None:
    """Say how many gold answers the verifier cannot read, with the first rows; rank 0 speaks.

    Args:
        prompts: of one data set.
        setting, value: what decides which answers these are, for the message.

    Raises:
        ValueError: it can read none of them: no response would ever be correct.
    """
    golds = {prompt.index: prompt.answers for prompt in prompts}
    message = check_readable(golds, setting=setting, value=value)
    if message and not (dist.is_initialized() and dist.get_rank() != 0):
        _warn_once(f"{prompts[0].source}: {message}")


@functools.cache
def _warn_once(message: str) -> None:
    """An evaluation under ten templates reads the same golds ten times."""
    logger.warning(message)


class Grader:
    """A rank's verifier workers, and the exchange of verdicts."""

    def __init__(self, pool: VerifierPool, host_group: dist.ProcessGroup) -> None:
        self.pool = pool
        self.host_group = host_group

    def score(self, groups: Sequence[RolloutGroup]) -> list[list[Graded]]:
        """[P][G] verdicts, the same on every rank; a truncated response is worth 0.

        Args:
            groups: the same on every rank.
        """
        own = range(self.host_group.rank(), len(groups), self.host_group.size())
        items = [(r.text, groups[p].prompt.answers) for p in own for r in groups[p].responses]
        verdicts = iter(self.pool.grade(items))
        graded = {
            p: [apply_truncation(next(verdicts), r.truncated) for r in groups[p].responses]
            for p in own
        }
        by_prompt = merged(graded, self.host_group)
        return [by_prompt[p] for p in range(len(groups))]

    def answer_classes(self, groups: Sequence[RolloutGroup]) -> list[list[Optional[int]]]:
        """[P][G] which responses of a group give the same answer, None without one; see `votes`.

        Args:
            groups: the same on every rank.
        """
        own = range(self.host_group.rank(), len(groups), self.host_group.size())
        texts = [[response.text for response in groups[p].responses] for p in own]
        classes = dict(zip(own, self.pool.answer_classes(texts), strict=True))
        by_prompt = merged(classes, self.host_group)
        return [by_prompt[p] for p in range(len(groups))]
