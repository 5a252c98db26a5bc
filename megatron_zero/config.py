"""Every setting, every default, every check. Standard library only.

A `RunConfig` is one complete training run; `PretrainConfig` one next-token run. Both are trees of
frozen dataclasses: recipes build them, `config_io` reads and writes them as YAML, and each
section checks itself, so a value that cannot work is refused when it is written, not hours later.
What depends on the number of processes or on the model is checked by `check_layout`, before any
process group exists.

Written so that nemo-run can carry it: no `X | None`, tuples, enums or optional sections.
Units are in the names: `_s` seconds, `_gib` GiB, `num_` counts, `max_` bounds.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

CONFIG_OPTIONS = {"frozen": True, "kw_only": True, "slots": True}


def fail(path: str, value: object, valid: str) -> None:
    """Refuse one setting: every configuration error has this form."""
    raise ValueError(f"{path}={value!r}: {valid}")


def _at_least(section: object, prefix: str, bound: float, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value < bound:
            fail(f"{prefix}.{name}", value, f"must be at least {bound}")


def _one_of(section: object, prefix: str, name: str, valid: "list[str]") -> None:
    value = getattr(section, name)
    if value not in valid:
        fail(f"{prefix}.{name}", value, f"must be one of {', '.join(valid)}")


TEMPLATES = ["qwen_math", "r1", "no", "arithmetic"]
ANSWER_FORMATS = ["boxed", "answer_tag"]


@dataclass(**CONFIG_OPTIONS)
class ArchitectureConfig:
    """A Qwen2 made from scratch, used only with `model.init="random"`; names as in HF's config."""

    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    vocab_size: int = 0  # 0: the tokenizer's size, rounded up to a multiple of 128
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        here = "model.architecture"
        _at_least(self, here, 1, "hidden_size", "intermediate_size", "num_hidden_layers")
        _at_least(self, here, 1, "num_attention_heads", "num_key_value_heads")
        _at_least(self, here, 0, "vocab_size")
        if self.hidden_size % self.num_attention_heads:
            fail(
                f"{here}.num_attention_heads",
                self.num_attention_heads,
                f"must divide hidden_size={self.hidden_size}",
            )
        if self.num_attention_heads % self.num_key_value_heads:
            fail(
                f"{here}.num_key_value_heads",
                self.num_key_value_heads,
                f"must divide num_attention_heads={self.num_attention_heads}",
            )


@dataclass(**CONFIG_OPTIONS)
class ModelConfig:
    """The policy's starting point."""

    path: str = ""  # HF directory or hub id; its config.json alone is read when init="random"
    init: str = "pretrained"  # pretrained: weights of `path`; random: seeded, layout-independent
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    tokenizer: str = ""  # directory, hub id or "characters"; "": the model's
    dtype: str = "bf16"  # bf16 (float32 master weights) or fp32

    def __post_init__(self) -> None:
        _one_of(self, "model", "init", ["pretrained", "random"])
        _one_of(self, "model", "dtype", ["bf16", "fp32"])
        if self.init == "pretrained" and not self.path:
            fail("model.path", self.path, 'needed with model.init="pretrained"')
        if not self.path and not self.tokenizer:
            fail("model.tokenizer", self.tokenizer, "needed when model.path is empty")


@dataclass(**CONFIG_OPTIONS)
class ArithmeticConfig:
    """Generated addition problems (`data.arithmetic`): no download, known answers."""

    min_operand: int = 10
    max_operand: int = 99
    wrong_fraction: float = 0.5  # pretraining documents whose final answer is wrong

    def __post_init__(self) -> None:
        _at_least(self, "arithmetic", 0, "min_operand")
        if self.max_operand <= self.min_operand:
            fail("arithmetic.max_operand", self.max_operand, f"must be above {self.min_operand}")
        if not 0 <= self.wrong_fraction < 1:
            fail("arithmetic.wrong_fraction", self.wrong_fraction, "must be in [0, 1)")


@dataclass(**CONFIG_OPTIONS)
class DataConfig:
    """Which prompts are trained on."""

    dataset: str = "arithmetic"  # a known name, a file or folder, or a hub id
    data_dir: str = ""  # folder that is looked into before the hub for known names
    split: str = "train"
    prompt_key: str = ""  # "": the known data set's, else "problem"
    answer_key: str = ""  # "": the known data set's, else "answer"
    template: str = "qwen_math"
    max_prompt_tokens: int = 1024  # longer templated prompts are left out
    max_prompts: int = 0  # use only the first n rows; 0: all
    shuffle: bool = True
    arithmetic: ArithmeticConfig = field(default_factory=ArithmeticConfig)

    def __post_init__(self) -> None:
        _one_of(self, "data", "template", TEMPLATES)
        _at_least(self, "data", 1, "max_prompt_tokens")
        _at_least(self, "data", 0, "max_prompts")


@dataclass(**CONFIG_OPTIONS)
class RolloutConfig:
    """Sampling, and the engine that does it."""

    num_prompts_per_step: int = 128
    group_size: int = 8
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
        _at_least(self, "rollout", 1, "num_prompts_per_step", "group_size", "max_response_tokens")
        _at_least(self, "rollout", 1, "tensor_model_parallel_size", "max_num_sequences")
        _at_least(self, "rollout", 1, "sync_bucket_mib")
        if self.temperature <= 0:
            fail("rollout.temperature", self.temperature, "must be above 0: training samples")
        if self.top_p != 1.0:
            fail(
                "rollout.top_p",
                self.top_p,
                "must be 1: a truncated distribution is not the policy that is trained",
            )
        if not 0 < self.gpu_memory_utilization <= 1:
            fail("rollout.gpu_memory_utilization", self.gpu_memory_utilization, "must be in (0, 1]")
        if self.kv_cache_gib <= 0:
            fail("rollout.kv_cache_gib", self.kv_cache_gib, "must be above 0")


@dataclass(**CONFIG_OPTIONS)
class RewardConfig:
    """The verifier. Truncated responses get reward 0 and stay in the group mean (reference A3)."""

    answer_format: str = ""  # boxed or answer_tag; "": the template's
    num_workers: int = 1  # processes per rank
    timeout_s: float = 5.0  # of one grading, counted from when it starts
    memory_limit_mib: int = 1024  # address space a worker may add

    def __post_init__(self) -> None:
        if self.answer_format:
            _one_of(self, "reward", "answer_format", ANSWER_FORMATS)
        _at_least(self, "reward", 1, "num_workers")
        _at_least(self, "reward", 64, "memory_limit_mib")
        if self.timeout_s <= 0:
            fail("reward.timeout_s", self.timeout_s, "must be above 0")


@dataclass(**CONFIG_OPTIONS)
class AdvantageConfig:
    """Reward minus group mean; GRPO also divides by the group's standard deviation."""

    normalize_std: bool = False
    kl_reward_coef: float = 0.0  # KL to the reference policy subtracted from the reward

    def __post_init__(self) -> None:
        _at_least(self, "advantage", 0, "kl_reward_coef")


@dataclass(**CONFIG_OPTIONS)
class LossConfig:
    """The clipped surrogate and how it is averaged."""

    length_normalizer: str = "constant"  # constant: max_response_tokens (Dr. GRPO); response: GRPO
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    kl_kind: str = "k3"
    importance_cap: float = 0.0  # truncated importance sampling, C; 0: off (the paper)
    mask_truncated: bool = False  # truncated responses are not trained on, but count in every mean

    def __post_init__(self) -> None:
        _one_of(self, "loss", "length_normalizer", ["constant", "response"])
        _one_of(self, "loss", "kl_kind", ["k1", "k2", "k3"])
        _at_least(self, "loss", 0, "clip_low", "clip_high", "kl_coef", "importance_cap")
        if self.clip_low >= 1:
            fail("loss.clip_low", self.clip_low, "must be below 1")


@dataclass(**CONFIG_OPTIONS)
class BatchConfig:
    """How a rollout is cut into optimizer steps and microbatches."""

    global_batch_size: int = 128  # responses per optimizer step, all ranks
    max_tokens_per_microbatch: int = 4096  # packed tokens in one forward pass of one rank
    skip_zero_advantage: bool = True  # no pass over samples whose gradient is exactly zero

    def __post_init__(self) -> None:
        _at_least(self, "batch", 1, "global_batch_size", "max_tokens_per_microbatch")


@dataclass(**CONFIG_OPTIONS)
class ParallelConfig:
    """The policy's layout; data parallelism is what is left of the world size."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = True
    recompute: str = "none"  # none, selective (core attention) or full

    def __post_init__(self) -> None:
        _at_least(self, "parallel", 1, "tensor_model_parallel_size", "pipeline_model_parallel_size")
        _one_of(self, "parallel", "recompute", ["none", "selective", "full"])
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            fail("parallel.sequence_parallel", True, "needs tensor_model_parallel_size above 1")

    @property
    def model_parallel_size(self) -> int:
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size


@dataclass(**CONFIG_OPTIONS)
class OptimizerConfig:
    """Adam. The schedule counts optimizer steps."""

    lr: float = 1e-6
    min_lr: float = 0.0
    lr_schedule: str = "constant"
    warmup_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0  # global norm; 0: off

    def __post_init__(self) -> None:
        _one_of(self, "optimizer", "lr_schedule", ["constant", "linear", "cosine"])
        _at_least(self, "optimizer", 0, "lr", "min_lr", "warmup_steps", "weight_decay", "clip_grad")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                fail(f"optimizer.{name}", getattr(self, name), "must be in [0, 1)")
        if self.min_lr > self.lr:
            fail("optimizer.min_lr", self.min_lr, f"must be at most optimizer.lr={self.lr}")


@dataclass(**CONFIG_OPTIONS)
class MismatchConfig:
    """How far the engine's logprobs may be from the policy's before the run stops."""

    max_kl: float = 0.02  # k3 estimate of KL(engine || policy) over a step's trained tokens

    def __post_init__(self) -> None:
        if self.max_kl <= 0:
            fail("mismatch.max_kl", self.max_kl, "must be above 0")


@dataclass(**CONFIG_OPTIONS)
class EvaluationConfig:
    """Accuracy on held-out prompts, during training and at its ends."""

    datasets: "list[str]" = field(default_factory=list)
    every_num_steps: int = 16  # 0: never during training
    max_prompts: int = 0  # per data set; 0: all
    num_samples: int = 1
    temperature: float = 0.0
    max_response_tokens: int = 0  # 0: rollout.max_response_tokens

    def __post_init__(self) -> None:
        _at_least(self, "evaluation", 0, "every_num_steps", "max_prompts", "temperature")
        _at_least(self, "evaluation", 0, "max_response_tokens")
        _at_least(self, "evaluation", 1, "num_samples")
        if self.num_samples > 1 and self.temperature == 0:
            fail("evaluation.num_samples", self.num_samples, "must be 1 when temperature is 0")


@dataclass(**CONFIG_OPTIONS)
class CheckpointConfig:
    """Sharded training checkpoints; the last one and an HF export are always written."""

    every_num_steps: int = 0  # 0: only at the end
    keep: int = 2  # newest checkpoints kept; 0: all
    save_hf: bool = True

    def __post_init__(self) -> None:
        _at_least(self, "checkpoint", 0, "every_num_steps", "keep")


@dataclass(**CONFIG_OPTIONS)
class LoggingConfig:
    """Where metrics go; `metrics.jsonl` is always written."""

    console: bool = True
    tensorboard: bool = True
    wandb_project: str = ""  # "": off
    rollouts_every_num_steps: int = 10  # rollouts written to the run directory; 0: never

    def __post_init__(self) -> None:
        _at_least(self, "logging", 0, "rollouts_every_num_steps")


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
        _check_run(self)
        if self.responses_per_step % self.batch.global_batch_size:
            fail(
                "batch.global_batch_size",
                self.batch.global_batch_size,
                f"must divide rollout.num_prompts_per_step * rollout.group_size = "
                f"{self.responses_per_step}",
            )
        longest = self.data.max_prompt_tokens + self.rollout.max_response_tokens
        if self.batch.max_tokens_per_microbatch < longest:
            fail(
                "batch.max_tokens_per_microbatch",
                self.batch.max_tokens_per_microbatch,
                f"must hold the longest sample: data.max_prompt_tokens + "
                f"rollout.max_response_tokens = {longest}",
            )
        if self.advantage.normalize_std and self.rollout.group_size < 2:
            fail("advantage.normalize_std", True, "needs rollout.group_size of at least 2")

    @property
    def responses_per_step(self) -> int:
        return self.rollout.num_prompts_per_step * self.rollout.group_size

    @property
    def num_optimizer_steps(self) -> int:
        """Optimizer steps per rollout."""
        return self.responses_per_step // self.batch.global_batch_size

    @property
    def needs_ref_policy(self) -> bool:
        return self.loss.kl_coef > 0 or self.advantage.kl_reward_coef > 0

    @property
    def max_evaluation_tokens(self) -> int:
        """Response tokens in an evaluation."""
        return self.evaluation.max_response_tokens or self.rollout.max_response_tokens

    @property
    def answer_format(self) -> str:
        if self.reward.answer_format:
            return self.reward.answer_format
        return "answer_tag" if self.data.template == "r1" else "boxed"

    @property
    def run_dir(self) -> str:
        return f"{self.runs_dir}/{self.name}"


@dataclass(**CONFIG_OPTIONS)
class DocumentsConfig:
    """What `pretrain` reads: packed to `sequence_length` tokens, an EOS after each document."""

    source: str = "arithmetic"  # "arithmetic" (generated solutions), or a text or parquet file
    text_key: str = "text"  # parquet, JSONL: column to read; several joined: "problem+solution"
    sequence_length: int = 1024
    sequences_per_step: int = 32  # all ranks
    arithmetic: ArithmeticConfig = field(default_factory=ArithmeticConfig)

    def __post_init__(self) -> None:
        _at_least(self, "documents", 2, "sequence_length")
        _at_least(self, "documents", 1, "sequences_per_step")


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
        _check_run(self)
        if self.max_tokens_per_microbatch < self.documents.sequence_length:
            fail(
                "max_tokens_per_microbatch",
                self.max_tokens_per_microbatch,
                f"must hold documents.sequence_length={self.documents.sequence_length}",
            )

    @property
    def run_dir(self) -> str:
        return f"{self.runs_dir}/{self.name}"


def _check_run(config: Any) -> None:
    if not config.name or "/" in config.name or config.name.startswith("."):
        fail("name", config.name, "must be a plain folder name")
    if config.num_steps < 1:
        fail("num_steps", config.num_steps, "must be at least 1")
    if config.seed < 0:
        fail("seed", config.seed, "must be at least 0")


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Number of data-parallel replicas of `parallel` in a world of `world_size` processes."""
    if world_size % parallel.model_parallel_size:
        fail(
            "parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size",
            parallel.model_parallel_size,
            f"must divide the number of processes, {world_size}",
        )
    return world_size // parallel.model_parallel_size


def check_layout(config: Any, hf_config: "dict[str, Any]", world_size: int) -> None:
    """Refuse a layout that cannot run: called before any process group exists.

    Args:
        config: a `RunConfig` or `PretrainConfig`.
        hf_config: the model's `config.json`.
        world_size: number of processes of the job.

    Raises:
        ValueError: with the setting's path, its value and what would be valid.
    """
    parallel = config.parallel
    tp_size, pp_size = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    dp_size = data_parallel_size(parallel, world_size)
    heads, layers = hf_config["num_attention_heads"], hf_config["num_hidden_layers"]
    kv_heads = hf_config.get("num_key_value_heads") or heads
    tp_path = "parallel.tensor_model_parallel_size"
    if heads % tp_size:
        fail(tp_path, tp_size, f"must divide the model's {heads} attention heads")
    if kv_heads % tp_size and tp_size % kv_heads:
        fail(tp_path, tp_size, f"must divide, or be a multiple of, the model's {kv_heads} KV heads")
    if hf_config["intermediate_size"] % tp_size:
        fail(tp_path, tp_size, f"must divide intermediate_size={hf_config['intermediate_size']}")
    if layers % pp_size:
        fail(
            "parallel.pipeline_model_parallel_size",
            pp_size,
            f"must divide the model's {layers} layers",
        )
    if isinstance(config, RunConfig):
        _check_rollout_layout(config, hf_config, world_size, dp_size)
    elif config.documents.sequences_per_step % dp_size:
        fail(
            "documents.sequences_per_step",
            config.documents.sequences_per_step,
            f"must be a multiple of the data-parallel size, {dp_size}",
        )


def _check_rollout_layout(
    config: RunConfig, hf_config: "dict[str, Any]", world_size: int, dp_size: int
) -> None:
    engine_tp = config.rollout.tensor_model_parallel_size
    engine_path = "rollout.tensor_model_parallel_size"
    if world_size % engine_tp:
        fail(engine_path, engine_tp, f"must divide the number of processes, {world_size}")
    if hf_config["num_attention_heads"] % engine_tp:
        fail(
            engine_path,
            engine_tp,
            f"must divide the model's {hf_config['num_attention_heads']} attention heads",
        )
    if config.batch.global_batch_size % dp_size:
        fail(
            "batch.global_batch_size",
            config.batch.global_batch_size,
            f"must be a multiple of the data-parallel size, {dp_size}",
        )
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    positions = hf_config.get("max_position_embeddings", longest)
    if longest > positions:
        fail(
            "data.max_prompt_tokens + rollout.max_response_tokens",
            longest,
            f"must be at most the model's max_position_embeddings={positions}",
        )


def replace(config: Any, **changes: Any) -> Any:
    """`dataclasses.replace` under the name the recipes use."""
    return dataclasses.replace(config, **changes)
