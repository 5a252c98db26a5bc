"""Prompts are filtered on templated text, and dealt out without loss, repeatably, resumably."""

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_zero.data.arithmetic import build_character_tokenizer
from megatron_zero.data.datasets import Row
from megatron_zero.data.encoding import encode
from megatron_zero.data.prompts import PromptCursor, build_prompts
from megatron_zero.types import Prompt


@pytest.fixture(scope="module")
def tokenizer():
    return build_character_tokenizer()


@pytest.fixture(scope="module")
def tokenizer_with_bos():
    """Adds `<bos>` in front and `<eos>` behind by default, as some tokenizers do."""
    from tokenizers import processors

    tokenizer = build_character_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", tokenizer.bos_token_id), ("<eos>", 1)]
    )
    return tokenizer


def rows(*questions):
    return [Row(index=i, question=q, answers=(str(i),)) for i, q in enumerate(questions)]


def test_prompt_holds_templated_text_ids_answers_and_source(tokenizer):
    [prompt] = build_prompts(rows("What is 1+2?"), tokenizer, "arithmetic", 100, "mine")
    assert prompt.text == "What is 1+2?\n"
    assert tokenizer.decode(prompt.token_ids) == prompt.text
    assert (prompt.index, prompt.answers, prompt.source) == (0, ("0",), "mine")


def test_longer_templated_prompts_are_left_out_and_counted(tokenizer, caplog):
    caplog.set_level(logging.WARNING)
    source = rows("1234", "123", "12345", "")[:3]
    kept = build_prompts(source, tokenizer, "arithmetic", 5, "mine")  # the newline counts
    assert [prompt.index for prompt in kept] == [0, 1]
    assert "mine: 1 of 3 prompts left out" in caplog.text
    assert "data.max_prompt_tokens=5 (the longest has 6 tokens)" in caplog.text


def test_nothing_left_is_an_error_with_the_numbers(tokenizer):
    with pytest.raises(
        ValueError,
        match=r"data.max_prompt_tokens=3: all 2 prompts of 'mine' are longer: .* has 4 tokens",
    ):
        build_prompts(rows("12345", "1234"), tokenizer, "no", 3, "mine")
    with pytest.raises(ValueError, match=r"data.dataset='mine': has no rows"):
        build_prompts([], tokenizer, "no", 3, "mine")


def test_bos_is_put_in_front_once_and_eos_never_behind(tokenizer, tokenizer_with_bos):
    bos = tokenizer_with_bos.bos_token_id
    plain = tokenizer("ab")["input_ids"]
    assert encode(["ab"], tokenizer) == [plain]
    assert encode(["ab", "<bos>ab", ""], tokenizer_with_bos) == [
        [bos, *plain],
        [bos, *plain],
        [bos],
    ]
    assert encode([], tokenizer_with_bos) == []


def test_bos_counts_as_a_token(tokenizer_with_bos):
    with pytest.raises(ValueError, match=r"the shortest has 3 tokens"):
        build_prompts(rows("ab"), tokenizer_with_bos, "no", 2, "mine")


def test_a_bos_token_that_is_not_added_by_default_is_not_added():
    tokenizer = build_character_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    assert encode(["a"], tokenizer) == [[69]]


def make_prompts(size, source="mine"):
    return [
        Prompt(index=i, text=f"q{i}", token_ids=(3, i), answers=(str(i),), source=source)
        for i in range(size)
    ]


def deal(cursor, num_batches):
    return [[prompt.index for prompt in cursor.next_batch()] for _ in range(num_batches)]


SIZES = st.integers(1, 40)
SEEDS = st.integers(0, 2**40)


@given(size=SIZES, num_per_step=SIZES, seed=SEEDS, shuffle=st.booleans())
def test_each_epoch_is_exactly_a_permutation(size, num_per_step, seed, shuffle):
    cursor = PromptCursor(make_prompts(size), num_per_step, seed, shuffle)
    num_epochs = 4
    num_batches = -(-num_epochs * size // num_per_step)
    batches = deal(cursor, num_batches)
    assert all(len(batch) == num_per_step for batch in batches)
    stream = [index for batch in batches for index in batch]
    for epoch in range(num_epochs):
        order = stream[epoch * size : (epoch + 1) * size]
        assert sorted(order) == list(range(size))
        if not shuffle:
            assert order == list(range(size))
    assert cursor.epoch == num_batches * num_per_step / size


@given(size=SIZES, num_per_step=SIZES, seed=SEEDS, before=st.integers(0, 12), shuffle=st.booleans())
def test_resumed_equals_uninterrupted(size, num_per_step, seed, before, shuffle):
    prompts = make_prompts(size)
    whole = PromptCursor(prompts, num_per_step, seed, shuffle)
    deal(whole, before)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = PromptCursor(prompts, num_per_step, seed, shuffle)
    resumed.load_state_dict(state)
    assert deal(resumed, 8) == deal(whole, 8)
    assert resumed.state_dict() == whole.state_dict()


@given(size=SIZES, num_per_step=SIZES, seed=SEEDS, before=st.integers(0, 12), shuffle=st.booleans())
def test_what_is_peeked_at_is_dealt_out_all_the_same(size, num_per_step, seed, before, shuffle):
    cursor = PromptCursor(make_prompts(size), num_per_step, seed, shuffle)
    deal(cursor, before)
    state = cursor.state_dict()
    peeked = cursor.peek(2 * num_per_step)  # over the end of an epoch, often
    assert cursor.state_dict() == state
    assert peeked == cursor.next_batch() + cursor.next_batch()


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {
        tuple(order)
        for seed in range(5)
        for order in deal(PromptCursor(make_prompts(30), 30, seed, True), 5)
    }
    assert len(orders) == 25


def test_all_positions_are_equally_likely():
    first = [deal(PromptCursor(make_prompts(4), 4, seed, True), 1)[0][0] for seed in range(2000)]
    assert all(abs(first.count(i) - 500) < 70 for i in range(4))


def test_the_example_of_the_docstring():
    assert deal(PromptCursor(make_prompts(3), 2, 0, False), 4) == [[0, 1], [2, 0], [1, 2], [0, 1]]


def test_number_per_step_may_change_on_resume():
    prompts = make_prompts(10)
    cursor = PromptCursor(prompts, 4, 7, True)
    deal(cursor, 3)
    resumed = PromptCursor(prompts, 5, 7, True)
    resumed.load_state_dict(cursor.state_dict())
    stream = [index for [index] in deal(PromptCursor(prompts, 1, 7, True), 17)]
    assert deal(resumed, 1) == [stream[12:17]]


@pytest.mark.parametrize(
    "prompts, seed, shuffle, name",
    [
        (make_prompts(9), 7, True, "num_prompts"),
        (make_prompts(10, source="other"), 7, True, "fingerprint"),
        (make_prompts(10)[::-1], 7, True, "fingerprint"),
        (make_prompts(10), 8, True, "seed"),
        (make_prompts(10), 7, False, "shuffle"),
    ],
)
def test_a_state_of_other_data_is_refused(prompts, seed, shuffle, name):
    state = PromptCursor(make_prompts(10), 4, 7, True).state_dict()
    cursor = PromptCursor(prompts, 4, seed, shuffle)
    with pytest.raises(ValueError, match=rf"checkpoint.prompts.{name}=.*the run now has"):
        cursor.load_state_dict(state)


@pytest.mark.parametrize("change", ["text", "token_ids", "answers", "index"])
def test_the_fingerprint_sees_every_field(change):
    original = make_prompts(1)[0]
    values = {"text": "Q", "token_ids": (4,), "answers": ("8",), "index": 3}
    fields = {name: getattr(original, name) for name in ("index", "text", "token_ids", "answers")}
    changed = Prompt(**(fields | {change: values[change]}), source=original.source)
    states = [PromptCursor([prompt], 1, 0, True).state_dict() for prompt in (original, changed)]
    assert states[0]["fingerprint"] != states[1]["fingerprint"]


def test_nothing_to_deal_out_is_refused():
    with pytest.raises(ValueError, match=r"data.dataset='': no prompts"):
        PromptCursor([], 1, 0, True)
    with pytest.raises(ValueError, match=r"rollout.num_prompts_per_step=0"):
        PromptCursor(make_prompts(1), 0, 0, True)
