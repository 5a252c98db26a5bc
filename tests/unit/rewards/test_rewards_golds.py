r"""Which gold answers the verifier reads, and what a run says about the others at its start."""

import logging

import pytest

from megatron_zero.config import DataConfig, EvaluationConfig, ModelConfig, RunConfig
from megatron_zero.grading import check_golds
from megatron_zero.preflight import check_files
from megatron_zero.rewards.golds import is_readable, unreadable
from megatron_zero.types import Prompt

READABLE = (
    *("5", "-0.25", "1,234", "\\frac{1}{2}", "\\boxed{5}", "(1,2)", "[0,1)", "x = 5", "50\\%"),
    *("A", "(A)", "yes", "none", "two lines", "Paris", "Zoë", "四十二", "3 miles", "1 \\pmod 4"),
    *("3:1", "4:30 pm", "2024-01-05", "x \\in (0, 1) \\cup [2, \\infty)"),
)
UNREADABLE = (
    *("nan", "NaN", "None", "null", "<NA>", "{}", "[]", "-", "????"),
    *("{'ground_truth': '5', 'style': 'rule'}", "[{'a': 1}]", "b'5'", "['5']"),
    *("<answer>5</answer>", "dict_values(['5'])"),
    *("\\frac{1}{2", "5}", "#### 5", "https://example.org/5", "train/algebra/1.json"),
    "We have x = 5. So the answer is 7.",
    "9" * 3000,
)


@pytest.mark.parametrize("gold", READABLE)
def test_answers_are_read(gold) -> None:
    assert is_readable(gold) and is_readable(f" {gold}\n")


@pytest.mark.parametrize("gold", UNREADABLE)
def test_what_is_no_answer_is_not_read(gold) -> None:
    assert not is_readable(gold)


def test_a_row_is_read_if_any_of_its_answers_is() -> None:
    golds = {10: ("5",), 11: ("nan",), 12: ("nan", "5"), 20: ("{}", "nan"), 21: ("5",)}
    assert unreadable(golds) == [11, 20]


def prompts(*golds: str) -> list[Prompt]:
    """Rows 10, 11, ... of a data set."""
    return [
        Prompt(index=10 + i, text="q", token_ids=(1,), answers=(gold,), source="some/set")
        for i, gold in enumerate(golds)
    ]


def test_a_run_says_how_many_it_cannot_read(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        check_golds(prompts("5", "6"), setting="data.answer_key", value="")
        assert caplog.text == ""
        bad = ["{'a': 1}"] * 7
        for _template in range(2):
            check_golds(prompts("5", *bad), setting="data.answer_key", value="")
    assert len(caplog.records) == 1
    assert "some/set: the verifier cannot read 7 of 8 gold answers" in caplog.text
    assert "rows 11, 12, 13, 14, 15, ...; row 11 has \"{'a': 1}\"" in caplog.text


def test_a_run_without_a_gold_that_can_be_read_does_not_start() -> None:
    solution = "We have x = 5. So the answer is 7." + " More." * 100
    with pytest.raises(ValueError) as error:
        check_golds(prompts(solution, "nan"), setting="data.answer_key", value="solution")
    message = str(error.value)
    assert message.startswith("data.answer_key='solution': the verifier can read none of the 2")
    assert "row 10 has 'We have x = 5." in message and "final answers" in message
    assert len(message) < 300


def test_the_launcher_refuses_them_before_it_starts_a_process(tmp_path) -> None:
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text('{"problem": "2+3", "answer": "5"}\n')
    bad.write_text('{"problem": "2+3", "answer": "We have x = 5. So 7."}\n')
    model = ModelConfig(init="random", tokenizer="characters")
    check_files(RunConfig(name="a", model=model, data=DataConfig(dataset=str(good))))
    with pytest.raises(ValueError, match=r"^data\.answer_key='': the verifier can read none"):
        check_files(RunConfig(name="a", model=model, data=DataConfig(dataset=str(bad))))
    held_out = RunConfig(
        name="a",
        model=model,
        data=DataConfig(dataset=str(good)),
        evaluation=EvaluationConfig(datasets=[str(bad)]),
    )
    with pytest.raises(ValueError, match=r"^evaluation\.datasets='.*bad\.jsonl': the verifier can"):
        check_files(held_out)


def test_known_data_sets_are_read(shared_dir) -> None:
    """At most one gold in 1,000, and those are not formulas: times, names, Python's None."""
    from megatron_zero.data.datasets import load_rows

    for name, num_unreadable in (("math", 0), ("gsm8k", 0), ("math_lvl3to5_8k", 7)):
        rows = load_rows(DataConfig(dataset=name, data_dir=str(shared_dir / "data")))
        found = unreadable({row.index: row.answers for row in rows})
        assert len(found) == num_unreadable, found
