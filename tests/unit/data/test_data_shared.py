"""The real Qwen2.5 tokenizer and the paper's data, where this workplace has them."""

from pathlib import Path

import pytest

from megatron_zero.config import DataConfig, DocumentsConfig
from megatron_zero.data.datasets import load_rows
from megatron_zero.data.documents import DocumentStream
from megatron_zero.data.prompts import build_prompts
from megatron_zero.data.templates import apply_template

SHARED = Path(__file__).resolve().parents[4] / "shared"
DATA = SHARED / "data"
TOKENIZER = SHARED / "tokenizers" / "qwen2.5"

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not here")
needs_tokenizer = pytest.mark.skipif(not TOKENIZER.is_dir(), reason=f"{TOKENIZER} is not here")


@pytest.fixture(scope="module")
def qwen():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOKENIZER)


NUM_ROWS = {  # in the file, and without an answer
    "math_12k": (12000, 2),
    "math_lvl3to5_8k": (8523, 2),
    "gsm8k": (7473, 0),
    "asdiv": (1788, 0),
    "dapo_17k": (16921, 0),
    "aime": (30, 0),
    "amc": (83, 0),
    "math": (500, 0),
    "math500": (500, 0),
    "minerva": (272, 0),
    "olympiad_bench": (675, 0),
}


@needs_data
@pytest.mark.parametrize("name", NUM_ROWS)
def test_known_data_sets_have_their_rows(name):
    rows = load_rows(DataConfig(dataset=name, data_dir=str(DATA)))
    in_file, without_answer = NUM_ROWS[name]
    assert len(rows) == in_file - without_answer
    assert rows[-1].index == in_file - 1


@needs_data
def test_answers_are_the_reference_golds():
    amc = load_rows(DataConfig(dataset="amc", data_dir=str(DATA)))
    assert amc[0].answers == ("142.0",)
    minerva = load_rows(DataConfig(dataset="minerva", data_dir=str(DATA)))
    assert minerva[0].answers == ("9.6",)
    # 75 lists of two or three; in 35 they differ in white space only
    assert sum(len(row.answers) > 1 for row in minerva) == 40
    gsm8k = load_rows(DataConfig(dataset="gsm8k", data_dir=str(DATA), max_prompts=1))
    assert gsm8k[0].answers == ("72",)


@needs_data
def test_no_benchmark_problem_is_in_the_paper_training_sets():
    benchmarks = {
        row.question
        for name in ("aime", "amc", "math", "minerva", "olympiad_bench")
        for row in load_rows(DataConfig(dataset=name, data_dir=str(DATA)))
    }
    for name in ("math_12k", "math_lvl3to5_8k", "gsm8k"):
        rows = load_rows(DataConfig(dataset=name, data_dir=str(DATA)))
        assert not benchmarks & {row.question for row in rows}


@needs_tokenizer
def test_chat_template_equals_the_qwen_math_template(qwen):
    question = "What is $1+1$?\nAnswer with {one} number."
    chat = qwen.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    assert chat == apply_template("qwen_math", question)


@needs_data
@needs_tokenizer
def test_qwen_prompts_of_the_paper(qwen):
    rows = load_rows(DataConfig(dataset="math_lvl3to5_8k", data_dir=str(DATA)))
    prompts = build_prompts(rows, qwen, "qwen_math", 1024, "math_lvl3to5_8k")
    assert len(prompts) == 8523 - 2 - 8  # 2 without answer, 8 too long
    assert sum(len(prompt.token_ids) for prompt in prompts) == 906_084
    assert max(len(prompt.token_ids) for prompt in prompts) == 988
    for prompt in prompts[::1000]:
        assert prompt.token_ids[0] == qwen.convert_tokens_to_ids("<|im_start|>")
        assert qwen.decode(prompt.token_ids) == prompt.text


@needs_data
@needs_tokenizer
def test_qwen_documents_of_problems_and_solutions(qwen):
    config = DocumentsConfig(
        source=str(DATA / "train" / "gsm8k_train.parquet"),
        text_key="problem+solution",
        sequence_length=512,
        sequences_per_step=4,
    )
    stream = DocumentStream(config, qwen, seed=0)
    sequences = stream.sequences(0)
    assert all(sum(len(piece) - 1 for piece in sequence) == 512 for sequence in sequences)
    whole = [piece for sequence in sequences for piece in sequence[1:-1]]
    assert all(piece[-1] == qwen.eos_token_id for piece in whole)
