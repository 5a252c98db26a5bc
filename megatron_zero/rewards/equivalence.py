"""Do two answers mean the same? Strings first, then structure, then exact values.

An answer is a formula, or formulas put together: a list (`1,-2`), a tuple or interval (`[0,1)`), a
set, a union of intervals, a matrix, a relation (`y = 2x+3`). `parse_answer` builds that structure
and `_same` compares it piece by piece; `symbolic` decides about formulas.

Both texts come from outside. Nothing here evaluates them, every bound is checked before work is
done, and the worst that remains (a slow proof in sympy) is cut short by `verifier_pool`.
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Union

from megatron_zero.rewards import normalize as norm
from megatron_zero.rewards.expression import Node, parse_expression
from megatron_zero.rewards.symbolic import Undecidable, are_equal, evaluate
from megatron_zero.rewards.tokens import (
    RELATIONS,
    ParseError,
    Token,
    first_closes_last,
    split,
    tokenize,
)

MAX_STRUCTURE_DEPTH = 8  # lists in tuples in lists, around formulas

Gold = Union[str, int, float, list, tuple]

_COMMA, _CUP, _ROW, _CELL = (frozenset([name]) for name in (",", "\\cup", "\\\\", "&"))
_MIRRORED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "=": "=", "\\ne": "\\ne"}
_BOXED = "\\boxed{"
_WORDS = re.compile(r"[A-Za-z\s,.()'-]+")
_THOUSANDS = re.compile(r"(?<![\d.])(?<!\d,)\d{1,3}(?:,\d{3})+(?![\d,])")
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d/])")


def is_equivalent(prediction: str, gold: Gold) -> bool:
    r"""Whether the answer means the same as the gold answer, or as any of several.

    Exact: `1/3` is not `0.3333`, however many digits. Accepted are other spellings of the same
    value (`2/4`, `0.5`, `\frac12`), of the same function of its symbols, a percentage for its
    value, and what `normalize.clean` drops on both sides: units, currency, degrees.

    Raises:
        ValueError: if `gold` is neither text, a number, nor a sequence of them.
    """
    if isinstance(gold, (list, tuple)):
        return any(is_equivalent(prediction, answer) for answer in gold)
    if isinstance(gold, bool) or not isinstance(gold, (str, int, float)):
        raise ValueError(f"gold answer {gold!r}: must be text, a number, or a list of them")
    expected, given = str(gold).strip(), prediction.strip()
    if expected.startswith(_BOXED) and expected.endswith("}"):
        expected = expected[len(_BOXED) : -1].strip()
    if not expected or not given:
        return False
    if given == expected:
        return True
    if max(len(given), len(expected)) > norm.MAX_ANSWER_CHARS:
        return False
    given_clean, expected_clean = norm.clean(given), norm.clean(expected)
    if _same_text(norm.normalize(given_clean), norm.normalize(expected_clean)):
        return True
    given_readings, expected_readings = _readings(given_clean), _readings(expected_clean)
    pairs = [(a, b) for b in expected_readings for a in given_readings]
    if any(_same(a, b) for a, b in pairs):
        return True
    if ("%" in given) != ("%" in expected):
        return any(_is_percentage(*(pair if "%" in given else pair[::-1])) for pair in pairs)
    return False


def _same_text(given: str, expected: str) -> bool:
    """Equality of canonical strings; words in either case."""
    if given == expected:
        return given != ""
    both_words = _WORDS.fullmatch(given) and _WORDS.fullmatch(expected)
    return bool(both_words) and given.casefold() == expected.casefold()


def _readings(cleaned: str) -> list[Node]:
    """The structures a text can be: `1,234` is a number and a list. Empty if it is no formula."""
    texts = [cleaned]
    for pattern, separator in ((_THOUSANDS, ","), (_SPACED_THOUSANDS, " ")):
        joined = pattern.sub(lambda match, sep=separator: match[0].replace(sep, ""), cleaned)
        if joined != cleaned and not any(bracket in cleaned for bracket in "([{"):
            texts.append(joined)
    readings = []
    for text in texts:
        try:
            readings.append(parse_answer(text))
        except ParseError:
            continue
    return readings


def parse_answer(cleaned: str) -> Node:
    r"""A cleaned answer as a tree: a formula (`expression`) or one of these around formulas.

        list(a, b)        a, b   or {a, b}, \{a, b\}: in any order; `a \pm b` is two of them
        tuple(a, b)       (a, b), [a, b): value holds the brackets
        union(a, b)       a \cup b
        matrix(row, …)    rows are tuples
        relation(a, b)    a = b, a < b, a \in b: value is the sign; several: a < b < c

    Raises:
        ParseError: if it is none.
    """
    return _parse_list(tokenize(cleaned), 0)


def _parse_list(tokens: list[Token], depth: int) -> Node:
    """Elements between commas; one alone is itself."""
    parts = [version for part in split(tokens, _COMMA) for version in _signs(part)]
    elements = _parse_all(parts, depth)
    return elements[0] if len(elements) == 1 else Node("list", elements)


def _signs(tokens: list[Token]) -> list[list[Token]]:
    r"""`a \pm b` is `a + b` and `a - b`; without such a sign, the tokens themselves."""
    names = {token.name for token in tokens if token.kind == "mark"}
    is_set = tokens[:1] and tokens[0].name in ("{", "\\{") and first_closes_last(tokens)
    if is_set or not names & {"\\pm", "\\mp"}:
        return [tokens]
    versions = []
    for plus, minus in (("+", "-"), ("-", "+")):
        swap = {"\\pm": Token("mark", plus), "\\mp": Token("mark", minus)}
        versions.append([swap.get(token.name, token) for token in tokens])
    return versions


def _parse_element(tokens: list[Token], depth: int) -> Node:
    if depth > MAX_STRUCTURE_DEPTH:
        raise ParseError("nested too deeply")
    operands = split(tokens, _CUP)
    if len(operands) > 1:
        return Node("union", _parse_all(operands, depth))
    sides = split(tokens, RELATIONS)
    if len(sides) > 1:
        lengths = [len(side) for side in sides[:-1]]
        positions = [sum(lengths[: i + 1]) + i for i in range(len(lengths))]
        signs = " ".join(tokens[position].name for position in positions)
        return Node("relation", _parse_all(sides, depth), signs)
    if len(tokens) > 2 and tokens[0].kind == tokens[-1].kind == "mark":
        ends = (tokens[0].name, tokens[-1].name)
        if ends == ("\\begin", "\\end"):
            rows = [split(row, _CELL) for row in split(tokens[1:-1], _ROW) if row]
            return Node("matrix", tuple(Node("tuple", _parse_all(row, depth), "&") for row in rows))
        if ends in (("\\{", "\\}"), ("{", "}")) and first_closes_last(tokens):
            return _parse_list(tokens[1:-1], depth)
        if ends[0] in ("(", "[") and ends[1] in (")", "]") and first_closes_last(tokens):
            parts = split(tokens[1:-1], _COMMA)
            if len(parts) > 1:
                return Node("tuple", _parse_all(parts, depth), "".join(ends))
    return parse_expression(tokens)


def _parse_all(parts: Sequence[list[Token]], depth: int) -> tuple[Node, ...]:
    return tuple(_parse_element(part, depth + 1) for part in parts)


def _same(given: Node, expected: Node) -> bool:
    kinds = {given.kind, expected.kind}
    if "relation" in kinds:
        return _same_relation(given, expected)
    if kinds == {"tuple", "list"}:  # a point without its brackets
        bracketed = given if given.kind == "tuple" else expected
        return bracketed.value == "()" and _same_in_order(given, expected)
    if kinds & {"tuple", "matrix"}:
        same_kind = given.kind == expected.kind and given.value == expected.value
        return same_kind and _same_in_order(given, expected)
    if kinds & {"list", "union"}:
        return given.kind == expected.kind and _same_in_any_order(given.args, expected.args)
    return are_equal(given, expected)


def _same_in_order(given: Node, expected: Node) -> bool:
    return len(given.args) == len(expected.args) and all(map(_same, given.args, expected.args))


def _same_in_any_order(given: Sequence[Node], expected: Sequence[Node]) -> bool:
    if len(given) != len(expected):
        return False
    left = list(given)
    for element in expected:
        match = next((i for i, other in enumerate(left) if _same(other, element)), None)
        if match is None:
            return False
        del left[match]
    return True


def _same_relation(given: Node, expected: Node) -> bool:
    r"""Equations up to sides and sign; `x = 5` and `x \in S` also for their right side alone."""
    if given.kind != "relation" or expected.kind != "relation":
        relation, other = (given, expected) if given.kind == "relation" else (expected, given)
        left = relation.args[0]  # x, or f(x), which reads as a product of names
        names_it = all(part.kind == "sym" for part in (left.args or (left,)))
        names_it = names_it and left.kind in ("sym", "mul") and relation.value in ("=", "\\in")
        return names_it and _same(relation.args[1], other)
    if given.value == expected.value and _same_in_order(given, expected):
        return True
    signs = [_MIRRORED.get(sign, "") for sign in str(given.value).split()]
    mirrored = Node("relation", given.args[::-1], " ".join(reversed(signs)))
    if mirrored.value == expected.value and _same_in_order(mirrored, expected):
        return True
    return given.value == expected.value == "=" and _same_equation(given, expected)


def _same_equation(given: Node, expected: Node) -> bool:
    """`a = b` and `c = d` are one equation if a - b is c - d or d - c."""
    sides = []
    for equation in (given, expected):
        if any(side.kind in ("list", "tuple", "matrix", "union") for side in equation.args):
            return False
        sides.append(Node("add", (equation.args[0], Node("neg", (equation.args[1],)))))
    return are_equal(sides[0], sides[1]) or are_equal(sides[0], Node("neg", (sides[1],)))


def _is_percentage(percent: Node, value: Node) -> bool:
    """Whether the one is a hundred times the other, both rational."""
    try:
        many, one = evaluate(percent), evaluate(value)
    except Undecidable:
        return False
    return isinstance(many, Fraction) and isinstance(one, Fraction) and many == 100 * one
