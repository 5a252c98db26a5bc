"""The sections of `config` that say what is optimised. Standard library only.

Import them from `config`: it has every section. `objective` names the combinations that are
published and prints any of them as a formula; `docs/objectives.md` has the table.
"""

from dataclasses import dataclass
from typing import Any

from megatron_zero.checks import CONFIG_OPTIONS, at_least, fail, one_of

ANSWER_FORMATS = ["", "boxed", "boxed_after_think", "answer_tag", "answer_tag_lenient"]


@dataclass(**CONFIG_OPTIONS)
class RewardConfig:
    """The verifier. Truncated responses get reward 0 and stay in the group mean (reference A3)."""

    answer_format: str = ""  # one of ANSWER_FORMATS; "": the template's
    num_workers: int = 1  # processes per rank
    timeout_s: float = 5.0  # of one grading, counted from when it starts
    memory_limit_mib: int = 1024  # address space a worker may add
    overlong_buffer_tokens: int = 0  # last tokens of the allowed length that cost; 0: off
    overlong_penalty: float = 1.0  # what the longest response loses (DAPO: 1 with rewards of ±1)

    def __post_init__(self) -> None:
        one_of(self, "reward", "answer_format", ANSWER_FORMATS)
        at_least(self, "reward", 1, "num_workers")
        at_least(self, "reward", 64, "memory_limit_mib")
        at_least(self, "reward", 0, "overlong_buffer_tokens", "overlong_penalty")
        if self.timeout_s <= 0:
            fail("reward.timeout_s", self.timeout_s, "must be above 0")


@dataclass(**CONFIG_OPTIONS)
class AdvantageConfig:
    """Reward minus a baseline; GRPO also divides by the group's standard deviation."""

    baseline: str = "group_mean"  # of all responses to the prompt, or leave_one_out: of the others
    normalize_std: bool = False
    kl_reward_coef: float = 0.0  # KL to the reference policy subtracted from the reward

    def __post_init__(self) -> None:
        one_of(self, "advantage", "baseline", ["group_mean", "leave_one_out"])
        at_least(self, "advantage", 0, "kl_reward_coef")
        if self.normalize_std and self.baseline != "group_mean":
            valid = "must be false with advantage.baseline='leave_one_out': no such estimator"
            fail("advantage.normalize_std", True, valid)


@dataclass(**CONFIG_OPTIONS)
class LossConfig:
    """The surrogate, how it is averaged, and what is added to it or masked out of it."""

    surrogate: str = "ppo"  # ppo, gspo, cispo or reinforce: the functions of `losses`
    # constant: max_response_tokens (Dr. GRPO); response: its length (GRPO); tokens: all of the
    # optimizer step's trained tokens (DAPO); none: sums of responses (RLOO)
    length_normalizer: str = "constant"
    clip_low: float = 0.2  # 1: no lower bound
    clip_high: float = 0.2
    kl_coef: float = 0.0
    kl_kind: str = "k3"
    entropy_coef: float = 0.0  # bonus
    balance_coef: float = 0.0  # load of experts, within each sequence: policy/balance.py
    importance_cap: float = 0.0  # truncated importance sampling, C; 0: off (the paper)
    importance_level: str = "token"  # or sequence: one weight for all tokens of a response
    # responses whose ratio policy to engine leaves the band are not trained on, but count in every
    # mean; geometric: mean over tokens, product: over the whole response
    sequence_mask: str = "none"
    sequence_mask_low: float = 0.5
    sequence_mask_high: float = 2.0
    mask_truncated: bool = False  # not trained on; they count in every mean but that over tokens

    def __post_init__(self) -> None:
        one_of(self, "loss", "surrogate", ["ppo", "gspo", "cispo", "reinforce"])
        one_of(self, "loss", "length_normalizer", ["constant", "response", "tokens", "none"])
        one_of(self, "loss", "kl_kind", ["k1", "k2", "k3"])
        one_of(self, "loss", "importance_level", ["token", "sequence"])
        one_of(self, "loss", "sequence_mask", ["none", "geometric", "product"])
        at_least(self, "loss", 0, "clip_low", "clip_high", "kl_coef", "importance_cap")
        at_least(self, "loss", 0, "entropy_coef", "balance_coef", "sequence_mask_low")
        if self.clip_low > 1:
            fail("loss.clip_low", self.clip_low, "must be at most 1, which is no lower bound")
        if self.sequence_mask_low >= 1:
            fail("loss.sequence_mask_low", self.sequence_mask_low, "must be below 1")
        if self.sequence_mask_high <= 1:
            fail("loss.sequence_mask_high", self.sequence_mask_high, "must be above 1")
        self._check_importance()

    def _check_importance(self) -> None:
        level = self.importance_level
        if level == "sequence" and self.importance_cap == 0:
            fail("loss.importance_level", level, "needs loss.importance_cap above 0")
        if self.surrogate == "gspo" and self.importance_cap > 0 and level == "token":
            valid = "must be sequence with loss.surrogate='gspo': its ratio is the whole response's"
            fail("loss.importance_level", level, valid)


def check_group(config: Any) -> None:
    """Refuse groups without a baseline; `config`: a RunConfig.

    Of one response the mean of all is its own reward, and the mean of the others does not exist.
    """
    if config.rollout.group_size < 2:
        valid = (
            f"must be at least 2: with advantage.baseline={config.advantage.baseline!r} a single "
            f"response to a prompt has nothing to be compared with, and nothing would be learned"
        )
        fail("rollout.group_size", config.rollout.group_size, valid)


def check_objective(config: Any) -> None:
    """Refuse combinations of sections that no estimator is defined for; `config`: a RunConfig."""
    buffer, longest = config.reward.overlong_buffer_tokens, config.rollout.max_response_tokens
    if buffer > longest:
        valid = f"must be at most rollout.max_response_tokens={longest}"
        fail("reward.overlong_buffer_tokens", buffer, valid)
    if config.loss.surrogate == "reinforce" and config.num_optimizer_steps > 1:
        valid = (
            f"needs one optimizer step per rollout, batch.global_batch_size="
            f"{config.responses_per_step}: it has no ratio to correct for the earlier ones"
        )
        fail("loss.surrogate", "reinforce", valid)
