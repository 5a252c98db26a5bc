"""What training asks of a rollout engine, whichever it is and wherever it runs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Optional, Protocol

import torch

from megatron_zero.types import Response


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One response to generate. The seed alone decides what is drawn, wherever it runs."""

    prompt_token_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingSettings:
    """How responses are drawn and when they end: a stop string (kept), or the length.

    Or a stop token of the model, which the engine was given. Training draws from all tokens, so
    that the engine's logprobs are the policy's; evaluations may leave out unlikely ones. Nothing
    that a model's own files recommend for sampling is taken.
    """

    max_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # the likeliest tokens that together have so much; 1: all
    top_k: int = 0  # so many of the likeliest tokens; 0: all
    stop: tuple[str, ...] = ()


class RolloutEngine(Protocol):
    """An inference engine that takes weights from the trainer.

    `engine_index` of `num_engines` says which one this rank has a part of; with tensor
    parallelism inside the engine several ranks share one and make the same calls.
    """

    engine_index: int
    num_engines: int
    is_engine_leader: bool  # one rank of each engine
    weights_version: Optional[int]  # None until the first load

    def generate(self, requests: Sequence[Request], settings: SamplingSettings) -> list[Response]:
        """One response per request, in order, stamped with the weights' version."""

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace all weights, given whole by HF name; forgets every cached prefix."""

    def sleep(self) -> None:
        """Give device memory back until the next `load_weights`; the weights are dropped."""
