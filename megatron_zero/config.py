"""Every setting, every default, every check. Standard library only.

A `RunConfig` is one complete training run; `PretrainConfig` one next-token run. Both are trees of
frozen dataclasses: recipes build them, `config_io` reads and writes them as YAML, and each
section checks itself, so a value that cannot work is refused when it is written, not hours later.
What depends on the number of processes or on the model is checked by `check_layout`, before any
process group exists.

Written so that nemo-run can carry it: no `X | None`, tuples, enums or optional sections.
Units are in the names: `_s` seconds, `_gib` GiB, `num_` counts, `max_` bounds.
"""

import os
from dataclasses import dataclass, field
from dataclasses import replace as replace

from megatron_zero.checks import (
    CONFIG_OPTIONS,
    at_least,
    check_run,
    divides,
    fail,
    one_of,
    round_up,
)
from megatron_zero.config_data import TEMPLATES as TEMPLATES
from megatron_zero.config_data import ArchitectureConfig as ArchitectureConfig
from megatron_zero.config_data import ArithmeticConfig as ArithmeticConfig
from megatron_zero.config_data import DataConfig, DocumentsConfig, ModelConfig, check_dataset_names
from megatron_zero.config_objective import ANSWER_FORMATS as ANSWER_FORMATS
from megatron_zero.config_objective import (
    AdvantageConfig,
    LossConfig,
    RewardConfig,
    check_group,
    check_objective,
)


@dataclass(**CONFIG_OPTIONS)
class RolloutConfig:
    """Sampling, and the engine that does it."""

    num_prompts_per_step: int = 128
    group_size: int = 8
    max_rounds: int = 1  # above 1, groups without signal are replaced: dynamic sampling (DAPO)
    max_response_tokens: int = 3000
    temperature: float = 1.0
    top_p: float = 1.0
    tensor_model_parallel_size: int = 1  # the engine's own, independent of the policy's
    gpu_memory_utilization: float = 0.5
    kv_cache_gib: float = 0.25  # per engine, CPU only; on a GPU gpu_memory_utilization decides
    max_num_sequences: int = 256  # decoded at once, per engine
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    sleep: bool = True  # GPU: give weights and cache back while training
    sync_bucket_mib: int = 512  # bound on what a weight sync holds besides the two models

    def __post_init__(self) -> None:
        at_least(self, "rollout", 1, "num_prompts_per_step", "group_size", "max_response_tokens")
        at_least(self, "rollout", 1, "tensor_model_parallel_size", "max_num_sequences")
        at_least(self, "rollout", 1, "max_rounds")
        if self.temperature <= 0:
            fail("rollout.temperature", self.temperature, "must be above 0: training samples")
        if self.top_p != 1.0:
            valid = "must be 1: a truncated distribution is not the policy that is trained, whose "
            valid += "logprobs must be the engine's; of evaluations alone: evaluation.top_p"
            fail("rollout.top_p", self.top_p, valid)
        if not 0 < self.gpu_memory_utilization <= 1:
            fail("rollout.gpu_memory_utilization", self.gpu_memory_utilization, "must be in (0, 1]")
        if self.kv_cache_gib <= 0:
            fail("rollout.kv_cache_gib", self.kv_cache_gib, "must be above 0")


@dataclass(**CONFIG_OPTIONS)
class BatchConfig:
    """How a rollout is cut into optimizer steps and microbatches."""

    global_batch_size: int = 128  # responses per optimizer step, all ranks
    max_tokens_per_microbatch: int = 4096  # packed tokens in one forward pass of one rank
    skip_zero_advantage: bool = True  # no pass over samples whose gradient is exactly zero

    def __post_init__(self) -> None:
        at_least(self, "batch", 1, "global_batch_size", "max_tokens_per_microbatch")


@dataclass(**CONFIG_OPTIONS)
class ParallelConfig:
    """The policy's layout; data parallelism is what is left of the world size."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int = 1  # chunks of layers per stage, interleaved
    context_parallel_size: int = 1  # each sequence is cut over so many ranks
    expert_model_parallel_size: int = 1  # experts are spread over it; taken out of TP x DP
    expert_tensor_parallel_size: int = 1  # ranks that share one expert
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = True
    recompute: str = "none"  # none, selective (core attention) or full
    max_host_silence_s: float = 60.0  # of several hosts, one not heard of for so long is lost

    def __post_init__(self) -> None:
        at_least(self, "parallel", 1, *(n for n in self.__slots__ if n.endswith("_size")))
        at_least(self, "parallel", 5, "max_host_silence_s")
        one_of(self, "parallel", "recompute", ["none", "selective", "full"])
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            fail("parallel.sequence_parallel", True, "needs tensor_model_parallel_size above 1")
        if self.virtual_pipeline_model_parallel_size > 1 and self.pipeline_model_parallel_size == 1:
            path = "parallel.virtual_pipeline_model_parallel_size"
            valid = "must be 1 without pipeline_model_parallel_size above 1"
            fail(path, self.virtual_pipeline_model_parallel_size, valid)

    @property
    def megatron_sizes(self) -> "dict[str, int]":
        """By Megatron's names, which are the same, but for virtual stages."""
        names = [name for name in self.__slots__ if name.endswith("_size")]
        return {name: getattr(self, name) for name in names if not name.startswith("virtual_")}

    @property
    def sequence_alignment(self) -> int:
        """What every packed sequence's length must be a multiple of.

        Context parallelism deals out pairs of chunks; sequence parallelism cuts each rank's part.
        """
        chunks = 2 * self.context_parallel_size if self.context_parallel_size > 1 else 1
        return chunks * (self.tensor_model_parallel_size if self.sequence_parallel else 1)


@dataclass(**CONFIG_OPTIONS)
class OptimizerConfig:
    """Adam. The schedule counts optimizer steps."""

    lr: float = 1e-6
    min_lr: float = 0.0
    lr_schedule: str = "constant"
    warmup_steps: int = 0  # the first has lr / warmup_steps, the last has lr
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0  # global norm; 0: off
    offload: bool = False  # GPU: state and gradients leave the device while the engine has it
    # Transformer Engine's Adam takes fewer bytes for these, with the distributed optimizer
    main_params_dtype: str = "fp32"
    main_grads_dtype: str = "fp32"
    exp_avg_dtype: str = "fp32"
    exp_avg_sq_dtype: str = "fp32"

    def __post_init__(self) -> None:
        one_of(self, "optimizer", "main_params_dtype", ["fp32", "fp16"])
        one_of(self, "optimizer", "main_grads_dtype", ["fp32", "bf16"])
        for name in ("exp_avg_dtype", "exp_avg_sq_dtype"):
            one_of(self, "optimizer", name, ["fp32", "bf16", "fp16", "fp8"])
        one_of(self, "optimizer", "lr_schedule", ["constant", "linear", "cosine"])
        at_least(self, "optimizer", 0, "lr", "min_lr", "warmup_steps", "weight_decay", "clip_grad")
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= beta < 1:
                fail(f"optimizer.{name}", beta, "must be in [0, 1)")
        if self.min_lr > self.lr:
            fail("optimizer.min_lr", self.min_lr, f"must be at most optimizer.lr={self.lr}")

    @property
    def reduced_dtypes(self) -> "dict[str, str]":
        """Those of the optimizer's tensors that are kept in less than float32."""
        names = [name for name in self.__slots__ if name.endswith("_dtype")]
        return {name: getattr(self, name) for name in names if getattr(self, name) != "fp32"}


# Of `MismatchConfig`, by `model.dtype`: what was measured is in docs/engine_mismatch.md.
MAX_KL = {"fp32": 1e-6, "bf16": 0.02}
MAX_FIRST_KL = {"fp32": 1e-8, "bf16": 0.005}
# Of engine and policy that disagree by more: what is said then.
MISMATCH_REASONS = (
    "Wrong weights in the engine, another dtype or other kernels are the usual reasons; where few "
    "tokens are far off and the others hardly, a router whose choice of experts rounding has turned"
)


@dataclass(**CONFIG_OPTIONS)
class MismatchConfig:
    """How far the engine's logprobs may be from the policy's before the run stops.

    Both are k3 estimates of KL(engine || policy) per token, and 0 is the dtype's own bound.
    """

    max_kl: float = 0.0  # over a step's trained tokens; 0: MAX_KL
    max_first_kl: float = 0.0  # over a few tokens after a run's first weight sync; 0: MAX_FIRST_KL

    def __post_init__(self) -> None:
        at_least(self, "mismatch", 0, "max_kl", "max_first_kl")


@dataclass(**CONFIG_OPTIONS)
class EvaluationConfig:
    """Accuracy on held-out prompts, during training and at its ends."""

    datasets: "list[str]" = field(default_factory=list)
    every_num_steps: int = 16  # 0: never during training
    max_prompts: int = 0  # per data set; 0: all
    num_samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0  # the likeliest tokens that together have so much; 1: all
    top_k: int = 0  # so many of the likeliest tokens; 0: all
    max_response_tokens: int = 0  # 0: rollout.max_response_tokens

    def __post_init__(self) -> None:
        at_least(self, "evaluation", 0, "every_num_steps", "max_prompts", "temperature")
        at_least(self, "evaluation", 1, "num_samples")
        if self.num_samples > 1 and self.temperature == 0:
            fail("evaluation.num_samples", self.num_samples, "must be 1 when temperature is 0")
        at_least(self, "evaluation", 0, "top_k")
        if not 0 < self.top_p <= 1:
            fail("evaluation.top_p", self.top_p, "must be in (0, 1]")
        if self.top_p != 1 and self.temperature == 0:
            fail("evaluation.top_p", self.top_p, "must be 1 when temperature is 0")
        if self.top_k != 0 and self.temperature == 0:
            fail("evaluation.top_k", self.top_k, "must be 0 when temperature is 0")
        check_dataset_names("evaluation.datasets", self.datasets)


@dataclass(**CONFIG_OPTIONS)
class CheckpointConfig:
    """Sharded training checkpoints; the last one and an HF export are always written."""

    every_num_steps: int = 0  # 0: only at the end
    keep: int = 2  # newest checkpoints kept; 0: all
    save_hf: bool = True

    def __post_init__(self) -> None:
        at_least(self, "checkpoint", 0, "every_num_steps", "keep")


@dataclass(**CONFIG_OPTIONS)
class LoggingConfig:
    """Where metrics go; `metrics.jsonl` is always written."""

    console: bool = True
    tensorboard: bool = True
    wandb_project: str = ""  # "": off
    rollouts_every_num_steps: int = 10  # rollouts written to the run directory; 0: never
    warn_after_steps_without_signal: int = 3  # in a row; 0: no warning

    def __post_init__(self) -> None:
        at_least(self, "logging", 0, "rollouts_every_num_steps", "warn_after_steps_without_signal")


@dataclass(**CONFIG_OPTIONS)
class RunConfig:
    """One complete reinforcement-learning run."""

    name: str
    seed: int = 0
    num_steps: int = 100
    runs_dir: str = "runs"
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        check_run(self)
        check_group(self)
        what = "rollout.num_prompts_per_step * rollout.group_size"
        size = self.batch.global_batch_size
        divides("batch.global_batch_size", size, self.responses_per_step, what)
        budget = self.batch.max_tokens_per_microbatch
        padded = round_up(self.max_sample_tokens - 1, self.parallel.sequence_alignment)
        longest = max(self.max_sample_tokens, padded)
        if budget < longest:
            what = "data.max_prompt_tokens + rollout.max_response_tokens, padded for the layout"
            valid = f"must hold the longest sample: {what} = {longest}"
            fail("batch.max_tokens_per_microbatch", budget, valid)
        check_objective(self)

    @property
    def responses_per_step(self) -> int:
        return self.rollout.num_prompts_per_step * self.rollout.group_size

    @property
    def max_sample_tokens(self) -> int:
        return self.data.max_prompt_tokens + self.rollout.max_response_tokens

    @property
    def num_optimizer_steps(self) -> int:  # per rollout
        return self.responses_per_step // self.batch.global_batch_size

    @property
    def needs_ref_policy(self) -> bool:
        return self.loss.kl_coef > 0 or self.advantage.kl_reward_coef > 0

    @property
    def max_mismatch_kl(self) -> float:
        """`mismatch.max_kl`, or the dtype's."""
        return self.mismatch.max_kl or MAX_KL[self.model.dtype]

    @property
    def max_first_mismatch_kl(self) -> float:
        """`mismatch.max_first_kl`, or the dtype's."""
        return self.mismatch.max_first_kl or MAX_FIRST_KL[self.model.dtype]

    @property
    def max_evaluation_tokens(self) -> int:
        return self.evaluation.max_response_tokens or self.rollout.max_response_tokens

    @property
    def answer_format(self) -> str:
        return self.reward.answer_format or TEMPLATES[self.data.template]

    @property
    def run_dir(self) -> str:
        return os.path.expanduser(f"{self.runs_dir}/{self.name}")


@dataclass(**CONFIG_OPTIONS)
class PretrainConfig:
    """One next-token run on documents: domain pretraining, or a small base model."""

    name: str
    seed: int = 0
    num_steps: int = 500
    runs_dir: str = "runs"
    model: ModelConfig
    documents: DocumentsConfig = field(default_factory=DocumentsConfig)
    max_tokens_per_microbatch: int = 4096
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        check_run(self)
        longest = round_up(self.documents.sequence_length, self.parallel.sequence_alignment)
        if self.max_tokens_per_microbatch < longest:
            valid = f"must hold documents.sequence_length, padded for the layout: {longest}"
            fail("max_tokens_per_microbatch", self.max_tokens_per_microbatch, valid)

    @property
    def run_dir(self) -> str:
        return os.path.expanduser(f"{self.runs_dir}/{self.name}")
