"""The normaliser's rules, one line each: what is dropped, what is respelled, what must stay."""

import time

import pytest

from megatron_zero.rewards.normalize import MAX_ANSWER_CHARS, clean, normalize

GOLDEN = [
    # \text{} and its relatives
    (r"\text{Evelyn}", "Evelyn"),
    (r"\textbf{(C)}", "(C)"),
    (r"\text{(C)}", "(C)"),
    (r"\text{two lines}", "twolines"),
    (r"x \text{ and } y", "xandy"),
    (r"2, 3, \text{ and } 4", "2,3and4"),
    (r"\mathbf{2340}", "2340"),
    (r"\operatorname{arcsin}(x)", r"\arcsin(x)"),
    # sizes, spacing, fractions
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
    (r"\tfrac{4}{9}", r"\frac{4}{9}"),
    (r"\dfrac{17}{50}", r"\frac{17}{50}"),
    (r"\frac14", r"\frac{1}{4}"),
    (r"\frac 18", r"\frac{1}{8}"),
    (r"\frac1{72}", r"\frac{1}{72}"),
    (r"\frac{3}4", r"\frac{3}{4}"),
    ("a/b", "a/b"),
    (r"\sqrt2/2", r"\sqrt{2}/2"),
    (r"\sqrt12", r"\sqrt{12}"),
    (r"5,\,-11", "5,-11"),
    (r"3\quad4", "3 4"),
    ("1 2/3", r"(1+\frac{2}{3})"),
    (r"-1\frac12", r"-(1+\frac{1}{2})"),
    # currency, percent, degrees
    (r"\$36", "36"),
    (r"$8 \%$", "8"),
    ("62.5%", "62.5"),
    (r"30^\circ", "30"),
    (r"28.71^{\circ}", "28.71"),
    ("90°", "90"),
    # units
    ("3 miles", "3"),
    ("5 cm^2", "5"),
    ("15 square units", "15"),
    (r"864 \mbox{ inches}^2", "864"),
    (r"15000 \text{ kcal m}^{-2} \text{yr}^{-1}", "15000"),
    (r"164 \pi \mbox{ square feet}", r"164\pi"),
    (r"9\text{ min}", "9"),
    (r"5\text{ m}", "5"),
    ("6m", "6m"),
    (r"2\sec", r"2\sec"),
    ("miles", "miles"),
    (r"3 \text{ million}", r"3\cdot10^6"),
    (r"3 \text{ million dollars}", r"3\cdot10^6"),
    # numbers
    (".5", "0.5"),
    ("-.5", "-0.5"),
    ("(.5, 1.5)", "(0.5,1.5)"),
    (r"10,\!080", "10080"),
    ("10{,}080", "10080"),
    (r"1\,000", "1000"),
    ("2516_{8}", "2516_8"),
    ("10^{3}", "10^3"),
    ("10^{-3}", "10^{-3}"),
    # ends
    (" 5.\n", "5"),
    (r"\approx 8.24 \text{ mph}", "8.24"),
    (r"\begin{pmatrix} 1 \\ 7 \end{pmatrix}", r"\begin1\\7\end"),
    ("2 × 3 − π", r"2\times3-\pi"),
]


@pytest.mark.parametrize(("answer", "expected"), GOLDEN)
def test_normal_form(answer, expected):
    assert normalize(clean(answer)[0]) == expected


@pytest.mark.parametrize("answer", [answer for answer, _ in GOLDEN])
def test_cleaning_twice_changes_nothing(answer):
    once = clean(answer)[0]
    assert clean(once)[0].split() == once.split()


REPEATED = ["{", "\\", " ", ",000", "\\text{", "\\text{a}^2 ", "1", "5 square ", "\\frac1", "$"]
REPEATED += ["^{a}", "%", "\\!", "{,}000", "5 cm ", "\\text{ million", "(", "=", "\\left"]


@pytest.mark.parametrize("piece", REPEATED)
def test_no_input_is_slow(piece):
    """2,000 characters of anything: well under a second where quadratic would still pass."""
    answer = piece * (MAX_ANSWER_CHARS // len(piece))
    start = time.process_time()
    normalize(clean(answer)[0])
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(
    ("answer", "unit"),
    [
        ("5", ""),
        (r"\$5", "dollar"),
        (r"864 \mbox{ inches}^2", "inch^2"),
        (r"864 \text{ square inches}", "inch^2"),
        ("5 cubic feet", "foot^3"),
        (r"60 \text{ miles per hour}", "mile/hour"),
        ("60 mph", "mile/hour"),
        (r"9.8\ \mathrm{m/s^2}", "m/second^2"),
        (r"6 \text{ cm}^{-3}", "cm^-3"),
        (r"30 \text{ fresh apples}", ""),
        (r"45 \text{ units}^2", "^2"),
    ],
)
def test_units_are_taken_off_and_named(answer, unit):
    text, found = clean(answer)
    assert found == unit
    assert text.replace(".", "").isdigit()


@pytest.mark.parametrize(
    "text",
    ["or 6", "dozen", "squared", "tenths", "negative", "not", "if x", "pi", "x", "of 6", "blue"],
)
def test_what_changes_the_value_is_no_unit(text):
    assert clean(rf"5 \text{{ {text}}}")[0] != "5"
