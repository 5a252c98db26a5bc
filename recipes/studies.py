"""Several runs that are one question: arms of an ablation, cells of a sweep, stages in a row.

Each arm is a recipe of its own; `EXPERIMENTS` names those that belong together, and
`python -m recipes.launch <experiment>` runs them as one nemo-run experiment.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from megatron_zero.config import AdvantageConfig, LossConfig, RunConfig, replace
from recipes.paper import llama3_2_3b_numina, llama3_2_3b_numina_pretrain, paper_run

TEMPLATES = ["r1", "qwen_math", "no"]
QUESTION_SETS = ["orz_57k", "math_12k", "gsm8k", "asdiv"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """Recipes by name; `sequential` when each needs what the one before it left."""

    recipes: "list[str]"
    sequential: bool = False


def ablation(*, normalize_std: bool, length_normalizer: str) -> RunConfig:
    """One arm of GRPO against Dr. GRPO: Qwen2.5-1.5B, MATH, r1 template, 8 x A100-40G.

    Source: the paper's comparison of both objectives, and the arms between them that its readers
    asked for (the reference's issue 6): the advantage divided by the group's standard deviation or
    not, each response divided by its own length or by a constant. Expected: the same accuracy,
    but with division by the own length wrong answers grow longer; Dr. GRPO's stay short. The effect
    of one bias alone: not stated. 1,875 steps are 20 epochs of prompts.
    """
    std, length = "std" if normalize_std else "nostd", length_normalizer
    config = paper_run(
        name=f"ablation_{std}_{length}",
        path="Qwen/Qwen2.5-1.5B",
        dataset="math_12k",
        template="r1",
        num_steps=1875,
    )
    return replace(
        config,
        advantage=AdvantageConfig(normalize_std=normalize_std),
        loss=LossConfig(length_normalizer=length_normalizer),
    )


def sweep(*, template: str, question_set: str) -> RunConfig:
    """One cell of template x question set: Qwen2.5-Math-1.5B, Dr. GRPO, 8 x A100-40G.

    Source: the paper's study of templates and question sets. Expected: with r1, which does not fit
    the model, the larger and closer question sets end higher; with qwen_math, GSM8K alone
    brings out about as much as MATH (the paper's finding 4). Which cells without a template were
    trained, and for how long: not stated; 1,000 steps are chosen here, the same for every set.
    """
    return paper_run(
        name=f"sweep_{template}_{question_set}",
        path="Qwen/Qwen2.5-Math-1.5B",
        dataset=question_set,
        template=template,
        num_steps=1000,
    )


def _named(arms: "list[Callable[[], RunConfig]]") -> "dict[str, Callable[[], RunConfig]]":
    return {arm().name: arm for arm in arms}


ABLATION = _named(
    [
        partial(ablation, normalize_std=std, length_normalizer=length)
        for std in (True, False)
        for length in ("response", "constant")
    ]
)
SWEEP = _named(
    [
        partial(sweep, template=template, question_set=question_set)
        for template in TEMPLATES
        for question_set in QUESTION_SETS
    ]
)

EXPERIMENTS = {
    "ablation": Experiment(recipes=list(ABLATION)),
    "template_sweep": Experiment(recipes=list(SWEEP)),
    "llama3_2_3b_two_stages": Experiment(
        recipes=[llama3_2_3b_numina_pretrain.__name__, llama3_2_3b_numina.__name__], sequential=True
    ),
}
