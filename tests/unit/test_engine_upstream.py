"""What the engine is told of a model: no engine is started."""

import pytest

from megatron_zero.convert.families import family_for
from megatron_zero.rollout.upstream import config_overrides
from tests import families

DEEPSEEK = {"model_type": "deepseek_v2", "kv_lora_rank": 512, "qk_rope_head_dim": 64}


@pytest.mark.parametrize("name", [n for n in families.FAMILIES if not n.startswith("deepseek")])
def test_other_families_are_read_alike(name: str) -> None:
    assert config_overrides(families.config_of(name)) == {}


def test_deepseek_v3_as_transformers_writes_it_is_routed_by_a_biased_sigmoid() -> None:
    config = families.config_of("deepseek_v3")
    assert "topk_method" not in config and "scoring_func" not in config
    overrides = config_overrides(config)
    assert overrides == {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    # a run's model folder and its exports have them, for other programs that start vLLM
    assert family_for(config).defaults.items() >= overrides.items()


def test_greedy_choice_of_experts_knows_no_groups() -> None:
    one_group = {"n_group": 1, "topk_group": 1}
    for config in (DEEPSEEK, DEEPSEEK | {"topk_method": "greedy", "n_group": 4, "topk_group": 2}):
        assert config_overrides(config) == one_group
    assert config_overrides(DEEPSEEK | {"topk_method": "group_limited_greedy"}) == {}
