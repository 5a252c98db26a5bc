"""What the engine is told of a model, and which models it is not given: no engine is started."""

import pytest

from megatron_zero.convert.families import family_for
from megatron_zero.rollout.upstream import check_cpu_engine, check_positions, config_overrides
from tests import families

DEEPSEEK = {"model_type": "deepseek_v2", "kv_lora_rank": 512, "qk_rope_head_dim": 64}


@pytest.mark.parametrize("name", [n for n in families.FAMILIES if not n.startswith("deepseek")])
def test_other_families_are_read_alike(name: str) -> None:
    config = families.config_of(name)
    assert config_overrides(config) == {}
    check_cpu_engine(config)


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


def test_latent_attention_of_another_size_is_refused_on_a_cpu() -> None:
    check_cpu_engine(DEEPSEEK)
    sizes = r"on a CPU vLLM has latent attention for kv_lora_rank=512 and qk_rope_head_dim=64 only"
    with pytest.raises(ValueError, match=rf"^kv_lora_rank=40: {sizes}"):
        check_cpu_engine(DEEPSEEK | {"kv_lora_rank": 40, "qk_rope_head_dim": 8})
    with pytest.raises(ValueError, match=rf"^qk_rope_head_dim=32: {sizes}"):
        check_cpu_engine(DEEPSEEK | {"qk_rope_head_dim": 32})


@pytest.mark.parametrize("kind", ["rope_type", "type"])
@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
def test_sequences_beyond_the_angles_of_yarn_are_refused(field: str, kind: str) -> None:
    rope = {kind: "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    check_positions({field: rope}, 64)
    with pytest.raises(ValueError, match=r"^rope_parameters\.factor=4\.0: .* has 64 positions"):
        check_positions({field: rope}, 65)
    check_positions({field: rope | {kind: "default"}}, 65)
    check_positions({field: None}, 65)
