"""Under torchrun: the real training program on a random model, with rewards that have signal.

    pseudo_reward_worker.py RECIPE key=value ... [--resume]

A random model never answers correctly, so its gradients are zero and any two layouts would agree.
Everything here is the program's own but the verdicts: a hash of the response's tokens.
"""

import hashlib
import sys

from megatron_zero import grading, train
from megatron_zero.rewards.base import apply_truncation
from megatron_zero.types import Graded


def pseudo_score(self, groups):
    graded = []
    for group in groups:
        row = []
        for response in group.responses:
            digest = hashlib.sha256(repr(response.token_ids).encode()).digest()
            correct = digest[0] % 2 == 0
            outcome = "correct" if correct else "wrong"
            verdict = Graded(
                reward=float(correct), correct=correct, formatted=True, outcome=outcome
            )
            # a random model seldom stops by itself: its truncated responses keep their reward
            row.append(apply_truncation(verdict, truncated=False))
        graded.append(row)
    return graded


if __name__ == "__main__":
    grading.Grader.score = pseudo_score
    train.main(sys.argv[1:])
