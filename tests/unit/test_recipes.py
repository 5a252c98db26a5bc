"""Every recipe is valid for its hardware, fits its memory, and says where it comes from."""

import math
import re

import pytest

from megatron_zero.config import RolloutConfig, RunConfig, replace
from megatron_zero.convert.families import mapping_for
from megatron_zero.hf_config import read_hf_config
from megatron_zero.launch_args import node_size
from megatron_zero.layout import check_layout
from recipes import EXPERIMENTS, RECIPES
from recipes.hardware import MODELS, hardware_of
from recipes.memory import count_parameters, memory_of

CONTEXT_GIB = 3  # CUDA's and NCCL's own, and what is in flight in a weight sync
ON_GPUS = [name for name in RECIPES if hardware_of(name).memory_gib]


def sizes_of(name: str) -> dict:
    """The recipe's `config.json`, from the table where it would come from the hub."""
    model = RECIPES[name]().model
    if model.path in MODELS:
        return MODELS[model.path]
    if model.path.startswith("runs/quickstart_base/"):
        return read_hf_config(RECIPES["quickstart_base"]().model)
    return read_hf_config(model)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_valid_on_its_hardware(name: str) -> None:
    config, hardware = RECIPES[name](), hardware_of(name)
    assert config.name == name
    check_layout(config, sizes_of(name), hardware.num_processes, hardware.gpus_per_node)


@pytest.mark.parametrize("name", ON_GPUS)
def test_a_recipe_fits_its_gpus(name: str) -> None:
    hardware, config = hardware_of(name), RECIPES[name]()
    memory = memory_of(
        config, sizes_of(name), num_processes=hardware.num_processes, gpu_gib=hardware.memory_gib
    )
    assert memory.total + CONTEXT_GIB <= hardware.memory_gib
    if isinstance(config, RunConfig):
        assert memory.engine >= 1.15 * memory.engine_weights  # what is left is the cache


def test_the_arithmetic_refuses_what_does_not_fit() -> None:
    """The 7B run at TP 2 on 40 GB cards: the reason for its layout."""
    config = RECIPES["qwen2_5_math_7b_80g"]()
    memory = memory_of(config, MODELS[config.model.path], num_processes=8, gpu_gib=39.4)
    assert memory.total > 39.4 and memory.engine < memory.engine_weights
    assert memory.policy == pytest.approx(31.9, abs=0.05)


@pytest.mark.parametrize("path", MODELS)
def test_parameters_are_counted_as_the_conversion_tables_have_them(path: str) -> None:
    mapping = mapping_for(MODELS[path], with_mtp=False)
    counts = count_parameters(MODELS[path])
    total = sum(math.prod(mapping.hf_shape(name)) for name in mapping.hf_names())
    assert counts.total == total
    experts = sum(
        math.prod(mapping.hf_shape(name)) for name in mapping.hf_names() if ".experts." in name
    )
    assert sum(counts.experts) == experts


@pytest.mark.parametrize("name", ["qwen3_30b_a3b", "deepseek_v3"])
def test_a_docstring_states_the_computed_memory(name: str) -> None:
    config, hardware = RECIPES[name](), hardware_of(name)
    counts = count_parameters(sizes_of(name))
    memory = memory_of(
        config, sizes_of(name), num_processes=hardware.num_processes, gpu_gib=hardware.memory_gib
    )
    stated = set(re.findall(r"\d+(?:\.\d+)?", RECIPES[name].__doc__.replace(",", "")))
    assert f"{hardware.nodes} nodes of {hardware.gpus_per_node} x" in RECIPES[name].__doc__
    for value in (
        memory.weights,
        memory.gradients,
        memory.optimizer,
        memory.policy,
        memory.engine_weights,
        memory.engine,
        memory.total,
    ):
        assert f"{value:.1f}" in stated, value
    assert {f"{counts.total / 1e9:.1f}", f"{counts.total / 1e9:.0f}"} & stated
    assert {f"{sum(counts.experts) / 1e9:.1f}", f"{sum(counts.experts) / 1e9:.0f}"} & stated


def test_pipeline_stages_and_replicas_are_counted() -> None:
    """One formula against another: the parts of all ranks are the model, its optimizer once."""
    config, sizes = RECIPES["qwen2_5_math_7b_80g"](), MODELS["Qwen/Qwen2.5-Math-7B"]
    total = count_parameters(sizes).total
    parallel = replace(config.parallel, pipeline_model_parallel_size=2)
    cut = memory_of(
        replace(config, parallel=parallel), sizes, num_processes=8, gpu_gib=80
    )  # TP 2, PP 2, DP 2
    assert 1.0 <= cut.weights * 4 * 1024**3 / (2 * total) < 1.1  # the last stage has the output
    assert 1.0 <= cut.optimizer * 8 * 1024**3 / (12 * total) < 1.1
    whole = replace(config.parallel, use_distributed_optimizer=False)
    copied = memory_of(replace(config, parallel=whole), sizes, num_processes=8, gpu_gib=80)
    assert copied.optimizer == pytest.approx(6 * copied.weights)


def test_recipes_name_source_and_expected_result() -> None:
    for name, recipe in RECIPES.items():
        if not hardware_of(name).memory_gib:
            continue
        doc = (getattr(recipe, "func", recipe)).__doc__
        assert "ource" in doc and "xpected" in doc, name


def test_the_ablation_is_two_settings() -> None:
    arms = [RECIPES[name]() for name in EXPERIMENTS["ablation"].recipes]
    settings = {(a.advantage.normalize_std, a.loss.length_normalizer) for a in arms}
    assert settings == {(s, n) for s in (True, False) for n in ("response", "constant")}
    same = {
        replace(a, name="x", advantage=arms[0].advantage, loss=arms[0].loss).__repr__()
        for a in arms
    }
    assert len(same) == 1
    assert all(name in RECIPES for e in EXPERIMENTS.values() for name in e.recipes)
    assert len(EXPERIMENTS["template_sweep"].recipes) == 12


def test_the_second_stage_starts_where_the_first_one_ends() -> None:
    first, second = (RECIPES[n]() for n in EXPERIMENTS["llama3_2_3b_two_stages"].recipes)
    assert second.model.path == f"{first.run_dir}/hf/step_{first.num_steps:06d}"


def test_an_engine_does_not_leave_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RECIPES["qwen2_5_math_7b_80g"]()
    config = replace(config, rollout=RolloutConfig(tensor_model_parallel_size=4))
    sizes = MODELS["Qwen/Qwen2.5-Math-7B"]
    check_layout(config, sizes, 16, 8)
    message = r"rollout\.tensor_model_parallel_size=4: must divide the processes of a node.*=2"
    with pytest.raises(ValueError, match=message):
        check_layout(config, sizes, 8, 2)
    job = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
    for name, value in {**job, "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert node_size() == 2
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert node_size() == 8
