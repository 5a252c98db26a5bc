"""Equivalence: the reference's probed cases, spellings that must agree, answers that must not."""

import os
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zero.rewards.equivalence import is_equivalent

# Reference A6, probed there; all accepted by its full mode, which is the one matched here.
REFERENCE = [
    ("2/4", "1/2"),
    ("1,2", "(1,2)"),
    (r"50\%", "0.5"),
    ("10^{3}", "1000"),
    ("1/2", "0.5"),
    ("x=5", "5"),
    ("3 miles", "3"),
    (r"\sqrt2/2", r"1/\sqrt2"),
    ("2x+2", "2(x+1)"),
]
EQUAL = [
    ("142", "142.0"),
    ("025", "25"),
    ("61,328", "61328"),
    ("61 328", "61328"),
    ("1,234", "1, 234"),
    (r"\$32,\!348", "32348"),
    ("(100,200)", "(100, 200)"),
    ("-2,1", "1,-2"),
    (r"\{1,2\}", "2,1"),
    ("(1,2),(3,4)", "(3,4), (1,2)"),
    (r"1+\sqrt{19}, 1-\sqrt{19}", r"1 \pm \sqrt{19}"),
    (r"2 \text{ or } 3", "3,2"),
    (r"\{1\pm\sqrt{5},-2\}", r"-2, 1-\sqrt5, 1+\sqrt5"),
    (r"\frac{1 \pm \sqrt{5}}{2}", r"\frac{1+\sqrt5}{2}, \frac{1-\sqrt5}{2}"),
    (r"\left( \frac{2}{3}, 1 \right) \cup (7,\infty)", r"(7,\infty)\cup(2/3,1)"),
    (r"x \in [-2,7]", "[-2,7]"),
    ("y=2x+3", "y = 3+2x"),
    ("f(x) = x^2+1", "1+x^2"),
    ("2x-y+3=0", "y=2x+3"),
    ("2x+3 = y", "y=2x+3"),
    ("x > 2", "2 < x"),
    (r"-80\leq g\leq 82", r"82 \geq g \geq -80"),
    (r"\begin{pmatrix} 1 \\ 7 \end{pmatrix}", r"\begin{bmatrix}1\\7.0\end{bmatrix}"),
    ("Even", r"\text{even}"),
    ("C", r"\text{(C)}"),
    ("(C)", r"\textbf{C}"),
    ("664_{7}", "664_7"),
    (r"12\frac{3}{5}", r"\frac{63}{5}"),
    (r"-\frac 32", "-1.5"),
    (r"\sqrt{3+2\sqrt{2}}", r"1+\sqrt2"),
    (r"\sin^2 x+\cos^2 x", "1"),
    (r"\frac{\log 8}{\log 2}", "3"),
    (r"\frac{1}{4-\omega^{2}}", r"-\frac{1}{\omega^2-4}"),
    (r"mn-\lfloor\frac{m}{2}\rfloor", r"$m n-\lfloor m / 2\rfloor$"),
    (r"\frac{1}{b-a}\left(e^{-a t}-e^{-b t}\right)", r"\frac{e^{-at}-e^{-bt}}{b-a}"),
    (r"\frac{2}{8x-10}", r"\frac{1}{4x-5}"),  # no value at 5/4
    (r"\binom{2n}{n}", r"\frac{(2n)!}{n!n!}"),
    ("4.4677e14", r"4.4677 \times 10^{14} Hz"),
    ("3 million", "3000000"),
    ("62.5", "62.5%"),
    ("0.625", "62.5%"),
    ("(x-1)(x+1)", "x^2-1"),
    ("1 + 2i", "2i+1"),
    (r"\frac{1}{1+i}", r"\frac{1-i}{2}"),
    ("9^{9^9}", "9^{9^{9}}"),
    (r"\overline{CD}", r"\overline{CD}."),
    ("1:4", "1 : 4"),
]
DIFFERENT = [
    ("", "5"),
    ("5", ""),
    ("", ""),
    ("6", "7"),
    ("1/3", "0.333333333333333333333333333333"),
    ("3.14159265358979323846", r"\pi"),
    ("1.41421356237309504880168872", r"\sqrt{2}"),
    ("100200", "(100,200)"),
    ("(1,2)", "(2,1)"),
    ("[1,2]", "(1,2)"),
    ("[1,2)", "[1,2]"),
    ("1,2", "[1,2]"),
    ("1,2", "1,2,2"),
    ("1,1,2", "1,2,2"),
    ("-1,-9", "(-1)(-9)"),
    ("x=2, y=1", "x=1, y=2"),
    ("y=2x+3", "y=2x-3"),
    ("2x=6", "6"),
    ("x+1=6", "6"),
    ("-x=6", "6"),
    ("x > 6", "6"),
    ("x > 2", "x < 2"),
    ("x > 2", r"x \ge 2"),
    (r"\begin{pmatrix} 1 \\ 7 \end{pmatrix}", r"\begin{pmatrix} 7 \\ 1 \end{pmatrix}"),
    (r"\begin{pmatrix} 1 \\ 7 \end{pmatrix}", r"\begin{pmatrix} 1 & 7 \end{pmatrix}"),
    ("neve", r"\text{even}"),
    ("CAF", r"\text{ACF}"),
    ("664", "664_7"),
    ("664_8", "664_7"),
    ("3", "3 million"),
    ("5", "5i"),
    ("6", "6m"),
    ("6.25", "62.5%"),
    ("x", "y"),
    ("|x|", "x"),
    (r"\sqrt{x^2}", "x"),
    (r"\infty", r"-\infty"),
    ("1/0", "2/0"),
    ("12", "1 2"),
    ("1 2/3", "12/3"),
    ("9**9**9**9", r"\frac{1}{2}"),
    ("(x+1)**200000", "x+1"),
]


@pytest.mark.parametrize(("prediction", "gold"), REFERENCE + EQUAL)
def test_equal(prediction, gold):
    assert is_equivalent(prediction, gold)
    assert is_equivalent(gold, prediction)


@pytest.mark.parametrize(("prediction", "gold"), DIFFERENT)
def test_different(prediction, gold):
    assert not is_equivalent(prediction, gold)
    assert not is_equivalent(gold, prediction)


def test_gold_types():
    assert is_equivalent("142", 142.0)
    assert is_equivalent("142.0", 142)
    assert is_equivalent("2", ["1", "2\n"])
    assert is_equivalent("2", ("1", 2.0))
    assert not is_equivalent("3", ["1", "2"])
    assert not is_equivalent("3", [])
    assert is_equivalent("7", r"\boxed{7.0}")
    for gold in (None, {"a": 1}, True):
        with pytest.raises(ValueError, match="gold answer"):
            is_equivalent("1", gold)


def test_answers_beyond_the_length_bound_equal_only_themselves():
    long = "1+" * 1500 + "1"
    assert is_equivalent(long, long)
    assert not is_equivalent(long, "1501")
    assert not is_equivalent(long.replace("+", " + "), long)
    assert not is_equivalent(long, long + "+0")


@pytest.mark.parametrize(
    "code",
    [
        "__import__('os').system('touch {path}')",
        "__import__('os').system('touch {path}') or 1",
        r"\text{{__import__('os').system('touch {path}')}}",
        "open('{path}','w')",
        "x.__class__.__mro__[1].__subclasses__()",
        "(lambda: open('{path}','w'))()",
        "exec(open('{path}','w'))",
    ],
)
def test_nothing_is_evaluated(code, tmp_path):
    path = tmp_path / "executed"
    text = code.format(path=path)
    for gold in ("1", "x", text + "+0", text.replace("(", " (")):
        is_equivalent(text, gold)
        is_equivalent(f"{text}=1", gold)
    assert os.listdir(tmp_path) == []


HOSTILE = [
    "9**9**9**9",
    "(x+1)**200000",
    "9^{9^{9}}",
    "1000000!",
    "{" * 900 + "1" + "}" * 900,
    "(x+y+z+w)^{50}(a+b+c)^{50}",
    "*".join(f"(x+{i})" for i in range(60)),
    " + ".join(rf"\frac{{1}}{{x+{i}}}" for i in range(40)),
    r"\frac{x^{1000}-1}{x-1}",
    " + ".join(rf"\sqrt{{{p}}}" for p in (2, 3, 5, 7, 11, 13, 17, 19, 23)),
    "+".join(f"x_{{{i}}}" for i in range(99)),
    "|" * 500,
    "1,1," * 190,
    r"\pm 1" * 90,
]


@pytest.mark.parametrize("answer", HOSTILE)
def test_hostile_answers_are_refused_quickly(answer):
    """Seconds of the process, not of the clock: other work on the machine must not fail this."""
    start = time.process_time()
    for gold in (r"\frac{1}{2}", "x+1", f"{answer}+0", rf"\frac{{({answer})\sqrt2}}{{\sqrt2}}"):
        is_equivalent(answer, gold)
    assert time.process_time() - start < 10


RATIONALS = st.builds(Fraction, st.integers(-(10**6), 10**6), st.integers(1, 10**4))


def spellings(number: Fraction) -> list[str]:
    """Ways of writing a rational that all mean exactly it."""
    top, bottom = abs(number.numerator), number.denominator
    sign = "-" if number < 0 else ""
    found = [
        f"{sign}{top}/{bottom}",
        rf"{sign}\frac{{{top}}}{{{bottom}}}",
        rf"\dfrac{{{sign}{top}}}{{{bottom}}}",
        rf"$ {sign} \tfrac{{{top * 3}}}{{{bottom * 3}}} $",
        rf"x = {sign}{top} \cdot {bottom}^{{-1}}",
        rf"{sign}\left({top} \div {bottom}\right)",
        f"{sign}({top}/{bottom})",
    ]
    whole, rest = divmod(top, bottom)
    if whole and rest:
        found.append(rf"{sign}{whole}\frac{{{rest}}}{{{bottom}}}")
        found.append(f"{sign}{whole} {rest}/{bottom}")
    if bottom == 1:
        found += [f"{sign}{top}", f"{sign}{top}.0", f"{sign}{top:,}", f"{sign}{top} cm"]
    scaled = bottom
    for prime in (2, 5):
        while scaled % prime == 0:
            scaled //= prime
    if scaled == 1:
        digits = top * 10**14 // bottom  # exact: bottom divides 10^14
        found.append(f"{sign}{digits // 10**14}.{digits % 10**14:014d}")
    return found


@settings(max_examples=100, deadline=None)
@given(number=RATIONALS, data=st.data())
def test_every_spelling_of_a_rational_is_equivalent(number, data):
    first, second = (data.draw(st.sampled_from(spellings(number))) for _ in range(2))
    assert is_equivalent(first, first)
    assert is_equivalent(first, second)
    assert is_equivalent(second, first)


@settings(max_examples=100, deadline=None)
@given(first=RATIONALS, second=RATIONALS, data=st.data())
def test_different_rationals_are_never_equivalent(first, second, data):
    if data.draw(st.booleans()):  # as near as can be written
        second = first + Fraction(1, first.denominator * 10**6)
    if first == second:
        return
    one = data.draw(st.sampled_from(spellings(first)))
    other = data.draw(st.sampled_from(spellings(second)))
    assert not is_equivalent(one, other)
    assert not is_equivalent(other, one)


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="0123xyei+-*/^_(){}[]|!,.=<% \\$fracsqtpilog", max_size=40))
def test_any_text_is_graded_without_an_error(text):
    given_twice = is_equivalent(text, text)
    assert given_twice == bool(text.strip())
    is_equivalent(text, "1")
    assert not is_equivalent(text, r"\text{no such answer}")
