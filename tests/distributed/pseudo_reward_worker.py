"""Under torchrun: the real training program on a random model, with rewards that have signal.

    pseudo_reward_worker.py RECIPE key=value ... [--resume]

A random model never answers correctly and never stops by itself: its gradients would be zero, its
responses equally long and so its loss zero, and any two layouts would agree. Everything here is the
program's own, but where a response ends and its verdict: both a hash of its tokens.
"""

import dataclasses
import hashlib
import sys

from megatron_zero import grading, train
from megatron_zero.rollout.sampler import Sampler
from megatron_zero.types import Graded, Response, RolloutGroup

sample = Sampler.sample


def number(response: Response) -> int:
    return hashlib.sha256(repr(response.token_ids).encode()).digest()[0]


def cut(response: Response) -> Response:
    length = max(1, len(response.token_ids) * (1 + number(response) % 4) // 4)
    return dataclasses.replace(
        response,
        token_ids=response.token_ids[:length],
        rollout_logprobs=response.rollout_logprobs[:length],
        truncated=False,
    )


def ragged_sample(self, *args, **kwargs):
    groups = sample(self, *args, **kwargs)
    return [
        RolloutGroup(prompt=group.prompt, responses=tuple(map(cut, group.responses)))
        for group in groups
    ]


def pseudo_verdict(response: Response) -> Graded:
    correct = number(response) % 2 == 0
    outcome = "correct" if correct else "wrong"
    return Graded(reward=float(correct), correct=correct, formatted=True, outcome=outcome)


def pseudo_score(self, groups):
    return [[pseudo_verdict(response) for response in group.responses] for group in groups]


if __name__ == "__main__":
    Sampler.sample = ragged_sample
    grading.Grader.score = pseudo_score
    train.main(sys.argv[1:])
