"""Equivalence: the reference's probed cases, spellings that must agree, answers that must not."""

import os
import re
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zero.rewards.equivalence import is_equivalent
from tests.unit.rewards.hostile import hostile_answers

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
CASES = Path(__file__).with_name("equivalence_cases.txt")
GOLDS = (r"\frac{1}{2}", "x+1", r"\{1,2\}", r"[0,\infty)")
MAX_SECONDS = 1.0  # of the process, not of the clock: other work on the machine must not fail this


def cases():
    """(kind, prediction, gold, verdict) of every line."""
    kind = ""
    for line in CASES.read_text().splitlines():
        kind = line[3:] if line.startswith("## ") else kind
        for sign, verdict in ((" === ", True), (" =/= ", False)):
            if sign in line and not line.startswith("#"):
                yield (kind, *line.split(sign), verdict)


@pytest.mark.parametrize("kind", sorted({case[0] for case in cases()}))
def test_verdicts(kind):
    of_this_kind = [case[1:] for case in cases() if case[0] == kind]
    wrong = [
        (prediction, gold)
        for first, second, verdict in of_this_kind
        for prediction, gold in ((first, second), (second, first))
        if is_equivalent(prediction, gold) is not verdict
    ]
    assert wrong == []


def test_the_set_has_enough_of_both_verdicts():
    verdicts = [case[3] for case in cases()]
    assert len(verdicts) > 800
    assert len({case[:3] for case in cases()}) == len(verdicts)
    assert 0.4 < verdicts.count(True) / len(verdicts) < 0.6


@pytest.mark.parametrize(("prediction", "gold"), REFERENCE)
def test_the_reference_agrees(prediction, gold):
    assert is_equivalent(prediction, gold)


@pytest.mark.parametrize("empty", ["", " ", "\n"])
def test_no_answer_equals_nothing(empty):
    assert not any(is_equivalent(empty, gold) for gold in ("5", "0", "", r"\emptyset"))
    assert not is_equivalent("5", empty)


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


def test_hostile_answers_are_refused_at_once_and_never_executed(tmp_path):
    """Also when gold and answer are both hostile, and equal but for one more operation."""
    path = tmp_path / "executed"
    slow, fooled = [], []
    answers = hostile_answers(str(path))
    assert len(answers) >= 300
    for answer in answers:
        for gold in (*GOLDS, f"{answer}+0", rf"\frac{{({answer})\sqrt2}}{{\sqrt2}}"):
            start = time.process_time()
            rewarded = is_equivalent(answer, gold)
            if time.process_time() - start > MAX_SECONDS:
                slow.append((answer, gold))
            if rewarded and gold in GOLDS:
                fooled.append((answer, gold))
    assert (slow, fooled) == ([], [])
    assert os.listdir(tmp_path) == []


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


def gold_answers(shared_dir):
    """Every gold answer of the five benchmarks and of math_12k, once."""
    parquet = pytest.importorskip("pyarrow.parquet")
    files = [f"eval/{n}" for n in ("aime", "amc", "math", "minerva", "olympiad_bench")]
    golds = []
    for name in [*files, "train/math_12k"]:
        path = shared_dir / "data" / f"{name}.parquet"
        if not path.is_file():
            pytest.skip(f"needs {path}")
        for row in parquet.read_table(path).to_pylist():
            golds += row.get("answers") or [row["answer"]]
    assert golds.count("") == 2  # two rows of math_12k have no answer: nothing can be right there
    return sorted({gold.strip() for gold in golds} - {""})


def without_dollars(gold):
    return gold.strip("$") if gold.count("$") == 2 and "\\$" not in gold else gold


RESPELLINGS = [
    lambda gold: re.sub(r"\\[dtc]?frac", r"\\dfrac ", gold).replace(" ", "  "),
    lambda gold: f"${without_dollars(gold)}$.",
    lambda gold: rf"\boxed{{{gold}}}",
    lambda gold: rf"\[\displaystyle {without_dollars(gold)} \]",
    lambda gold: re.sub(r"^(\d+)(\d{3})$", r"\1{,}\2", gold),
    lambda gold: f"{gold}.0" if re.fullmatch(r"-?\d+", gold) else gold,
    lambda gold: gold.replace("pmatrix", "bmatrix").replace("\\sqrt{", "\\sqrt {"),
    lambda gold: gold if "\\" in gold else gold.replace("-", "−"),
]
NUMBER = re.compile(r"(?<![\d_])\d+")
GROUPED = re.compile(r"\d,\D*\d{3}|[\[({]")
PERTURBATIONS = [
    lambda gold: NUMBER.sub(lambda number: str(int(number[0]) + 1), gold, count=1),
    lambda gold: gold.replace("-", "", 1),
    lambda gold: gold.replace("+", "-", 1),
    lambda gold: f"{without_dollars(gold)}, 7919",
    lambda gold: rf"{without_dollars(gold)} \text{{ or }} 7919",
    lambda gold: rf"{without_dollars(gold)}\text{{ or 7919}}",
    lambda gold: f"{without_dollars(gold)}}}",
    lambda gold: rf"{without_dollars(gold)} \foo",
    lambda gold: f"{gold}0" if re.fullmatch(r"-?[1-9]\d*", gold) else gold,
    lambda gold: re.sub(r"_\{?(\d+)\}?$", lambda m: f"_{{{int(m[1]) + 1}}}", gold),
    # an element less, of a list without brackets that is no number in groups of three
    lambda gold: (
        gold if re.search(r"\d,\D*\d{3}|[\[({]", gold) else gold.rpartition(",")[0] or gold
    ),
]


def test_every_gold_answer_equals_itself_respelled_and_no_perturbed_one(shared_dir):
    golds = gold_answers(shared_dir)
    missed, fooled = [], []
    for i, gold in enumerate(golds):  # each with a third of them, to save time
        for respell in RESPELLINGS[i % 3 :: 3]:
            if not is_equivalent(respell(gold), gold):
                missed.append((respell(gold), gold))
        for perturb in PERTURBATIONS[i % 3 :: 3]:
            other = perturb(gold)
            if other != gold and is_equivalent(other, gold):
                fooled.append((other, gold))
    assert (missed, fooled) == ([], [])
