"""Rounds of generation within a step: groups without signal are replaced by further prompts.

A group whose rewards are all alike has advantage 0 everywhere. DAPO's dynamic sampling
(arXiv 2503.14476, equation 11: 0 < number of correct responses < G) draws further prompts until
every group of the step has a signal; here for at most `max_rounds` rounds, after which groups
without signal fill the places that are left, so that every step has the same number of groups.

What counts here is the verdict, as in the equation. Without an overlong penalty a group has a
signal exactly where its advantages are not 0 (`advantages.groups_with_signal`); with one, a group
of wrong responses can still be told apart by its lengths alone, and is replaced all the same.

Each round draws exactly as many prompts as are missing. Nothing with a signal is ever thrown away
or kept for a later step, so that short responses are not preferred, and the position in the prompts
stays the whole state of a run.
"""

from collections.abc import Sequence

from megatron_zero.types import Graded, RolloutGroup


def has_signal(verdicts: Sequence[Graded]) -> bool:
    """Whether the rewards of one group differ."""
    return len({verdict.reward for verdict in verdicts}) > 1


class RolloutRounds:
    """Collects one step's groups; the same on every rank.

    rounds = RolloutRounds(num_prompts=128, max_rounds=4)
    while rounds.num_missing:
        ... draw that many prompts, the first of them at place `rounds.num_drawn` of the step ...
        rounds.add(groups, graded)
    groups, graded = rounds.chosen()
    """

    def __init__(self, *, num_prompts: int, max_rounds: int) -> None:
        self._num_prompts, self._max_rounds = num_prompts, max_rounds
        self._groups: list[RolloutGroup] = []
        self._graded: list[Sequence[Graded]] = []
        self._num_rounds = 0

    @property
    def num_drawn(self) -> int:
        """Prompts drawn so far."""
        return len(self._groups)

    @property
    def num_missing(self) -> int:
        """How many prompts the next round draws; 0: the step is complete, or its rounds are."""
        if self._num_rounds == self._max_rounds:
            return 0
        return self._num_prompts - sum(map(has_signal, self._graded))

    def add(self, groups: Sequence[RolloutGroup], graded: Sequence[Sequence[Graded]]) -> None:
        """One round's groups with their verdicts, `num_missing` of them."""
        assert len(groups) == len(graded) == self.num_missing
        self._groups += groups
        self._graded += graded
        self._num_rounds += 1

    def chosen(self) -> tuple[list[RolloutGroup], list[Sequence[Graded]]]:
        """`num_prompts` groups in the order drawn; those without signal only where others lack.

        Example (2 prompts, 2 rounds; + has a signal, - has none):
            - + then -: the first and the second. - + then +: the second and the third.
        """
        order = sorted(range(self.num_drawn), key=lambda i: not has_signal(self._graded[i]))
        taken = sorted(order[: self._num_prompts])
        return [self._groups[i] for i in taken], [self._graded[i] for i in taken]

    def metrics(self) -> dict[str, float]:
        """Of everything drawn, what was replaced included; nothing where nothing can be."""
        if self._max_rounds == 1:
            return {}
        rewards = [verdict.reward for row in self._graded for verdict in row]
        return {
            "sampling/rounds": float(self._num_rounds),
            "sampling/groups_drawn": float(self.num_drawn),
            "sampling/signal_frac": sum(map(has_signal, self._graded)) / self.num_drawn,
            "sampling/reward_mean": sum(rewards) / len(rewards),
        }
