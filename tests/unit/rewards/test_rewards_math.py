"""Where the answer of a response is, and what the response earns."""

import pytest

from megatron_zero.rewards.base import apply_truncation
from megatron_zero.rewards.math import extract_answer, find_answer, math_reward
from megatron_zero.types import Graded

TAGGED = "I think </think> <answer>{}</answer>"


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{5} no, \boxed{6}", "6"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed {5}", "5"),
        (r"\boxed{ 5 }", "5"),
        (r"\boxed{}", ""),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{5}. I used \boxed.", "5"),
        (r"\boxed{5} and \boxed{6", None),
        (r"\boxed{5\}", None),
        (r"\boxed", None),
        (r"\fbox{5}", None),
        ("5", None),
        ("", None),
    ],
)
def test_boxed(response, answer):
    assert extract_answer(response, "boxed") == answer
    assert find_answer(response, "boxed") == (answer is not None, answer)


@pytest.mark.parametrize(
    ("response", "formatted", "answer"),
    [
        (TAGGED.format("5"), True, "5"),
        (TAGGED.format(r" \boxed{5} "), True, "5"),
        (TAGGED.format(r"\boxed{5"), True, None),
        (TAGGED.format("4") + " </think> <answer>5</answer>", True, "5"),
        (TAGGED.format("5") + " <answer>6", True, "6"),
        (TAGGED.format("5") + " and so on", True, "5"),
        ("</think>\n<answer>5</answer>", False, None),
        ("</think><answer>5</answer>", False, None),
        ("</think>  <answer>5</answer>", False, None),
        ("</think> <answer>5", False, None),
        ("<answer>5</answer>", False, None),
        (r"\boxed{5}", False, None),
    ],
)
def test_answer_tag(response, formatted, answer):
    assert find_answer(response, "answer_tag") == (formatted, answer)


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match="answer_format='tag'"):
        extract_answer("5", "tag")


@pytest.mark.parametrize(
    ("response", "answer_format", "formatted", "answer"),
    [
        ("so 4</think>\n<answer>5</answer>", "answer_tag_lenient", True, "5"),
        ("<answer>5</answer>", "answer_tag_lenient", True, "5"),
        ("<answer>\\boxed{5}</answer>", "answer_tag_lenient", True, "5"),
        ("</think> <answer>5", "answer_tag_lenient", False, None),
        (r"\boxed{4} </think> it is \boxed{5}", "boxed_after_think", True, "5"),
        (r"\boxed{5}", "boxed_after_think", False, None),
        (r"\boxed{4}</think> five", "boxed_after_think", False, None),
        (r"</think> \boxed{4} </think> \boxed{5}", "boxed_after_think", False, None),
    ],
)
def test_formats_of_other_projects_models(response, answer_format, formatted, answer):
    assert find_answer(response, answer_format) == (formatted, answer)


def test_long_responses_are_searched_from_their_end():
    filler = r"Let \boxed{x} be { } " * 50_000  # 1 MB
    assert extract_answer(filler + r"\boxed{5}", "boxed") == "5"
    assert extract_answer(filler + r"\boxed{" + "1" * 2_000_000, "boxed") is None
    assert extract_answer(filler + r"\boxed{" + "{" * 1_000_000, "boxed") is None
    assert extract_answer(filler + r"\boxed{" + "1" * 100_000 + "}", "boxed") is None
    assert extract_answer(r"\boxed" * 200_000, "boxed") is None
    assert extract_answer("</think> <answer>" * 60_000 + "</answer>", "answer_tag") == ""
    assert find_answer(TAGGED.format("1" * 1_000_000), "answer_tag") == (True, None)


@pytest.mark.parametrize(
    ("response", "gold", "expected"),
    [
        (r"\boxed{0.5}", ("1/3", "1/2"), (1.0, True, True, "correct")),
        (r"\boxed{0.5}", 0.5, (1.0, True, True, "correct")),
        (r"\boxed{0.6}", "1/2", (0.0, False, True, "wrong")),
        (r"\boxed{}", "1/2", (0.0, False, True, "wrong")),
        ("1/2", "1/2", (0.0, False, False, "unparsable")),
    ],
)
def test_reward(response, gold, expected):
    graded = math_reward(response, gold, "boxed")
    assert (graded.reward, graded.correct, graded.formatted, graded.outcome) == expected


def test_reward_of_tags_around_a_broken_box():
    graded = math_reward(TAGGED.format(r"\boxed{5"), "5", "answer_tag")
    assert graded == Graded(reward=0.0, correct=False, formatted=True, outcome="unparsable")


def test_truncation_takes_the_reward_and_keeps_the_verdict():
    """Reference A3.2: even a correct response earns 0 when it was cut off."""
    graded = math_reward(r"\boxed{5}", "5", "boxed")
    assert apply_truncation(graded, False) == graded
    assert apply_truncation(graded, True) == Graded(
        reward=0.0, correct=True, formatted=True, outcome="correct"
    )
