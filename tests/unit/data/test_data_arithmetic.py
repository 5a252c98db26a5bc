"""Generated problems: stateless, stable, right where they must be, and never the held-out ones."""

import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_zero.config import ArithmeticConfig
from megatron_zero.data import arithmetic
from megatron_zero.data.seeding import below, epoch_order, seeded_random, stable_hash

CONFIG = ArithmeticConfig()
QUESTION = re.compile(r"What is (\d+)\+(\d+)\?")
SOLUTION = re.compile(
    r"(\d)\+(\d)=(\d+)\. (\d+)\+(\d+)=(\d+)\. ((?:check \d+\+\d+\. ){0,2})\\boxed\{(-?\d+)\}"
)


def operands(question: str) -> tuple[int, int]:
    a, b = QUESTION.fullmatch(question).groups()
    return int(a), int(b)


def test_values_are_pinned():
    """What a seed means may not change: published runs would no longer be repeatable."""
    assert [arithmetic.document(0, i, CONFIG) for i in range(3)] == [
        "What is 77+44?\n7+4=11. 70+40=110. check 110+11. \\boxed{111}",
        "What is 97+51?\n7+1=8. 90+50=140. \\boxed{148}",
        "What is 24+31?\n4+1=5. 20+30=50. check 50+5. \\boxed{45}",
    ]
    assert arithmetic.held_out_problems(CONFIG)[:2] == [
        ("What is 73+60?", "133"),
        ("What is 13+25?", "38"),
    ]
    assert epoch_order(0, 0, 5) == [0, 2, 1, 3, 4]


def test_another_process_makes_the_same():
    code = (
        "from megatron_zero.config import ArithmeticConfig as C;"
        "from megatron_zero.data import arithmetic as a;"
        "print([a.document(3, i, C()) for i in range(20)])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == str([arithmetic.document(3, i, CONFIG) for i in range(20)])


@given(st.integers(0, 2**31), st.integers(0, 2**40), st.integers(0, 500), st.integers(5, 5000))
def test_problem_and_solution(seed, index, low, width):
    config = ArithmeticConfig(min_operand=low, max_operand=low + width, wrong_fraction=0.0)
    question, answer = arithmetic.problem(seed, index, config)
    a, b = operands(question)
    assert low <= min(a, b) and max(a, b) <= low + width
    assert answer == str(a + b)
    ones_a, ones_b, ones, rest_a, rest_b, rest, checks, boxed = SOLUTION.fullmatch(
        arithmetic.solution(seed, index, config)
    ).groups()
    assert int(ones_a) + int(rest_a) == a and int(ones_b) + int(rest_b) == b
    assert int(ones) == int(ones_a) + int(ones_b) and int(rest) == int(rest_a) + int(rest_b)
    assert checks in {f"check {rest}+{ones}. " * n for n in range(3)}
    assert boxed == answer
    document = arithmetic.document(seed, index, config)
    assert document == f"{question}\n{arithmetic.solution(seed, index, config)}"
    assert document == arithmetic.document(seed, index, config)


def test_wrong_fraction_is_met_and_independent_of_length():
    config = ArithmeticConfig(wrong_fraction=0.3)
    wrong, checks = [], []
    for i in range(6000):
        text = arithmetic.solution(1, i, config)
        wrong.append(SOLUTION.fullmatch(text)[8] != arithmetic.problem(1, i, config)[1])
        checks.append(text.count("check"))
    assert sum(wrong) / 6000 == pytest.approx(0.3, abs=0.02)  # 3.4 standard deviations
    for n, share in ((0, 0.5), (1, 0.25), (2, 0.25)):
        of_length = [w for w, c in zip(wrong, checks, strict=True) if c == n]
        assert len(of_length) / 6000 == pytest.approx(share, abs=0.02)
        assert sum(of_length) / len(of_length) == pytest.approx(0.3, abs=0.04)


def test_about_one_pair_in_ten_is_held_out_whatever_the_order():
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    held_out = {pair for pair in pairs if arithmetic.is_held_out(*pair)}
    assert len(held_out) / len(pairs) == pytest.approx(0.1, abs=0.01)
    assert all((b, a) in held_out for a, b in held_out)


@pytest.mark.parametrize("low, high", [(10, 99), (0, 30), (100, 999)])
def test_held_out_problems_are_never_trained_on(low, high):
    config = ArithmeticConfig(min_operand=low, max_operand=high)
    held_out = {operands(question) for question, _ in arithmetic.held_out_problems(config)}
    either_order = held_out | {(b, a) for a, b in held_out}
    for seed in (0, 1, 12345):
        for i in range(3000):
            question, _ = arithmetic.document(seed, i, config).split("\n")
            assert operands(question) not in either_order


def test_held_out_set_is_fixed_distinct_and_right():
    problems = arithmetic.held_out_problems(CONFIG)
    assert len(problems) == len(set(problems)) == arithmetic.NUM_HELD_OUT_ROWS == 256
    assert all(sum(operands(question)) == int(answer) for question, answer in problems)
    assert problems == arithmetic.held_out_problems(ArithmeticConfig(wrong_fraction=0.1))


def test_small_range_gives_every_held_out_pair():
    config = ArithmeticConfig(min_operand=0, max_operand=9)
    held_out = {(a, b) for a in range(10) for b in range(10) if arithmetic.is_held_out(a, b)}
    assert {operands(q) for q, _ in arithmetic.held_out_problems(config)} == held_out


def test_range_without_held_out_pairs_is_refused():
    with pytest.raises(ValueError, match=r"arithmetic.max_operand=1: no pair from 0 on is held"):
        arithmetic.held_out_problems(ArithmeticConfig(min_operand=0, max_operand=1))


def test_range_without_training_pairs_is_refused(monkeypatch):
    monkeypatch.setattr(arithmetic, "is_held_out", lambda a, b: True)
    with pytest.raises(ValueError, match=r"arithmetic.max_operand=99: every pair from 10 on"):
        arithmetic.problem(0, 0, CONFIG)


def test_hash_separates_its_parts():
    assert stable_hash("epoch", 1, 23) != stable_hash("epoch", 12, 3)
    assert 0 <= stable_hash("x") < 2**64


def test_below_is_uniform():
    rng = seeded_random("test")
    counts = [0] * 5
    for _ in range(10_000):
        counts[below(rng, 5)] += 1
    assert min(counts) > 1850 and max(counts) < 2150


@pytest.fixture(scope="module")
def tokenizer():
    return arithmetic.build_character_tokenizer()


def test_characters_have_the_ids_3_to_98(tokenizer):
    assert tokenizer(arithmetic.CHARACTERS)["input_ids"] == list(range(3, 99))
    assert len(tokenizer) == 99
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.bos_token_id is None


@given(text=st.text(alphabet=arithmetic.CHARACTERS, min_size=1, max_size=80))
def test_character_round_trip_is_exact(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    if not any(special in text for special in ("<pad>", "<eos>", "<unk>")):
        assert len(ids) == len(text)


def test_other_characters_are_unknown_one_per_byte(tokenizer):
    assert tokenizer("aéb")["input_ids"] == [*tokenizer("a")["input_ids"], 2, 2, 70]
    assert tokenizer("\t")["input_ids"] == [2]


def test_eos_written_in_text_is_the_token(tokenizer):
    assert tokenizer("1<eos>")["input_ids"] == [*tokenizer("1")["input_ids"], 1]
    assert tokenizer.decode([20, 1], skip_special_tokens=True) == tokenizer.decode([20])


@pytest.mark.parametrize("config_class", [None, "Qwen2Config", "Qwen3Config", "LlamaConfig"])
def test_saved_tokenizer_is_the_same_beside_any_model(tokenizer, tmp_path, config_class):
    """AutoTokenizer rebuilds a tokenizer beside a Qwen2 config: it must not lose spaces there."""
    import transformers

    tokenizer.save_pretrained(tmp_path)
    if config_class is not None:
        getattr(transformers, config_class)().save_pretrained(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = arithmetic.CHARACTERS + "  don't\n\n" + arithmetic.document(0, 0, CONFIG)
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.pad_token_id, loaded.eos_token_id, len(loaded)) == (0, 1, 99)
