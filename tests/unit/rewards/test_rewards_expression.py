"""Text to trees: precedence, LaTeX's short forms, structure, and bounds kept before any work."""

from fractions import Fraction

import pytest

from megatron_zero.rewards.equivalence import MAX_STRUCTURE_DEPTH, parse_answer
from megatron_zero.rewards.expression import MAX_DEPTH, Node, parse_expression
from megatron_zero.rewards.normalize import clean
from megatron_zero.rewards.symbolic import MAX_NODES, Undecidable, are_equal, exact
from megatron_zero.rewards.tokens import MAX_TOKENS, ParseError, tokenize


def parse(text):
    return parse_expression(tokenize(clean(text)[0]))


def value(text):
    return exact(parse(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1+2*3", 7),
        ("-2^2", -4),
        ("(-2)^2", 4),
        ("2^3^2", 512),
        ("2**3", 8),
        ("2^-1", Fraction(1, 2)),
        ("2^{-1}", Fraction(1, 2)),
        ("1/2/2", Fraction(1, 4)),
        ("1--2", 3),
        ("8-3-2", 3),
        (r"\frac12", Fraction(1, 2)),
        (r"\frac123", None),
        (r"\frac{1}{2}3", None),
        (r"\frac1{72}", Fraction(1, 72)),
        (r"\frac{\frac12}{3}", Fraction(1, 6)),
        (r"12\frac{3}{5}", Fraction(63, 5)),
        (r"-1\frac12", Fraction(-3, 2)),
        ("12 3/5", Fraction(63, 5)),
        ("12 3", None),
        (r"2\cdot\frac{1}{2}", 1),
        (r"2(\frac{1}{2})", 1),
        (r"\sqrt{4}", 2),
        (r"\sqrt16", 4),
        ("sqrt(16)", 4),
        (r"\sqrt[3]{-8}", -2),
        (r"\sqrt[3]{27}", 3),
        ("4^{1/2}", 2),
        ("5!", 120),
        ("-5!", -120),
        ("2^3!", 64),
        (r"\binom{5}{2}", 10),
        (r"\binom52", 10),
        (r"\lfloor 7/2 \rfloor", 3),
        (r"\lceil 7/2 \rceil", 4),
        ("|3-5|", 2),
        ("2|3-5|", 4),
        ("|2|3-5||", None),
        (r"\log_2 8", 3),
        (r"\log_{10} 1000", 3),
        ("0.125", Fraction(1, 8)),
        (".5", Fraction(1, 2)),
        ("1.70e4", 17000),
        ("1e-5", Fraction(1, 100000)),
        (r"1.04 \times 10^{-3}", Fraction(104, 100000)),
        (r"\sin^{-1} 0", 0),
        (r"\cos(0)^2", 1),
        (r"e^{i\pi}", -1),
        ("", None),
        ("(", None),
        ("1+", None),
        (r"\frac{1}", None),
        ("(1]", None),
        ("2!!", None),
        (r"\unknown", None),
        ("1 @ 2", None),
    ],
)
def test_values(text, expected):
    if expected is None:
        with pytest.raises(ParseError):
            parse(text)
    else:
        assert are_equal(parse(text), Node("num", (), Fraction(expected)))
        assert not are_equal(parse(text), Node("num", (), Fraction(expected) + Fraction(1, 10**99)))


def test_tree_of_the_docstring():
    two, x = Node("num", (), Fraction(2)), Node("sym", (), "x")
    tree = parse_expression(tokenize(r"2\pi + x^2"))
    assert tree == Node("add", (Node("mul", (two, Node("const", (), "pi"))), Node("pow", (x, two))))


@pytest.mark.parametrize(
    ("text", "kind", "num_parts"),
    [
        ("1,-2", "list", 2),
        (r"\{1,2,3\}", "set", 3),
        (r"1 \pm \sqrt{19}", "list", 2),
        (r"\{1\pm\sqrt{5},-2\}", "set", 3),
        ("(1,2)", "tuple", 2),
        ("[0,1)", "tuple", 2),
        ("(1,2),(3,4)", "list", 2),
        ("(1,2);(3,4)", "list", 2),
        ("2, 3, and 4", "list", 3),
        (r"(2,12) \cup (12,102)", "union", 2),
        (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", "matrix", 2),
        ("y = 2x+3", "relation", 2),
        ("1 < x <= 2", "relation", 3),
        (r"x \in [0,1]", "relation", 2),
        ("(x+1)(x-1)", "mul", 2),
        ("[x+1]^2", "pow", 2),
        ("(5)", "num", 0),
        (r"\{5\}", "num", 0),
        (r"\text{even}", "sym", 0),
        ("x_{max}", "sym", 0),
        ("2516_8", "sym", 0),
        ("xyz", "mul", 3),
        ("neve", "sym", 0),
    ],
)
def test_structure(text, kind, num_parts):
    node = parse_answer(clean(text)[0])
    assert (node.kind, len(node.args)) == (kind, num_parts)


@pytest.mark.parametrize(
    "text",
    [
        "(" * 900 + "1" + ")" * 900,
        "(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1),
        "{" * (MAX_STRUCTURE_DEPTH + 1) + "1" + "}" * (MAX_STRUCTURE_DEPTH + 1),
        "{" * 190 + "1" + "}" * 190,
        "(1," * 90 + "2" + ")" * 90,
        r"\sqrt" * 300 + "2",
        r"\frac" * 200 + "12",
        r"\sin" * 300 + "x",
        r"\sin-" * 150 + "x",
        "9^" * 190 + "9",
        "2^-" * 190 + "9",
        "|" * 301,
        "1+" * MAX_TOKENS + "1",
        "1" * 401,
        "1e401",
        "1e99999999999",
    ],
)
def test_bounds_of_the_parser(text):
    with pytest.raises(ParseError):
        parse_answer(text)


@pytest.mark.parametrize("depth", [1, MAX_DEPTH - 1])
def test_nesting_within_the_bound(depth):
    assert value("(" * depth + "7" + ")" * depth) == 7


@pytest.mark.parametrize(
    "text",
    [
        "9**9**9**9",
        "9^{9^{9}}",
        "2^{20001}",
        "100000!",
        "((10!)!)!",
        r"\binom{1000000}{500000}",
        "2^{2^{2^{2^{99}}}}",
        "e^{e^{e^{e^{100}}}}",
        "e^{10^{20}}",
        r"\lfloor e^{e^{10}} \rfloor",
        r"\lfloor \pi^{100000} \rfloor",
        r"\sin(10^{5000})",
        r"\sqrt{10^{400}+7}",
        r"\sqrt[0]{2}",
        r"\sqrt[x]{2}",
        "1/0",
        "0^{-1}",
        r"\frac{1}{1-1}",
        r"\frac{1}{\sqrt{2}-\sqrt{2}}",
        r"\log_1 5",
        "(-1)!",
        "0.5!",
        r"\tanh(100)",
        r"\pi \cdot 10^{-50}",
        "+".join(rf"{n}\pi" for n in range(1, MAX_NODES * 3 // 5)),
    ],
)
def test_bounds_of_the_evaluation(text):
    """Refused by size, so in no time, and equal to nothing but the same tree."""
    node = parse(text)
    with pytest.raises(Undecidable):
        exact(node)
    assert not are_equal(node, Node("add", (node, Node("num", (), Fraction(0)))))
    assert are_equal(node, node)


def test_large_numbers_within_the_bounds():
    assert value("2^{2016}") == 2**2016
    assert value(r"\frac{4 \cdot 999^{4}}{27}") == Fraction(4 * 999**4, 27)
    assert value("1000!") / value("999!") == 1000
    assert value("(-1)^{99999999999999999999}") == -1
    assert value("1^{99999999999999999999}") == 1
    assert value("0^{99999999999999999999}") == 0
    with pytest.raises(Undecidable):
        value("0^0")
