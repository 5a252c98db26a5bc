"""Beyond the paper: mixtures of experts on many nodes. Not run on GPUs from this repository.

The memory per GPU in the docstrings is what `recipes.memory` computes from the public sizes in
`recipes.hardware`, at the precision that a test holds them to.
"""

from megatron_zero.config import BatchConfig, ParallelConfig, RolloutConfig, RunConfig, replace
from recipes.paper import paper_run


def qwen3_30b_a3b() -> RunConfig:
    """Qwen3-30B-A3B-Base on MATH levels 3 to 5, 4 nodes of 8 x H100-80G.

    Source: the paper's settings on a mixture of experts; expected result not stated. Layout: EP 8
    within each node, DP 32, engines of TP 4. Of the 30.5 B parameters 29.0 B are experts, an eighth
    on each GPU, and 1.5 B are whole on each. Policy, GiB per GPU: weights 9.6 and float32
    gradients 19.2 (2 and 4 bytes of 5.2 B), optimizer 10.7 (12 bytes of 30.5 B / 32): 39.5. Engine:
    56.9 / 4 = 14.2 of weights in 27.7 (0.35 of 79.2), the rest is cache. Together 67.2 of 79.2.
    """
    config = paper_run(
        name="qwen3_30b_a3b",
        path="Qwen/Qwen3-30B-A3B-Base",
        dataset="math_lvl3to5_8k",
        template="qwen_math",
        num_steps=1331,
        engine_tensor_model_parallel_size=4,
    )
    parallel = ParallelConfig(expert_model_parallel_size=8, recompute="full")
    return replace(config, parallel=parallel)


def deepseek_v3() -> RunConfig:
    """DeepSeek-V3-Base on MATH levels 3 to 5, r1 template, 32 nodes of 8 x B300-288G.

    Source: R1-Zero's base model under the paper's objective; expected result not stated. Layout:
    TP 8 within each node, DP 32, EP 256 (one expert per layer and GPU), PP 1 because 61 layers have
    no other divisor. Of the 671 B parameters 654 B are experts, 2.6 B on each GPU, and an eighth of
    the other 17 B. Policy, GiB per GPU: weights 8.7, float32 gradients 17.5, optimizer 29.3: 55.5.
    Engine: 1,250 / 8 = 156.2 of weights in 187.6 (0.7 of 268), the rest is cache. Together 243.1.
    In bf16 one node must hold the whole engine: nodes of 8 x 80 GB (640) and of 8 x 141 GB (1,128)
    cannot, whatever the policy's layout; they need rollouts on other machines.
    """
    config = paper_run(
        name="deepseek_v3",
        path="deepseek-ai/DeepSeek-V3-Base",
        dataset="math_lvl3to5_8k",
        template="r1",
        num_steps=1331,
    )
    return replace(
        config,
        rollout=RolloutConfig(
            num_prompts_per_step=128,
            group_size=16,
            max_response_tokens=8192,
            tensor_model_parallel_size=8,
            gpu_memory_utilization=0.7,
            max_num_sequences=64,
        ),
        batch=BatchConfig(global_batch_size=256, max_tokens_per_microbatch=16384),
        parallel=ParallelConfig(
            tensor_model_parallel_size=8,
            sequence_parallel=True,
            expert_model_parallel_size=256,
            recompute="full",
        ),
    )
