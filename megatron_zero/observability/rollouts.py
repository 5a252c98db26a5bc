"""Rollouts on disk: what was generated, how it was graded, what it was trained with.

One compressed JSON line per prompt, so that a file can be read with `zstdcat | jq` too. Reading
gives back equal values: numbers are written with all their digits.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import zstandard

from megatron_zero.checks import UserError
from megatron_zero.observability.run_dir import write_atomically
from megatron_zero.types import Graded, Prompt, Response, RolloutGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutRecord:
    """One prompt's group with its verdicts and advantages, response by response."""

    group: RolloutGroup
    graded: tuple[Graded, ...]
    advantages: tuple[float, ...]


def write_rollouts(
    path: Path,
    groups: Sequence[RolloutGroup],
    graded: Sequence[Sequence[Graded]],
    advantages: Sequence[Sequence[float]],
) -> None:
    """Write one step's rollouts to `path` (`RunDir.rollouts(step)`), complete or not at all.

    Args:
        groups: one per prompt, P of them.
        graded: [P][G] verdicts.
        advantages: [P][G]; of a tensor, its `tolist()`.
    """
    lines = []
    for group, verdicts, row in zip(groups, graded, advantages, strict=True):
        responses = [
            {**asdict(response), **asdict(verdict), "advantage": advantage}
            for response, verdict, advantage in zip(group.responses, verdicts, row, strict=True)
        ]
        record = {"prompt": asdict(group.prompt), "responses": responses}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    data = "".join(lines).encode("utf-8", errors="surrogatepass")
    write_atomically(path, zstandard.ZstdCompressor().compress(data))


def read_rollouts(path: Path) -> list[RolloutRecord]:
    """What `write_rollouts` wrote.

    Raises:
        ValueError: the file is not one of its files, or is damaged.
    """
    try:
        with zstandard.open(path, "rb") as file:
            lines = file.read().decode("utf-8", errors="surrogatepass").split("\n")
        return [_from_plain(json.loads(line)) for line in lines if line]
    except (zstandard.ZstdError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a rollout file: {error}") from None


def _from_plain(data: dict[str, Any]) -> RolloutRecord:
    return RolloutRecord(
        group=RolloutGroup(
            prompt=_build(Prompt, data["prompt"]),
            responses=tuple(_build(Response, item) for item in data["responses"]),
        ),
        graded=tuple(_build(Graded, item) for item in data["responses"]),
        advantages=tuple(item["advantage"] for item in data["responses"]),
    )


def _build(cls: type, data: dict[str, Any]) -> Any:
    """`cls` from its own entries of `data`; JSON's lists become the tuples they were."""
    values = {field.name: data[field.name] for field in fields(cls)}
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
