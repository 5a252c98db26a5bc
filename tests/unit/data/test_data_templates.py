"""Templates are byte-equal to the reference's (A12.1), and importing them costs nothing."""

import hashlib
import subprocess
import sys

import pytest

from megatron_zero.config import TEMPLATES
from megatron_zero.data import templates
from megatron_zero.data.templates import apply_template, stop_strings

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


def test_no_template_is_the_question_verbatim():
    assert apply_template("no", QUESTION) == QUESTION


def test_arithmetic_template_ends_the_line():
    assert apply_template("arithmetic", "What is 12+34?") == "What is 12+34?\n"


def test_r1_prompt_ends_in_an_open_think_tag_without_a_space():
    assert apply_template("r1", "q").endswith("\nUser: q\nAssistant: <think>")


def test_questions_with_braces_and_percent_are_not_interpreted():
    question = "\\frac{a}{b} %s {0} {question}"
    assert all(question in apply_template(name, question) for name in TEMPLATES)


def test_names_are_those_of_the_config():
    assert list(templates._PARTS) == TEMPLATES


def test_only_r1_has_a_stop_string():
    stops = {name: stop_strings(name) for name in TEMPLATES}
    assert stops == {"qwen_math": (), "r1": ("</answer>",), "no": (), "arithmetic": ()}


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
