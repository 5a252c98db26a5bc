"""The values that flow from stage to stage: prompt -> response -> group -> sample -> microbatch.

All are frozen. Prompts, responses and groups are plain Python, so that they pickle between ranks
and are written to disk as they are; tensors appear first in `Microbatch`.

Alignment (one convention, made in `batching.py`): a sample of n tokens gives n - 1 positions,
`tokens = ids[:-1]`, `labels = ids[1:]`, and everything per token is aligned with `labels`:
`logprobs[t]` is the log-probability of `labels[t]`.

Shapes: P prompts per step, G responses per prompt, T packed tokens and S sequences in a microbatch,
R of its tokens that the loss sees.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Optional

import torch

from megatron_zero.checks import UserError

OUTCOMES = ("correct", "wrong", "unparsable", "timeout", "crash")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A templated question and its ground truth.

    Example:
        Prompt(index=7, text="What is 2+3?\\n", token_ids=(41, 9), answers=("5",))
    """

    index: int  # row in its data set: stable over epochs, used in seeds and logs
    text: str  # templated: what the model reads
    token_ids: tuple[int, ...]
    answers: tuple[str, ...]  # any of them counts as correct
    source: str = ""  # data set name

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise UserError(f"prompt {self.index} of {self.source!r} has no tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """What the rollout engine generated for one prompt.

    `token_ids` end with what ended the generation (a stop token, or the tokens that completed a
    stop string) and hold nothing after it. `rollout_logprobs[i]` is the engine's log-probability of
    `token_ids[i]` at the sampling temperature.
    """

    token_ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]
    text: str
    truncated: bool  # stopped by length, without stop token or stop string
    policy_version: int  # the weights that produced it
    engine_index: int = 0  # which engine of the job produced it

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.rollout_logprobs):
            raise ValueError(
                f"{len(self.token_ids)} response tokens but {len(self.rollout_logprobs)} logprobs"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutGroup:
    """All responses to one prompt; `len(responses) == group_size`."""

    prompt: Prompt
    responses: tuple[Response, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Graded:
    """The verifier's verdict on one response.

    `reward` is what training uses (0 for a truncated response, even a correct one: reference
    A3.2); `correct` is the verdict before that rule. `outcome` is one of `OUTCOMES`.
    """

    reward: float
    correct: bool
    formatted: bool
    outcome: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSample:
    """One prompt with one response, and what the objective needs to know of it.

    Example (prompt of 2 tokens, response of 3):
        token_ids       = (5, 6, 7, 8, 1)
        prompt_length   = 2                      # 7, 8 and 1 are trained on
        rollout_logprobs = (-0.1, -2.3, -0.5)    # of 7, 8 and 1
    """

    token_ids: tuple[int, ...]
    prompt_length: int
    rollout_logprobs: tuple[float, ...]
    advantage: float
    masked: bool = False  # kept in every mean and denominator, but not trained on
    engine_index: int = 0

    @property
    def response_length(self) -> int:
        return len(self.token_ids) - self.prompt_length


@dataclass(frozen=True, kw_only=True, slots=True)
class Microbatch:
    """Packed sequences, one after the other, without padding between real tokens and labels.

    Each sequence is padded to a multiple of the layout's alignment (sequence and context
    parallelism); padded positions have `loss_mask` 0 and are after their sequence's end, so causal
    attention never reads them.

    Example (two samples, (5, 6, 7) with a prompt of 1 and (5, 8) with a prompt of 1, alignment 1):
        tokens       = [5, 6, 5]        labels       = [6, 7, 8]
        position_ids = [0, 1, 0]        cu_seqlens   = [0, 2, 3]
        loss_mask    = [1, 1, 1]        sample_index = (0, 1)
    """

    tokens: torch.Tensor  # [T] int64
    labels: torch.Tensor  # [T] int64
    position_ids: torch.Tensor  # [T] int64
    cu_seqlens: torch.Tensor  # [S + 1] int32
    max_seqlen: int
    loss_mask: torch.Tensor  # [T] bool: the only mask the loss sees
    is_token: torch.Tensor  # [T] bool: no padding
    loss_weights: torch.Tensor  # [T] float32: weight of each token before the denominator
    advantages: torch.Tensor  # [T] float32
    rollout_logprobs: torch.Tensor  # [T] float32
    sample_index: tuple[int, ...]  # which sample of the step each sequence is
    old_logprobs: Optional[torch.Tensor] = None  # [T]; None: the current ones, detached
    ref_logprobs: Optional[torch.Tensor] = None  # [T]; None: no KL term

    def with_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Microbatch":
        """The same with `change` of every tensor."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return replace(self, **{n: change(v) for n, v in values if isinstance(v, torch.Tensor)})

    def by_sample(self, values: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Each sample's index, and its part of `values` [T]: a view."""
        parts = values.split(self.cu_seqlens.diff().tolist())
        return zip(self.sample_index, parts, strict=False)  # all padding: a part without a sample


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRows:
    """The R tokens of a microbatch that the loss sees, response after response in packed order.

    `response_lengths` counts the rows of each of the S sequences; a masked sample has none.
    """

    logprobs: torch.Tensor  # [R], with gradient
    entropy: torch.Tensor  # [R], with gradient
    loss_weights: torch.Tensor  # [R]
    advantages: torch.Tensor  # [R]
    rollout_logprobs: torch.Tensor  # [R]
    old_logprobs: torch.Tensor  # [R]
    ref_logprobs: Optional[torch.Tensor]  # [R]; None: no reference policy
    response_lengths: torch.Tensor  # [S] int64
    cp_group: Optional[torch.distributed.ProcessGroup] = None  # who has the responses' other rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Minibatch:
    """One data-parallel rank's share of one optimizer step.

    `denominator` is the step's, over all ranks: the loss is the plain sum over microbatches and
    ranks of `sum(loss_weights * loss) / denominator`.
    """

    microbatches: tuple[Microbatch, ...]
    denominator: float
    num_samples: int  # over all ranks, masked and skipped ones included


@dataclass(frozen=True, kw_only=True, slots=True)
class GlobalBatch:
    """One data-parallel rank's share of one rollout: one minibatch per optimizer step."""

    minibatches: tuple[Minibatch, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """What one optimizer step reports, reduced over all ranks; names are `group/metric`."""

    values: dict[str, float]
