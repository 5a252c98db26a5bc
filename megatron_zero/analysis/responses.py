"""What responses say: phrases of self-reflection, and what a judge is asked about them.

Base models reflect before any reinforcement learning, and some answer without a template
(arXiv 2503.20783, section 2): both are counted here. Phrases alone find words, not thoughts, and a
judge alone is generous, so what both find is the number to trust.

The phrases and the judge's questions are in `questions.yaml`.
"""

import re
from pathlib import Path
from typing import Optional

from megatron_zero.strict_yaml import load_yaml

UNCLEAR = "unclear"  # a reply that names none of the labels, or more than one
REFUSED = "refused"  # a request that the endpoint would not take
QUESTIONS = load_yaml(Path(__file__).with_name("questions.yaml").read_text(), "questions.yaml")


def judge_messages(analysis: str, prompt: str, response: str) -> list[dict[str, str]]:
    """The chat that asks about one response; the same text gives the same chat.

    Args:
        analysis: `answering` or `self-reflection`.
        prompt: what the model was given, with its template.
        response: what it wrote next. Text that UTF-8 cannot carry is replaced.
    """
    system = QUESTIONS[analysis]["prompt"]
    user = f"<INPUT>\n{prompt}\n</INPUT>\n\n<OUTPUT>\n{response}\n</OUTPUT>"
    user = user.encode("utf-8", errors="replace").decode("utf-8")
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def verdict(analysis: str, reply: Optional[str]) -> str:
    """The label that a reply's first line names, in any case; else `UNCLEAR` or `REFUSED`.

    What a reasoning model thinks first, up to `</think>`, is not its reply.
    """
    if reply is None:
        return REFUSED
    line = reply.rsplit("</think>", 1)[-1].strip().partition("\n")[0]
    named = set(re.findall("[a-z]+", line.lower())) & set(QUESTIONS[analysis]["labels"])
    return named.pop() if len(named) == 1 else UNCLEAR


def marks(analysis: str, text: str, verdict: str = "") -> dict[str, int]:
    """What is found in a response, by name and in a fixed order; `all` is found in every one.

    Keywords count how often they stand there; `any keyword`, the judge's labels and `keyword and
    judge` are 0 or 1.

    Args:
        verdict: of the judge; "": none was asked.

    Example ("Wait, I made a mistake. Let me double-check.", without a judge):
        {"all": 1, "check again": 1, ..., "notice a mistake": 1, "exclaim": 1, "any keyword": 1}
    """
    found = {"all": 1}
    if analysis == "self-reflection":
        patterns = QUESTIONS["keywords"].items()
        found |= {name: len(re.findall(p, text, re.IGNORECASE)) for name, p in patterns}
        found["any keyword"] = int(sum(found.values()) > 1)
    if verdict:
        labels = [*QUESTIONS[analysis]["labels"], UNCLEAR, REFUSED]
        found |= {label: int(label == verdict) for label in labels}
        if analysis == "self-reflection":
            found["keyword and judge"] = found["any keyword"] * found["reflects"]
    return found
