"""Templates are byte-equal to the reference's (A12.1), and importing them costs nothing."""

import hashlib
import subprocess
import sys

import pytest

from megatron_zero.config import ANSWER_FORMATS, TEMPLATES
from megatron_zero.data import templates
from megatron_zero.data.templates import apply_template, stop_strings
from megatron_zero.rewards.math import math_reward

GOLD = ["147", "1/4", "5", "7"]  # of the built-in worked problems, worked out again
QUESTION = "What is $1+1$?\n"
# length and sha256 of what understand-r1-zero's own functions make of QUESTION
REFERENCE = {
    "qwen_math": (165, "4da2847658b319b850aed99345069f2e690f6dc2932059f2255c1788a4597a04"),
    "r1": (454, "f79e6c4f946be07759c84df6ab57be2d19483558e6b0b7e8f23fe50131cf8d89"),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_templates_are_byte_equal_to_the_reference(name):
    text = apply_template(name, QUESTION)
    assert (len(text), hashlib.sha256(text.encode()).hexdigest()) == REFERENCE[name]


def test_templates_of_other_projects_models():
    """Against the strings that those projects publish, written out once more."""
    boxed = "Please reason step by step, and put your final answer within \\boxed{}."
    assert apply_template("qwen3", "Q?") == (
        f"<|im_start|>user\nQuestion: Q?\n{boxed}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert apply_template("r1_distill_qwen", "Q?") == (
        f"<｜begin▁of▁sentence｜><｜User｜>Q? {boxed}\n<｜Assistant｜><think>\n"
    )
    prime = apply_template("prime_zero", "Q?")
    assert prime.startswith("A conversation between User and Assistant. The user asks a question,")
    assert prime.endswith(
        "<answer> answer here </answer>. User: Q?\n\nPresent the answer in LaTex format: "
        "\\boxed{Your answer}. Assistant:"
    )
    reasoner = apply_template("open_reasoner_zero", "Q?")
    r1_preamble = apply_template("r1", "").removesuffix("\nUser: \nAssistant: <think>")
    assert reasoner == (
        f"{r1_preamble} User: You must put your answer inside <answer> </answer> tags, i.e., "
        "<answer> answer here </answer>. And your final answer will be extracted automatically by "
        "the \\boxed{} tag.\nThis is the problem:\nQ?\nAssistant: <think>"
    )


def test_llama_instruct_is_the_tokenizers_own_chat_template(qwen_tokenizer_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(qwen_tokenizer_dir)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    boxed = "Please reason step by step, and put your final answer within \\boxed{}."
    text = apply_template("llama_instruct", "Q?", tokenizer)
    assert text == f"[user]Q?\n{boxed}\n\n[assistant]"
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"data.template='llama_instruct': needs a tokenizer that"):
        apply_template("llama_instruct", "Q?", tokenizer)


def test_the_built_in_worked_problems_are_right():
    text = apply_template("few_shot", "Q?")
    *shots, question = text.split("Problem:\n")[1:]
    assert len(shots) == 4 and question == "Q?\n\nSolution:\n"
    answers = [math_reward(shot, (gold,), "boxed") for shot, gold in zip(shots, GOLD, strict=True)]
    assert all(each.correct for each in answers)


def test_worked_problems_of_a_file(tmp_path):
    file = tmp_path / "shots.jsonl"
    file.write_text('{"problem": "1+1?", "solution": "\\\\boxed{2}"}\n')
    text = apply_template("few_shot", "Q?", few_shot=str(file))
    assert text == "Problem:\n1+1?\n\nSolution:\n\\boxed{2}\n\nProblem:\nQ?\n\nSolution:\n"
    with pytest.raises(ValueError, match=r"data.few_shot='solution': no such column"):
        (tmp_path / "other.jsonl").write_text('{"problem": "1+1?"}\n')
        apply_template("few_shot", "Q?", few_shot=str(tmp_path / "other.jsonl"))


def test_no_template_is_the_question_verbatim():
    assert apply_template("no", QUESTION) == QUESTION


def test_arithmetic_template_ends_the_line():
    assert apply_template("arithmetic", "What is 12+34?") == "What is 12+34?\n"


def test_r1_prompt_ends_in_an_open_think_tag_without_a_space():
    assert apply_template("r1", "q").endswith("\nUser: q\nAssistant: <think>")


def test_questions_with_braces_and_percent_are_not_interpreted():
    question = "\\frac{a}{b} %s {0} {question}"
    names = set(TEMPLATES) - {"llama_instruct"}
    assert all(question in apply_template(name, question) for name in names)


def test_names_are_those_of_the_config():
    assert list(templates._TEMPLATES) == list(TEMPLATES)
    assert set(TEMPLATES.values()) <= set(ANSWER_FORMATS)


def test_stop_strings():
    stops = {name: stop_strings(name) for name in TEMPLATES if stop_strings(name)}
    assert stops == {"r1": ("</answer>",), "few_shot": ("Problem:",)}


@pytest.mark.parametrize("use", [lambda name: apply_template(name, "q"), stop_strings])
def test_unknown_name_lists_the_valid_ones(use):
    with pytest.raises(ValueError, match=r"data.template='qwen': must be one of qwen_math, r1"):
        use("qwen")


def test_import_is_standard_library_only():
    code = (
        "import sys; before = set(sys.modules); import megatron_zero.data.templates;"
        "roots = {name.split('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(r for r in roots if r not in sys.stdlib_module_names))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "['megatron_zero']", result.stderr


def test_heavy_libraries_are_imported_only_when_used():
    code = (
        "import sys, megatron_zero.data.arithmetic, megatron_zero.data.datasets,"
        "megatron_zero.data.documents;"
        "print([n for n in ('torch', 'transformers', 'datasets', 'pyarrow') if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
