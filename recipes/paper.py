"""The paper's runs (arXiv 2503.20783): R1-Zero-like training with Dr. GRPO on 8 x A100.

Numbers are those of the published scripts; what differs is named where it does, and what neither
the paper nor the scripts say is called "not stated". Every run is 1,024 responses (128 prompts x 8)
in 8 optimizer steps on one set of old logprobs. `recipes.hardware` has each recipe's GPUs.
"""

from megatron_zero.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    DocumentsConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PretrainConfig,
    RolloutConfig,
    RunConfig,
    replace,
)
from megatron_zero.step_names import step_name

BENCHMARKS = ["aime", "amc", "math", "minerva", "olympiad_bench"]


def paper_run(
    *,
    name: str,
    path: str,
    dataset: str,
    template: str,
    num_steps: int,
    tensor_model_parallel_size: int = 1,
    engine_tensor_model_parallel_size: int = 1,
) -> RunConfig:
    """What all of the paper's runs have in common."""
    return RunConfig(
        name=name,
        num_steps=num_steps,
        model=ModelConfig(path=path, dtype="bf16"),
        data=DataConfig(dataset=dataset, template=template, max_prompt_tokens=1024),
        rollout=RolloutConfig(
            num_prompts_per_step=128,
            group_size=8,
            max_response_tokens=3000,
            temperature=1.0,
            tensor_model_parallel_size=engine_tensor_model_parallel_size,
            gpu_memory_utilization=0.35,
        ),
        batch=BatchConfig(global_batch_size=128, max_tokens_per_microbatch=16384),
        parallel=ParallelConfig(
            tensor_model_parallel_size=tensor_model_parallel_size,
            sequence_parallel=tensor_model_parallel_size > 1,
            recompute="full",
        ),
        # The published "constant" schedule has no warm-up, whatever its warm-up ratio says.
        optimizer=OptimizerConfig(
            lr=1e-6, lr_schedule="constant", beta1=0.9, beta2=0.95, weight_decay=0.0, clip_grad=1.0
        ),
        evaluation=EvaluationConfig(datasets=BENCHMARKS, every_num_steps=16, temperature=0.0),
        # The published script saves nothing at all; a 27-hour run should leave a model behind.
        checkpoint=CheckpointConfig(every_num_steps=16, keep=2, save_hf=True),
        logging=LoggingConfig(rollouts_every_num_steps=16),
    )


def qwen2_5_math_7b() -> RunConfig:
    """Qwen2.5-Math-7B on MATH levels 3 to 5, qwen_math template, 8 x A100-40G: the headline run.

    Source: the paper's 7B script and its README; 20 epochs of 8,523 problems are 1,331 steps.
    Expected: 43.3 % on AIME 2024 (greedy, 3,000 tokens) after 27 hours on 8 x A100; the reference
    has since been reported at 30.0 % with a newer vLLM (its issue 35), and one problem of 30 is
    3.3 points, so average several samples before drawing conclusions. Layout: TP 4 x DP 2 with
    engines of TP 2. At TP 2 the policy alone takes 32 GiB, and an engine of one GPU has no room for
    a cache beside 14 GiB of weights: `recipes.memory` has the arithmetic, a test the bound.
    """
    return paper_run(
        name="qwen2_5_math_7b",
        path="Qwen/Qwen2.5-Math-7B",
        dataset="math_lvl3to5_8k",
        template="qwen_math",
        num_steps=1331,
        tensor_model_parallel_size=4,
        engine_tensor_model_parallel_size=2,
    )


def qwen2_5_math_7b_80g() -> RunConfig:
    """`qwen2_5_math_7b` on 8 x A100-80G: the same run, TP 2 x DP 4 and an engine on every GPU.

    Source and expected result are those of `qwen2_5_math_7b`; its layout alone is another, which
    changes no number beyond rounding. Time on 80 GB cards: not stated.
    """
    return paper_run(
        name="qwen2_5_math_7b_80g",
        path="Qwen/Qwen2.5-Math-7B",
        dataset="math_lvl3to5_8k",
        template="qwen_math",
        num_steps=1331,
        tensor_model_parallel_size=2,
    )


def qwen2_5_math_1_5b() -> RunConfig:
    """Qwen2.5-Math-1.5B on the 12,000 MATH problems, qwen_math template, 8 x A100-40G.

    Source: the README's 1.5B command with the template that the model was trained on; 20 epochs of
    prompts are 1,875 steps. Expected: not stated for this script by itself; the paper's figure on
    templates has this template improving from the first step, where r1 first has to recover.
    """
    return _math_1_5b("qwen2_5_math_1_5b", "qwen_math")


def qwen2_5_math_1_5b_r1() -> RunConfig:
    """Qwen2.5-Math-1.5B on the 12,000 MATH problems with the r1 template, 8 x A100-40G.

    Source: the README's command as it stands. Expected: the template does not match the model, so
    accuracy starts far below the other two templates' and is rebuilt by training, which makes the
    gain look larger than it is (the paper's finding on templates); final numbers not stated.
    """
    return _math_1_5b("qwen2_5_math_1_5b_r1", "r1")


def qwen2_5_math_1_5b_no_template() -> RunConfig:
    """Qwen2.5-Math-1.5B on the 12,000 MATH problems without a template, 8 x A100-40G.

    Source: the README's command with `--prompt_template no`. Expected: the base model answers the
    bare question best of all three (about 60 % above 4-shot prompting on average, the paper's
    finding on Qwen2.5 base models), so training starts highest; final numbers not stated.
    """
    return _math_1_5b("qwen2_5_math_1_5b_no_template", "no")


def _math_1_5b(name: str, template: str) -> RunConfig:
    return paper_run(
        name=name,
        path="Qwen/Qwen2.5-Math-1.5B",
        dataset="math_12k",
        template=template,
        num_steps=1875,
    )


def qwen2_5_7b() -> RunConfig:
    """Qwen2.5-7B on Big-Math (verified), r1 template, 8 x A100-40G.

    Source: the reference's qwen2.5-7b script, which has no end (999 epochs): 1,000 steps are chosen
    here. Expected: not stated; the script was written to check somebody else's report. Layout as
    `qwen2_5_math_7b`, whose sizes it shares.
    """
    config = paper_run(
        name="qwen2_5_7b",
        path="Qwen/Qwen2.5-7B",
        dataset="all@open-r1/Big-Math-RL-Verified-Processed",
        template="r1",
        num_steps=1000,
        tensor_model_parallel_size=4,
        engine_tensor_model_parallel_size=2,
    )
    return replace(config, data=replace(config.data, prompt_key="prompt", answer_key="solution"))


def llama3_2_3b() -> RunConfig:
    """Llama-3.2-3B on the 12,000 MATH problems, r1 template, 8 x A100-40G, no domain pretraining.

    Source: the reference's Llama script with the plain base model in its place. Expected: it learns
    little; the paper's point is that domain pretraining raises this ceiling (compare
    `llama3_2_3b_numina`). Final numbers not stated.
    """
    return _llama("llama3_2_3b", "meta-llama/Llama-3.2-3B")


def llama3_2_3b_numina_pretrain() -> PretrainConfig:
    """First of two stages: Llama-3.2-3B (FineMath) reads NuminaMath's questions with answers.

    Source: the paper's domain pretraining, learning rate 1e-5 for 2 epochs of joined questions and
    answers; schedule, batch and sequence length not stated and chosen here. Put NuminaMath-1.5 in
    a parquet file or folder, `documents.source=`; 860 steps of 512 x 2,048 tokens are two epochs of
    450 M tokens, an estimate: the run's first lines say how many sequences your file has, divide by
    512. Expected: not stated.
    """
    return PretrainConfig(
        name="llama3_2_3b_numina_pretrain",
        num_steps=860,
        model=ModelConfig(path="HuggingFaceTB/FineMath-Llama-3B", dtype="bf16"),
        documents=DocumentsConfig(
            source="numinamath_1_5",
            text_key="problem+solution",
            sequence_length=2048,
            sequences_per_step=512,
        ),
        max_tokens_per_microbatch=16384,
        parallel=ParallelConfig(recompute="full"),
        optimizer=OptimizerConfig(lr=1e-5, lr_schedule="constant", beta1=0.9, beta2=0.95),
        checkpoint=CheckpointConfig(every_num_steps=100, save_hf=True),
    )


def llama3_2_3b_numina() -> RunConfig:
    """Second of two stages: Dr. GRPO on what `llama3_2_3b_numina_pretrain` exported.

    Source: the reference's Llama-3.2-3B-NuminaQA script (math_12k, r1, 20 epochs). Expected: well
    above `llama3_2_3b`, and without GRPO's growth in length (the paper's Llama figure); final
    numbers not stated. With `model.path=lkevinzc/Llama-3.2-3B-NuminaQA` it starts from the authors'
    own pretrained model and needs no first stage.
    """
    stage = llama3_2_3b_numina_pretrain()
    return _llama("llama3_2_3b_numina", f"{stage.run_dir}/hf/{step_name(stage.num_steps)}")


def _llama(name: str, path: str) -> RunConfig:
    # The reference shards the weights too (ZeRO-3); TP 2 is what leaves room here.
    return paper_run(
        name=name,
        path=path,
        dataset="math_12k",
        template="r1",
        num_steps=1875,
        tensor_model_parallel_size=2,
    )
