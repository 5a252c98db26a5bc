"""Do two answers mean the same? Strings first, then structure, then exact values.

An answer is a formula, or formulas put together: a list (`1,-2`), a tuple or interval (`[0,1)`), a
set, a union of intervals, a matrix, a relation (`y = 2x+3`). `parse_answer` builds that structure
and `_same` compares it piece by piece; `symbolic` decides about formulas.

Both texts come from outside. Nothing here executes them, and every bound is checked before work is
done, so that any answer takes well under a second. docs/verifier.md says what was decided where
usage differs.
"""

import re
from collections.abc import Sequence
from typing import Optional, Union

from megatron_zero.rewards import normalize as norm
from megatron_zero.rewards.expression import Node, parse_expression
from megatron_zero.rewards.sets import INFINITY, same_set
from megatron_zero.rewards.symbolic import Undecidable, are_equal, exact, rational_ratio
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

_COMMA = frozenset([",", "\\lor"])
_CUP, _ROW, _CELL, _MOD = (frozenset([name]) for name in ("\\cup", "\\\\", "&", "\\mod"))
_PERCENT = re.compile(r"%|\bpercent\b")
# 1,000 is not the list of 1 and 0, nor 2024-01-05 a difference.
_NO_LIST = re.compile(r"\d,0\d\d(?!\d)|^\d{1,4}-\d\d?-\d{1,4}$|\d+/\d\d?/\d{4}")
_WORDS = re.compile(r"(?i)no|yes|odd|one|two|six|ten|[a-z\s,.()'-]{4,}|[\d:]+[ap]m")
_BRACKETS = re.compile(r"^\\?\{|[(\[]")
_THOUSANDS = re.compile(r"(?<![\d.])(?<!\d,)\d{1,3}(?:,\d{3})+(?![\d,])")
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d/])")


def is_equivalent(prediction: str, gold: Gold) -> bool:
    r"""Whether the answer means the same as the gold answer, or as any of several.

    Exact: `1/3` is not `0.3333`, however many digits. Accepted are other spellings of the same
    value (`2/4`, `0.5`, `\frac12`), of the same function of its symbols, a percentage for its
    value, and an answer without the other's unit, currency or degrees.

    Raises:
        ValueError: if `gold` is neither text, a number, nor a sequence of them.
    """
    return any(_is_equivalent(prediction, text) for text in gold_texts(gold))


def gold_texts(gold: Gold) -> list[str]:
    """The answers of which any counts, as texts.

    Raises:
        ValueError: if `gold` is neither text, a number, nor a list or tuple of them.
    """
    if isinstance(gold, (list, tuple)):
        return [text for answer in gold for text in gold_texts(answer)]
    if isinstance(gold, bool) or not isinstance(gold, (str, int, float)):
        raise ValueError(f"gold answer {gold!r}: must be text, a number, or a list of them")
    return [str(gold).strip()]


def _is_equivalent(prediction: str, gold: str) -> bool:
    expected, given = gold.strip(), prediction.strip()
    if given == expected:
        return given != ""
    if max(len(given), len(expected)) > norm.MAX_ANSWER_CHARS:
        return False
    (given_clean, given_unit), (expected_clean, expected_unit) = map(norm.clean, (given, expected))
    if given_unit and expected_unit and given_unit != expected_unit:
        return False
    is_percentage = [_PERCENT.search(text) is not None for text in (given, expected)]
    same = _same if is_percentage[0] == is_percentage[1] else _same_percentage
    same_text = _same_text(norm.normalize(given_clean), norm.normalize(expected_clean))
    if same is _same and same_text:
        return True
    given_readings, expected_readings = readings(given_clean), readings(expected_clean)
    pairs = [(a, b) for b in expected_readings for a in given_readings]
    if is_percentage[1]:
        pairs = [pair[::-1] for pair in pairs]
    return any(same(*pair) for pair in pairs)


def _same_text(given: str, expected: str) -> bool:
    """Equality of canonical strings; words in either case, but `ab` is not `AB`."""
    if _WORDS.fullmatch(given) and _WORDS.fullmatch(expected):
        return given.casefold() == expected.casefold()
    return given == expected != ""


def readings(cleaned: str) -> list[Node]:
    """The structures a text can be: `1,234` is a number and a list. Empty if it is no formula."""
    texts = [] if _NO_LIST.search(cleaned) else [cleaned]
    for pattern, separator in ((_THOUSANDS, ","), (_SPACED_THOUSANDS, " ")):
        joined = pattern.sub(lambda match, sep=separator: match[0].replace(sep, ""), cleaned)
        if joined != cleaned and not _BRACKETS.search(cleaned):
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

        list(a, b)        a, b: in any order; `a \pm b` is two of them; value is "or" after `or`
        set(a, b)         \{a, b\}: as a list, but never a point
        tuple(a, b)       (a, b), [a, b): value holds the brackets
        union(a, b)       a \cup b
        matrix(row, …)    rows are tuples
        relation(a, b)    a = b, a < b, a \in b: value is the sign; several: a < b < c
        mod(a, m)         a \pmod{m}

    Raises:
        ParseError: if it is none.
    """
    return _parse_list(tokenize(cleaned), 0)


def _parse_list(tokens: list[Token], depth: int) -> Node:
    """Elements between commas; one alone is itself."""
    parts, separators = split(tokens, _COMMA)
    elements = _parse_all([version for part in parts for version in _signs(part)], depth)
    if len(elements) == 1:
        return elements[0]
    return Node("list", elements, "or" if "\\lor" in separators else None)


def _signs(tokens: list[Token]) -> list[list[Token]]:
    r"""`a \pm b` is `a + b` and `a - b`; without such a sign, the tokens themselves."""
    is_set = tokens[:1] and tokens[0].name in ("{", "\\{") and first_closes_last(tokens)
    if is_set or not any(token.name in ("\\pm", "\\mp") for token in tokens):
        return [tokens]
    swaps = [{"\\pm": Token("mark", a), "\\mp": Token("mark", b)} for a, b in ("+-", "-+")]
    return [[swap.get(token.name, token) for token in tokens] for swap in swaps]


def _parse_element(tokens: list[Token], depth: int) -> Node:
    if depth > MAX_STRUCTURE_DEPTH:
        raise ParseError("nested too deeply")
    for kind, separators in (("union", _CUP), ("relation", RELATIONS), ("mod", _MOD)):
        parts, signs = split(tokens, separators)
        if not signs:
            continue
        args = _parse_all(parts, depth)
        if set(signs) <= {">", "\\ge"}:  # there is only < and \\le
            args, signs = args[::-1], ["<" if sign == ">" else "\\le" for sign in signs[::-1]]
        return Node(kind, args, " ".join(signs))
    if len(tokens) > 2 and tokens[0].kind == tokens[-1].kind == "mark":
        ends = (tokens[0].name, tokens[-1].name)
        if ends == ("\\begin", "\\end"):
            rows = [split(row, _CELL)[0] for row in split(tokens[1:-1], _ROW)[0] if row]
            return Node("matrix", tuple(Node("tuple", _parse_all(row, depth), "&") for row in rows))
        if ends in (("\\{", "\\}"), ("{", "}")) and first_closes_last(tokens):
            inner = _parse_list(tokens[1:-1], depth)
            return Node("set", inner.args) if inner.kind == "list" else inner
        if tokens[1].name == "\\begin" and first_closes_last(tokens):
            return _parse_element(tokens[1:-1], depth + 1)
        if ends[0] in ("(", "[") and ends[1] in (")", "]") and first_closes_last(tokens):
            parts, _ = split(tokens[1:-1], _COMMA)
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
    if kinds == {"union", "list"}:  # x < 1 or x > 3
        pieces = given if given.kind == "list" else expected
        if pieces.value != "or" or any(piece.kind != "relation" for piece in pieces.args):
            return False
        return _same_in_any_order(given.args, expected.args)
    if kinds == {"mod"} and len(given.args) == len(expected.args) == 2:
        return are_equal(given.args[1], expected.args[1]) and _same_residue(given, expected)
    if "union" in kinds and (same := same_set(given, expected)) is not None:
        return same
    if kinds & {"tuple", "matrix"}:
        same_kind = given.kind == expected.kind and given.value == expected.value
        return same_kind and _same_in_order(given, expected)
    if kinds <= {"list", "set"} or kinds == {"union"}:
        return _same_in_any_order(given.args, expected.args)
    return are_equal(given, expected)


def _same_residue(given: Node, expected: Node) -> bool:
    difference = Node("add", (given.args[0], Node("neg", (expected.args[0],))))
    try:
        return exact(difference) % exact(given.args[1]) == 0
    except (Undecidable, ZeroDivisionError):
        return are_equal(given.args[0], expected.args[0])


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
    r"""Equations up to a factor; `x = 5` and `x > 2` are also `5` and the interval."""
    if given.kind == expected.kind:
        if given.value == expected.value and _same_in_order(given, expected):
            return True
        if given.value == expected.value == "=":
            return _same_equation(given, expected)
    sets = [_named(side) if side.kind == "relation" else ((), side) for side in (given, expected)]
    if None in sets or (given.kind == expected.kind and sets[0][0] != sets[1][0]):
        return False
    return _same(sets[0][1], sets[1][1])


def _named(relation: Node) -> Optional[tuple[Node, Node]]:
    r"""What `x = 5`, `x \in S`, `2 < x` or `2 < x \le 5` name, and what it is; else None."""
    args, signs = relation.args, str(relation.value).split()
    if signs[0] in ("=", "\\in", "\\equiv"):  # x, or f(x), or AB, read as a product, or (x,y)
        left = args[0]
        names_it = left.kind in ("sym", "mul", "call", "tuple")
        names_it &= all(part.kind == "sym" for part in left.args or (left,))
        return (left, args[1]) if names_it and len(args) == 2 else None
    if not set(signs) <= {"<", "\\le"}:
        return None
    if len(args) == 2 and args[0].kind == "sym":
        args, signs = (Node("neg", (INFINITY,)), *args), ["<", *signs]
    args, signs = (*args, INFINITY)[:3], [*signs, "<"][:2]
    if len(relation.args) > 3 or args[1].kind != "sym":
        return None
    ends = "(["[signs[0] != "<"] + ")]"[signs[1] != "<"]
    return args[1], Node("tuple", (args[0], args[2]), ends)


def _same_equation(given: Node, expected: Node) -> bool:
    """`a = b` and `c = d` are one equation if a - b is a multiple of c - d."""
    if len(given.args) != 2 or len(expected.args) != 2:
        return False
    first, second = (
        Node("add", (sides[0], Node("neg", (sides[1],)))) for sides in (given.args, expected.args)
    )
    ratio = rational_ratio(first, second)
    return ratio is not None and are_equal(first, Node("mul", (Node("num", (), ratio), second)))


def _same_percentage(percent: Node, value: Node) -> bool:
    """Whether the one is a hundred times the other, or both the same: 50% is 0.5, and 50 of 100.

    But 0.5% is not 0.5, nor 1% 1: what may be a share is read as one.
    """
    try:
        many, one = exact(percent), exact(value)
    except Undecidable:
        return _same(percent, value)
    return many == 100 * one or (many == one and abs(many) > 1)
