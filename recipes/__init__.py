"""Recipes: functions that return a configuration. One function is one complete run.

megatron-zero train quickstart --nproc 2
megatron-zero train qwen2_5_math_7b --nproc 8 data.data_dir=/data optimizer.lr=5e-7
python -m recipes.launch ablation --executor local        # several runs, one experiment
"""

from collections.abc import Callable
from typing import Union

from megatron_zero.config import PretrainConfig, RunConfig
from recipes.large import deepseek_v3, qwen3_30b_a3b
from recipes.paper import (
    llama3_2_3b,
    llama3_2_3b_numina,
    llama3_2_3b_numina_pretrain,
    qwen2_5_7b,
    qwen2_5_math_1_5b,
    qwen2_5_math_1_5b_no_template,
    qwen2_5_math_1_5b_r1,
    qwen2_5_math_7b,
    qwen2_5_math_7b_80g,
)
from recipes.small import math_smoke, quickstart, quickstart_base
from recipes.studies import ABLATION, SWEEP
from recipes.studies import EXPERIMENTS as EXPERIMENTS

_SINGLE: "list[Callable[[], Union[RunConfig, PretrainConfig]]]" = [
    quickstart_base,
    quickstart,
    math_smoke,
    qwen2_5_math_7b,
    qwen2_5_math_7b_80g,
    qwen2_5_math_1_5b,
    qwen2_5_math_1_5b_r1,
    qwen2_5_math_1_5b_no_template,
    qwen2_5_7b,
    llama3_2_3b,
    llama3_2_3b_numina_pretrain,
    llama3_2_3b_numina,
    qwen3_30b_a3b,
    deepseek_v3,
]

RECIPES: "dict[str, Callable[[], Union[RunConfig, PretrainConfig]]]" = {
    **{recipe.__name__: recipe for recipe in _SINGLE},
    **ABLATION,
    **SWEEP,
}
