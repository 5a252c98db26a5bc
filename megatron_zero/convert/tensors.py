"""Pure functions between HF's separate projections and Megatron's packed tensors.

Only dim 0 (output rows) is ever rearranged, so weights [rows, hidden] and biases [rows] take the
same functions; `...` stands for the untouched dims. Everything is a permutation, concatenation or
removal of rows: bitwise reversible in any dtype.

Symbols: n query heads, g key-value groups, r = n / g query heads per group, d head dimension.
"""

from collections.abc import Sequence

import torch


def pack_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Interleave q, k and v by key-value group, as Megatron's `linear_qkv` has them.

    Args:
        q: [n * d, ...].
        k, v: [g * d, ...].
        num_groups: g.

    Returns:
        [g * (r + 2) * d, ...], group after group, each its r query heads, its key, its value.
        With n=4, g=2, one row per head: q0 q1 k0 v0 q2 q3 k1 v1.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    rest = tuple(q.shape[1:])
    fits = k.shape == v.shape and tuple(k.shape[1:]) == rest and num_groups > 0
    if not fits or k.shape[0] % num_groups or q.shape[0] % max(k.shape[0], 1):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} are not the projections "
            f"of {num_groups} key-value groups"
        )
    by_group = [x.reshape(num_groups, x.shape[0] // num_groups, *rest) for x in (q, k, v)]
    return torch.cat(by_group, dim=1).reshape(-1, *rest)


def unpack_qkv(
    packed: torch.Tensor, num_heads: int, num_groups: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Undo `pack_qkv`.

    Args:
        packed: [g * (r + 2) * d, ...].
        num_heads: n.
        num_groups: g.

    Returns:
        q [n * d, ...], k [g * d, ...] and v [g * d, ...], contiguous.

    Raises:
        ValueError: if the rows are not a multiple of n + 2g heads, or g does not divide n.
    """
    num_packed_heads = num_heads + 2 * num_groups
    if num_heads % num_groups or packed.shape[0] % num_packed_heads:
        raise ValueError(
            f"{packed.shape[0]} rows are not {num_heads} query and 2 x {num_groups} key and "
            "value heads"
        )
    head_dim, rest = packed.shape[0] // num_packed_heads, tuple(packed.shape[1:])
    query_rows = num_heads // num_groups * head_dim
    by_group = packed.reshape(num_groups, query_rows + 2 * head_dim, *rest)
    q, k, v = by_group.split([query_rows, head_dim, head_dim], dim=1)
    return tuple(x.reshape(-1, *rest).contiguous() for x in (q, k, v))  # type: ignore[return-value]


def pack_gate_up(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Stack gate [f, ...] over up [f, ...] into `linear_fc1` [2f, ...].

    Applied to rank t's rows of both, it gives rank t's tensor-parallel shard.

    Raises:
        ValueError: if the shapes differ.
    """
    if gate.shape != up.shape:
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} differ in shape")
    return torch.cat([gate, up])


def unpack_gate_up(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split `linear_fc1` [2f, ...] into gate [f, ...] and up [f, ...], views of it.

    Raises:
        ValueError: if the number of rows is odd.
    """
    if packed.shape[0] % 2:
        raise ValueError(f"{packed.shape[0]} rows do not split into gate and up")
    half = packed.shape[0] // 2
    return packed[:half], packed[half:]


def merge_gate_up_shards(shards: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join tensor-parallel shards of `linear_fc1` into the full tensor.

    Args:
        shards: by rank, each [2f / T, ...]: that rank's gate rows over its up rows.

    Returns:
        [2f, ...]. With T=2: (g0 u0), (g1 u1) -> g0 g1 u0 u1.
    """
    halves = [unpack_gate_up(shard) for shard in shards]
    return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])


def add_vocab_padding(rows: torch.Tensor, padded_size: int) -> torch.Tensor:
    """Append zero rows: [v, ...] -> [padded_size, ...].

    Raises:
        ValueError: if there are more rows than `padded_size`.
    """
    missing = padded_size - rows.shape[0]
    if missing < 0:
        raise ValueError(f"{rows.shape[0]} vocabulary rows do not fit in {padded_size}")
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows


def remove_vocab_padding(padded: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Keep the first `vocab_size` rows, whatever the padding became in training.

    Raises:
        ValueError: if there are fewer rows than that.
    """
    if padded.shape[0] < vocab_size:
        raise ValueError(f"{padded.shape[0]} vocabulary rows are fewer than {vocab_size}")
    return padded[:vocab_size]
