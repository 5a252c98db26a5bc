"""Prompt templates: what a model reads in front of its first token.

The texts are in `templates.toml`. Those of the reference are byte-equal to its strings, because a
base model's behaviour before any training depends on them, and a published model's on the one that
it was trained with. Names are `config.TEMPLATES`. Importing it needs the standard library only.

`qwen_math` is the chat format that Qwen2.5-Math was trained on; `r1` asks for reasoning and answer
in tags and opens the first one; `no` is the bare question; `arithmetic` ends the question's line,
which is where the worked solutions of `data.arithmetic` begin. `open_reasoner_zero`, `prime_zero`,
`r1_distill_qwen` and `qwen3` are those models' own; `llama_instruct` is whatever chat template the
tokenizer brings. `few_shot` puts worked problems in front: the prompting baseline.
"""

import functools
import tomllib
from pathlib import Path
from typing import Any

from megatron_zero.config import TEMPLATES, fail
from megatron_zero.data.answers import check_text
from megatron_zero.data.tables import open_table

HERE = Path(__file__).parent
_TEMPLATES = tomllib.loads((HERE / "templates.toml").read_text(encoding="utf-8"))


def _template(name: str) -> dict[str, Any]:
    if name not in TEMPLATES:
        fail("data.template", name, f"must be one of {', '.join(TEMPLATES)}")
    return _TEMPLATES[name]


def apply_template(name: str, question: str, tokenizer: Any = None, few_shot: str = "") -> str:
    """The text the model continues.

    Example:
        apply_template("arithmetic", "What is 12+34?") == "What is 12+34?\\n"

    Args:
        name: one of `config.TEMPLATES`.
        question: put in verbatim.
        tokenizer: whose chat template `llama_instruct` applies.
        few_shot: for `few_shot`: a file with columns `problem` and `solution`; "": the built-in.

    Raises:
        ValueError: `name` is not in `config.TEMPLATES`; no chat template; no such file or column.
    """
    parts = _template(name)
    text = f"{parts['prefix']}{question}{parts['suffix']}"
    if name == "few_shot":
        return _worked_problems(few_shot) + text
    if name != "llama_instruct":
        return text
    if tokenizer is None or not tokenizer.chat_template:
        fail("data.template", name, "needs a tokenizer that has a chat template")
    turns = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def check_few_shot(few_shot: str) -> None:
    """Read `data.few_shot` ("": the built-in worked problems).

    Raises:
        ValueError: no such file or column, or a value that is not text.
    """
    _worked_problems(few_shot)


@functools.cache
def _worked_problems(few_shot: str) -> str:
    path = Path(few_shot).expanduser() if few_shot else HERE / "few_shot.jsonl"
    table = open_table(path, "train", "data.few_shot")
    columns = [table.values(name, "data.few_shot") for name in ("problem", "solution")]
    parts = _template("few_shot")
    text = ""
    for row, (problem, solution) in enumerate(zip(*columns, strict=True)):
        for name, value in (("problem", problem), ("solution", solution)):
            if not isinstance(value, str) or not value.strip():
                valid = f"{table.place(row)}: its {name} is {value!r}, not a text"
                fail("data.few_shot", few_shot, valid)
            check_text(value, "data.few_shot", few_shot, table.place(row))
        text += f"{parts['prefix']}{problem}{parts['suffix']}{solution}\n\n"
    return text


def stop_strings(name: str) -> tuple[str, ...]:
    """Strings that end a response, besides `stop_tokens`. They stay in the response: trained on.

    Raises:
        ValueError: `name` is not in `config.TEMPLATES`.
    """
    return tuple(_template(name)["stop"])
