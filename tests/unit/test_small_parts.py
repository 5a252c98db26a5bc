"""Small pure parts of the loop: seeds, metrics of a rollout, the mismatch bound, layouts."""

import itertools
from typing import Any

import pytest

from megatron_zero.analysis.rollout_stats import rollout_metrics
from megatron_zero.config import (
    BatchConfig,
    DataConfig,
    DocumentsConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PretrainConfig,
    RolloutConfig,
    RunConfig,
    replace,
)
from megatron_zero.determinism import derive_seed, sample_seed
from megatron_zero.layout import CPU_HEAD_DIMS, check_cpu_engine, check_engine_layout, check_layout
from megatron_zero.rewards.base import apply_truncation
from megatron_zero.train import check_mismatch
from megatron_zero.types import Graded, Prompt, Response, RolloutGroup
from tests import families, tiny


def test_seeds_differ_in_every_part_and_stay_what_they_are() -> None:
    parts = itertools.product(range(3), range(3), range(3), range(3), range(3))
    assert len({sample_seed(*p) for p in parts}) == 3**5
    assert sample_seed(1, 23, 4, 5, 6) != sample_seed(12, 3, 4, 5, 6)
    # pinned: another value would make a resumed run draw other responses
    assert derive_seed(0, "rollout", 12, 7, 3) == 4142237778250798602


def graded(reward: float, *, outcome: str = "wrong") -> Graded:
    return Graded(reward=reward, correct=reward > 0, formatted=True, outcome=outcome)


def test_rollout_metrics_by_hand() -> None:
    def response(length: int, truncated: bool = False) -> Response:
        return Response(
            token_ids=(1,) * length,
            rollout_logprobs=(-1.0,) * length,
            text="",
            truncated=truncated,
            policy_version=0,
        )

    prompt = Prompt(index=0, text="", token_ids=(1, 2, 3), answers=("",))
    groups = [
        RolloutGroup(prompt=prompt, responses=(response(2), response(4))),
        RolloutGroup(prompt=prompt, responses=(response(6), response(10, truncated=True))),
    ]
    right = graded(1.0, outcome="correct")
    verdicts = [
        [right, graded(0.0)],
        [graded(0.0, outcome="timeout"), apply_truncation(right, True)],
    ]
    assert "response/length_truncated" not in rollout_metrics(groups[:1], verdicts[:1], [True])
    metrics = rollout_metrics(groups, verdicts, [True, False])
    assert metrics["reward/mean"] == 0.25  # the truncated one is worth nothing
    assert metrics["reward/correct_frac"] == 0.5  # but was correct
    assert metrics["reward/no_signal_frac"] == 0.5
    assert metrics["response/length_mean"] == 5.5 and metrics["response/length_max"] == 10
    assert metrics["response/length_correct"] == 6 and metrics["response/length_wrong"] == 5
    assert metrics["response/truncated_frac"] == 0.25
    assert metrics["response/length_truncated"] == 10
    assert metrics["outcome/timeout_frac"] == 0.25 and metrics["outcome/crash_frac"] == 0


def test_the_mismatch_bound_holds_at_the_bound_and_for_nan() -> None:
    differences = {"mismatch/mean_abs": 2e-7, "mismatch/max_abs": 0.1}
    check_mismatch({"mismatch/kl": 0.01, **differences}, 0.01, step=3)
    for kl in (0.0100001, float("nan"), float("inf")):
        with pytest.raises(RuntimeError, match=r"step 3: .*mismatch\.max_kl=0\.01") as error:
            check_mismatch({"mismatch/kl": kl, **differences}, 0.01, step=3)
        # one token of many: what turned a router's choice, not wrong weights
        assert "difference of a logprob: mean 2e-07, largest 0.1" in str(error.value)
        assert "a router whose choice of experts rounding has turned" in str(error.value)


def run_config(**parallel: int) -> RunConfig:
    return RunConfig(name="x", model=ModelConfig(path="x"), parallel=ParallelConfig(**parallel))


TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"


@pytest.mark.parametrize(
    ("parallel", "world", "message"),
    [
        ({TP: 3}, 4, r"tensor_model_parallel_size \* .*=3: must divide the number of processes=4"),
        ({TP: 8}, 8, r"parallel\.tensor_model_parallel_size=8: .*attention heads=4"),
        ({PP: 8}, 8, r"parallel\.pipeline_model_parallel_size=8: must divide the model's layers=4"),
        ({}, 3, r"batch\.global_batch_size=128: must be a multiple of the data-parallel size, 3"),
        ({}, 2, r"data\.max_prompt_tokens \+ .*=4024: .*max_position_embeddings=512"),
    ],
)
def test_impossible_layouts_are_refused_with_the_numbers(parallel, world, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_layout(run_config(**parallel), tiny.hf_config(tied=True), world)


@pytest.mark.parametrize(
    ("max_positions", "factor", "message"),
    [
        (4096, 1.0, ""),
        (8192, 2.0, ""),
        (2048, 1.0, r"=4024: must be at most the model's max_position_embeddings=2048$"),
        (2048, 4.0, r"max_position_embeddings=2048 \(which config.json may raise to 8192, as YaRN"),
        (8192, 1.5, r"at most the model's original_max_position_embeddings \* factor=3072 of YaRN"),
        (8192, "4", ""),  # wrong, which the family's table says
    ],
)
@pytest.mark.parametrize("block", ["rope_parameters", "rope_scaling"])
def test_yarn_bounds_a_sequence(block: str, max_positions: int, factor: Any, message: str) -> None:
    yarn = {"rope_type": "yarn", "original_max_position_embeddings": 2048, "factor": factor}
    if factor == 1.0:
        yarn["original_max_position_embeddings"] = max_positions
    hf_config = tiny.hf_config(tied=True, max_position_embeddings=max_positions)
    hf_config[block] = yarn
    if message:
        with pytest.raises(ValueError, match=message):
            check_layout(run_config(), hf_config, 1)
    else:
        check_layout(run_config(), hf_config, 1)


def test_a_balance_of_experts_needs_experts() -> None:
    config = replace(run_config(), loss=LossConfig(balance_coef=0.1))
    hf_config = tiny.hf_config(tied=True, max_position_embeddings=8192)
    with pytest.raises(ValueError, match=r"loss\.balance_coef=0\.1: .* has no experts"):
        check_layout(config, hf_config, 1)
    check_layout(config, {**hf_config, "num_experts": 4}, 1)


def test_more_layouts() -> None:
    hf_config = tiny.hf_config(tied=True, max_position_embeddings=8192)
    for tp, pp, world in ((1, 1, 1), (2, 2, 8), (4, 1, 4), (1, 4, 8)):
        check_layout(run_config(**{TP: tp, PP: pp}), hf_config, world)
    engine = RunConfig(
        name="x",
        model=ModelConfig(path="x"),
        rollout=RolloutConfig(tensor_model_parallel_size=4),
        batch=BatchConfig(global_batch_size=1024),
    )
    with pytest.raises(ValueError, match=r"rollout\.tensor_model_parallel_size=4: must divide"):
        check_layout(engine, hf_config, 2)
    pretrain = PretrainConfig(
        name="x", model=ModelConfig(path="x"), documents=DocumentsConfig(sequences_per_step=3)
    )
    with pytest.raises(ValueError, match=r"documents\.sequences_per_step=3: must be a multiple"):
        check_layout(pretrain, hf_config, 2)
    with pytest.raises(ValueError, match=r"intermediate_size=130"):
        check_layout(run_config(**{TP: 4}), {**hf_config, "intermediate_size": 130}, 4)


@pytest.mark.parametrize(
    ("tp_size", "changes", "message"),
    [
        (2, {}, ""),
        (4, {"num_key_value_heads": 2}, ""),  # each KV head on two ranks
        (4, {"num_attention_heads": 12, "num_key_value_heads": 6}, "must divide, .* 6 KV heads"),
        (4, {"intermediate_size": 130}, "must divide the model's intermediate_size=130"),
        (4, {"moe_intermediate_size": 50}, "must divide the model's moe_intermediate_size=50"),
        (8, {}, "must divide the model's attention heads=4"),
        (16, {}, "must divide the number of processes=8"),
    ],
)
def test_engines_that_cannot_cut_the_model_are_refused(tp_size, changes, message) -> None:
    """vLLM says it by an assertion, after it has started."""
    hf_config = tiny.hf_config(tied=True, **changes)
    rollout = RolloutConfig(tensor_model_parallel_size=tp_size)
    if not message:
        check_engine_layout(rollout, hf_config, 8, 8)
        return
    path = rf"^rollout\.tensor_model_parallel_size={tp_size}: "
    with pytest.raises(ValueError, match=path + message):
        check_engine_layout(rollout, hf_config, 8, 8)


def test_models_that_the_engine_has_no_attention_for_on_a_cpu() -> None:
    model = ModelConfig(path="m")
    for size in CPU_HEAD_DIMS:
        check_cpu_engine(model, tiny.hf_config(tied=True, head_dim=size))
    sizes = "32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512"
    only = f"on a CPU vLLM's attention has only heads of {sizes}"
    for changes, size in (({"head_dim": 40}, 40), ({"hidden_size": 64, "head_dim": None}, 16)):
        with pytest.raises(ValueError) as refused:
            check_cpu_engine(model, tiny.hf_config(tied=True, **changes))
        assert str(refused.value) == f"model.path='m': head_dim={size}: {only}"
    made = ModelConfig(init="random", tokenizer="characters")
    with pytest.raises(ValueError) as refused:
        check_cpu_engine(made, tiny.hf_config(tied=True, hidden_size=576))
    setting = "model.architecture.hidden_size / num_attention_heads"
    assert str(refused.value) == f"{setting}=144: {only}"
    latent = families.config_of("deepseek_v3", kv_lora_rank=512, qk_rope_head_dim=64)
    check_cpu_engine(model, latent)
    for name, size in (("kv_lora_rank", 256), ("qk_rope_head_dim", 32)):
        with pytest.raises(ValueError) as refused:
            check_cpu_engine(model, {**latent, name: size})
        only = f"on a CPU vLLM's latent attention has only {latent[name]}"
        assert str(refused.value) == f"model.path='m': {name}={size}: {only}"


def test_a_token_budget_holds_the_longest_sample_as_the_layout_pads_it() -> None:
    """Otherwise a run would stop at the first long response."""
    layout = ParallelConfig(context_parallel_size=2, **{TP: 2}, sequence_parallel=True)
    assert layout.sequence_alignment == 8

    def run(max_tokens: int) -> RunConfig:
        return RunConfig(
            name="x",
            model=ModelConfig(path="x"),
            parallel=layout,
            data=DataConfig(max_prompt_tokens=20),
            rollout=RolloutConfig(max_response_tokens=30),  # 49 positions, padded to 56
            batch=BatchConfig(max_tokens_per_microbatch=max_tokens),
        )

    assert run(56).batch.max_tokens_per_microbatch == 56
    with pytest.raises(ValueError, match=r"max_tokens_per_microbatch=55: .* layout = 56"):
        run(55)
    documents = DocumentsConfig(sequence_length=50)
    model = ModelConfig(path="x")

    def pretrain(max_tokens: int) -> PretrainConfig:
        return PretrainConfig(
            name="x",
            model=model,
            parallel=layout,
            documents=documents,
            max_tokens_per_microbatch=max_tokens,
        )

    assert pretrain(56).max_tokens_per_microbatch == 56
    with pytest.raises(ValueError, match=r"max_tokens_per_microbatch=55: .* layout: 56"):
        pretrain(55)


def test_an_optimizer_in_fewer_bytes_or_offloaded_needs_its_kind_of_run() -> None:
    def run(dtype: str, *, distributed: bool = True, **optimizer) -> RunConfig:
        return RunConfig(
            name="x",
            model=ModelConfig(path="x", dtype=dtype),
            parallel=ParallelConfig(use_distributed_optimizer=distributed),
            optimizer=OptimizerConfig(**optimizer),
        )

    assert run("bf16", exp_avg_dtype="bf16").optimizer.reduced_dtypes == {"exp_avg_dtype": "bf16"}
    assert run("bf16", offload=True).optimizer.reduced_dtypes == {}
    with pytest.raises(ValueError, match=r"optimizer\.offload=True: needs model\.dtype='bf16'"):
        run("fp32", offload=True)
    for dtype, distributed in (("fp32", True), ("bf16", False)):
        with pytest.raises(ValueError, match=r"optimizer\.exp_avg_sq_dtype='fp8': needs"):
            run(dtype, distributed=distributed, exp_avg_sq_dtype="fp8")
    with pytest.raises(ValueError, match=r"main_params_dtype='bf16': must be one of fp32, fp16"):
        OptimizerConfig(main_params_dtype="bf16")
