r"""Unions of intervals and finite sets, compared as sets of real numbers by sympy.

`[1,2] \cup [2,3]` is `[1,3]`, and `(-\infty,0) \cup (0,\infty)` is not the whole line. Whether two
such sets are equal depends on the order of their ends alone, so sympy is given the ends' ranks:
small integers, whatever the ends are.
"""

from itertools import pairwise
from typing import Optional

import sympy

from megatron_zero.rewards.expression import Node
from megatron_zero.rewards.symbolic import Undecidable, are_equal, position

MAX_PARTS = 20
INFINITY = Node("const", (), "infty")
_LIMITS = {INFINITY: sympy.oo, Node("neg", (INFINITY,)): -sympy.oo}


def same_set(given: Node, expected: Node) -> Optional[bool]:
    """Whether two sets have the same elements; None where an end is no number, or ends cross."""
    sides = [node.args if node.kind == "union" else (node,) for node in (given, expected)]
    parts = [part for side in sides for part in side]
    if len(parts) > MAX_PARTS:
        return None
    try:
        ranks = _ranks([end for part in parts for end in _ends(part)])
        first, second = (sympy.Union(*(_as_set(part, ranks) for part in side)) for side in sides)
    except Undecidable:
        return None
    return first == second


def _ends(part: Node) -> tuple[Node, ...]:
    """Of an interval; or the elements of a set, whose braces a single one has lost."""
    return part.args if part.kind in ("tuple", "set") else (part,)


def _ranks(ends: list[Node]) -> dict[Node, sympy.Expr]:
    positions = {end: position(end) for end in ends if end not in _LIMITS}
    ranks, rank = dict(_LIMITS), 0
    for before, end in pairwise([None, *sorted(positions, key=positions.__getitem__)]):
        rank += before is None or not are_equal(before, end)
        ranks[end] = sympy.Integer(rank)
    return ranks


def _as_set(part: Node, ranks: dict[Node, sympy.Expr]) -> sympy.Set:
    ends = [ranks[end] for end in _ends(part)]
    if part.kind != "tuple":
        return sympy.FiniteSet(*ends)
    if len(ends) != 2 or ends[0] >= ends[1]:
        raise Undecidable("no interval")
    left, right = str(part.value)
    return sympy.Interval(*ends, left_open=left == "(", right_open=right == ")")
