"""Phrases of self-reflection, what a judge is asked, and how its reply is read."""

import pytest

from megatron_zero.analysis.responses import QUESTIONS, judge_messages, marks, verdict


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Wait, I made a mistake. Let me double-check.", "exclaim|notice a mistake|check again"),
        ("Let me recheck this step, and re-check it.", "check again"),
        ("We check the result again: 5.", "check again"),
        ("Let's verify: 2+3=5.", "verify again"),
        ("On second thought, rethinking helps.", "think again"),
        ("Let us re-evaluate the integral and go back to step 1.", "evaluate again"),
        ("I was wrong. Start over!", "notice a mistake|start over"),
        ("Let me try another approach.", "start over"),
        ("Hmm, aha! Hold on, 7.", "exclaim"),
    ],
)
def test_keywords(text: str, found: str) -> None:
    counts = marks("self-reflection", text)
    names = {name for name in QUESTIONS["keywords"] if counts[name]}
    assert names == set(found.split("|")) and counts["any keyword"] == 1


@pytest.mark.parametrize(
    "text",
    [
        "Tom waits for the bus and checks his watch.",
        "We check that 5 divides 10. The verified result is 2.",
        "The research of a mistaken theory is a search again and again.",
        "Consider the triangle. Evaluate f at 3. Then restart the machine.",
        "An error of 3 cm. The approach is direct; think of it.",
        "",
    ],
)
def test_direct_solutions_have_no_keyword(text: str) -> None:
    counts = marks("self-reflection", text)
    assert counts.pop("all") == 1 and not any(counts.values())


def test_keywords_are_counted_each_time() -> None:
    counts = marks("self-reflection", "Wait, no. WAIT! Recheck, recheck and double check.")
    assert counts["exclaim"] == 2 and counts["check again"] == 3


@pytest.mark.parametrize(
    ("reply", "label"),
    [
        ("ANSWERS\nIt computes a sum.", "answers"),
        ("**Continues**. More questions follow.", "continues"),
        ("\n neither", "neither"),
        ("<think>ANSWERS or CONTINUES?</think>\n\nCONTINUES\nIt goes on.", "continues"),
        ("ANSWERS or CONTINUES", "unclear"),
        ("It is hard to say.\nANSWERS", "unclear"),
        ("answer", "unclear"),
        ("@@#$ 13+4", "unclear"),
        ("<think>ANSWERS", "answers"),
        ("", "unclear"),
        (None, "refused"),
    ],
)
def test_a_reply_is_a_label_or_unclear(reply, label: str) -> None:
    assert verdict("answering", reply) == label


def test_marks_of_a_judge() -> None:
    found = marks("self-reflection", "Hmm. Let me double-check.", "reflects")
    assert found["reflects"] == found["keyword and judge"] == 1 and found["direct"] == 0
    assert marks("self-reflection", "2+3=5", "reflects")["keyword and judge"] == 0
    answering = marks("answering", "Hmm. 5", "continues")
    names = ["all", "answers", "continues", "neither", "unclear", "refused"]
    assert list(answering) == names  # no keywords
    assert [answering[name] for name in names] == [1, 0, 1, 0, 0, 0]


def test_the_judge_reads_the_prompt_and_the_response_and_every_label() -> None:
    for analysis in ("answering", "self-reflection"):
        system, user = judge_messages(analysis, "What is {x}? \ud800", "It is \\boxed{5}.")
        assert user["content"].count("What is {x}? ?") == 1
        assert "It is \\boxed{5}." in user["content"]
        for label in QUESTIONS[analysis]["labels"]:
            assert f"\n{label.upper()}: " in system["content"]
