"""Rows to prompts, and the cursor that deals them out step by step.

`build_prompts` templates and tokenises once, at start. `PromptCursor` then walks the data epoch
after epoch, each in an order of its own, and its whole state is one number: a run that is resumed
reads exactly the prompts that the uninterrupted run would have read.

Unlike the reference (`drop_last`), the end of an epoch is not thrown away: a step that needs more
prompts than are left takes the rest from the next epoch, so every prompt is used once per epoch.
Such a step can hold the same prompt twice.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from typing import Any

from megatron_zero.config import fail
from megatron_zero.data.datasets import Row
from megatron_zero.data.encoding import encode
from megatron_zero.data.seeding import epoch_order
from megatron_zero.data.templates import apply_template
from megatron_zero.types import Prompt

logger = logging.getLogger(__name__)


def build_prompts(
    rows: Sequence[Row],
    tokenizer: Any,
    template: str,
    max_prompt_tokens: int,
    source: str,
    *,
    few_shot: str = "",
) -> list[Prompt]:
    """Template and tokenise `rows`; leave out prompts of more than `max_prompt_tokens` tokens.

    The length is that of the templated prompt, BOS included (see `data.encoding`). How many were
    left out is logged; it is `len(rows) - len(prompts)`.

    Args:
        source: name of the data set, kept in every prompt.
        few_shot: `data.few_shot`.

    Raises:
        ValueError: unknown template, no rows, or none short enough.
    """
    if not rows:
        fail("data.dataset", source, "has no rows")
    texts = [apply_template(template, row.question, tokenizer, few_shot) for row in rows]
    encoded = encode(texts, tokenizer)
    prompts = [
        Prompt(index=row.index, text=text, token_ids=tuple(ids), answers=row.answers, source=source)
        for row, text, ids in zip(rows, texts, encoded, strict=True)
        if len(ids) <= max_prompt_tokens
    ]
    if not prompts:
        shortest = f"the shortest has {min(map(len, encoded))} tokens"
        valid = f"all {len(rows)} prompts of {source!r} are longer: {shortest}"
        fail("data.max_prompt_tokens", max_prompt_tokens, valid)
    if len(prompts) < len(rows):
        left_out = f"{source}: {len(rows) - len(prompts)} of {len(rows)} prompts left out"
        limit = f"longer than data.max_prompt_tokens={max_prompt_tokens}"
        longest = f"the longest has {max(map(len, encoded))} tokens"
        logger.warning("%s, %s (%s)", left_out, limit, longest)
    return prompts


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """A digest of everything about the prompts, whatever they were made from."""
    digest = hashlib.sha256()
    for prompt in prompts:
        record = [prompt.index, prompt.source, prompt.text, prompt.answers, prompt.token_ids]
        digest.update(json.dumps(record).encode())
    return digest.hexdigest()


class PromptCursor:
    """Endless, resumable, the same on every rank.

    Prompt number p of the run is number `p % len(prompts)` of epoch `p // len(prompts)`, whose
    order is a permutation made from (seed, epoch); without `shuffle` it is the data's own order.

    Example (3 prompts A B C, 2 per step, not shuffled):
        AB, CA, BC, AB, ...
    """

    def __init__(
        self, prompts: Sequence[Prompt], num_per_step: int, seed: int, shuffle: bool
    ) -> None:
        """Raises ValueError when there is nothing to deal out."""
        if not prompts:
            fail("data.dataset", "", "no prompts")
        if num_per_step < 1:
            fail("rollout.num_prompts_per_step", num_per_step, "must be at least 1")
        self._prompts, self._num_per_step = list(prompts), num_per_step
        self._position = 0  # prompts dealt out since the start of the run
        self._identity = {"num_prompts": len(prompts), "seed": seed, "shuffle": shuffle}
        self._identity["fingerprint"] = prompts_digest(prompts)

    def __len__(self) -> int:
        """Prompts per epoch."""
        return len(self._prompts)

    @property
    def epoch(self) -> float:
        """Epochs dealt out so far, as a fraction: for logs."""
        return self._position / len(self._prompts)

    def next_batch(self, num_prompts: int | None = None) -> list[Prompt]:
        """The next `num_prompts` (None: `num_per_step`) prompts; it never ends."""
        start = self._position
        self._position += self._num_per_step if num_prompts is None else num_prompts
        return [self._prompt_at(position) for position in range(start, self._position)]

    def peek(self, num_prompts: int) -> list[Prompt]:
        """The next `num_prompts` prompts, which are dealt out later all the same."""
        first = self._position
        return [self._prompt_at(position) for position in range(first, first + num_prompts)]

    def _prompt_at(self, position: int) -> Prompt:
        epoch, offset = divmod(position, len(self._prompts))
        if self._identity["shuffle"]:
            offset = epoch_order(self._identity["seed"], epoch, len(self._prompts))[offset]
        return self._prompts[offset]

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in. JSON-serialisable."""
        return {"position": self._position, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        `num_per_step` may differ: the position counts prompts.

        Raises:
            ValueError: the state belongs to other prompts, or to another seed or order.
        """
        for name, value in self._identity.items():
            if state[name] != value:
                same = "the data set, its template and tokenizer, seed and data.shuffle"
                valid = f"the run now has {value!r}: {same} must be those of the checkpoint"
                fail(f"checkpoint.prompts.{name}", state[name], valid)
        self._position = state["position"]
