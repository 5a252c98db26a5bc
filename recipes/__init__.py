"""Recipes: functions that return a configuration. One function is one complete run.

megatron-zero train quickstart --nproc 2
megatron-zero train qwen2_5_math_7b --nproc 8 data.data_dir=/data optimizer.lr=5e-7
"""

from collections.abc import Callable
from typing import Union

from megatron_zero.config import PretrainConfig, RunConfig
from recipes.paper import qwen2_5_math_1_5b, qwen2_5_math_7b
from recipes.small import math_smoke, quickstart, quickstart_base

RECIPES: "dict[str, Callable[[], Union[RunConfig, PretrainConfig]]]" = {
    recipe.__name__: recipe
    for recipe in (quickstart_base, quickstart, math_smoke, qwen2_5_math_1_5b, qwen2_5_math_7b)
}
