"""Prompt templates: what a base model reads in front of its first token.

The three of the reference are byte-equal to its strings, because a base model's behaviour before
any training depends on them. Names are `config.TEMPLATES`. Standard library only.

`qwen_math` is the chat format that Qwen2.5-Math was trained on; `r1` asks for reasoning and answer
in tags and opens the first one; `no` is the bare question; `arithmetic` ends the question's line,
which is where the worked solutions of `data.arithmetic` begin.
"""

from megatron_zero.config import TEMPLATES, fail

# prefix and suffix around the question
_PARTS = {
    "qwen_math": (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within "
        "\\boxed{}.<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    ),
    "r1": (
        "A conversation between User and Assistant. The User asks a question, and the Assistant "
        "solves it. The Assistant first thinks about the reasoning process in the mind and then "
        "provides the User with the answer. The reasoning process is enclosed within <think> "
        "</think> and answer is enclosed within <answer> </answer> tags, respectively, i.e., "
        "<think> reasoning process here </think> <answer> answer here </answer>.\nUser: ",
        "\nAssistant: <think>",
    ),
    "no": ("", ""),
    "arithmetic": ("", "\n"),
}

_R1_STOP_STRINGS = ("</answer>",)


def _check_name(name: str) -> None:
    if name not in _PARTS:
        fail("data.template", name, f"must be one of {', '.join(TEMPLATES)}")


def apply_template(name: str, question: str) -> str:
    """The text the model continues.

    Example:
        apply_template("arithmetic", "What is 12+34?") == "What is 12+34?\\n"

    Raises:
        ValueError: `name` is not in `config.TEMPLATES`.
    """
    _check_name(name)
    prefix, suffix = _PARTS[name]
    return f"{prefix}{question}{suffix}"


def stop_strings(name: str) -> tuple[str, ...]:
    """Strings that end a response, besides EOS. They stay in the response: trained on.

    Raises:
        ValueError: `name` is not in `config.TEMPLATES`.
    """
    _check_name(name)
    return _R1_STOP_STRINGS if name == "r1" else ()
