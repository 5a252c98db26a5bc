"""The packing functions: worked examples, and properties over head counts and sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zero.convert import tensors

SIZES = {
    "groups": st.integers(1, 6),
    "heads_per_group": st.integers(1, 5),
    "head_dim": st.integers(1, 5),
    "rest": st.sampled_from([(), (1,), (3,)]),
}


def test_qkv_order_is_queries_key_value_of_each_group() -> None:
    q, k, v = torch.tensor([0, 1, 2, 3]), torch.tensor([10, 11]), torch.tensor([20, 21])
    packed = tensors.pack_qkv(q, k, v, num_groups=2)
    assert packed.tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


@settings(max_examples=60, deadline=None)
@given(**SIZES)
def test_qkv_round_trip_is_a_permutation(
    groups: int, heads_per_group: int, head_dim: int, rest: tuple[int, ...]
) -> None:
    heads = groups * heads_per_group
    count = (heads + 2 * groups) * head_dim
    rows = torch.arange(count).reshape(-1, *([1] * len(rest))).expand(-1, *rest).double()
    q, k, v = rows.split([heads * head_dim, groups * head_dim, groups * head_dim])
    packed = tensors.pack_qkv(q, k, v, groups)
    assert packed.shape == (count, *rest)
    assert sorted(packed.reshape(count, -1)[:, 0].tolist()) == list(range(count))
    back = tensors.unpack_qkv(packed, heads, groups)
    assert all(
        torch.equal(a, b) and b.is_contiguous() for a, b in zip((q, k, v), back, strict=True)
    )


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 8), tp_size=st.integers(1, 4), rest=SIZES["rest"])
def test_gate_up_shards_merge_to_the_packed_tensor(
    rows: int, tp_size: int, rest: tuple[int, ...]
) -> None:
    gate, up = torch.randn(2, rows * tp_size, *rest)
    shards = [
        tensors.pack_gate_up(g, u)
        for g, u in zip(gate.chunk(tp_size), up.chunk(tp_size), strict=True)
    ]
    full = tensors.merge_gate_up_shards(shards)
    assert torch.equal(full, tensors.pack_gate_up(gate, up))
    back_gate, back_up = tensors.unpack_gate_up(full)
    assert torch.equal(back_gate, gate) and torch.equal(back_up, up)


@settings(max_examples=40, deadline=None)
@given(vocab=st.integers(0, 20), extra=st.integers(0, 9))
def test_vocab_padding_adds_zeros_and_is_removed(vocab: int, extra: int) -> None:
    rows = torch.randn(vocab, 3).to(torch.bfloat16)
    padded = tensors.add_vocab_padding(rows, vocab + extra)
    assert padded.shape == (vocab + extra, 3) and padded.dtype == torch.bfloat16
    assert torch.equal(padded[vocab:], torch.zeros(extra, 3, dtype=torch.bfloat16))
    padded[vocab:] = 5.0  # training may move the padding: it still goes
    assert torch.equal(tensors.remove_vocab_padding(padded, vocab), rows)


@pytest.mark.parametrize(
    ("shapes", "groups"),
    [
        (((8, 2), (4, 2), (2, 2)), 2),  # k and v differ
        (((8, 2), (4, 3), (4, 3)), 2),  # another input size
        (((8, 2), (4, 2), (4, 2)), 3),  # 3 groups in 4 rows
        (((6, 2), (4, 2), (4, 2)), 2),  # queries no multiple of keys
    ],
)
def test_pack_qkv_refuses_shapes_that_do_not_fit(shapes: tuple, groups: int) -> None:
    with pytest.raises(ValueError, match="key-value groups"):
        tensors.pack_qkv(*(torch.zeros(shape) for shape in shapes), num_groups=groups)


def test_unpacking_refuses_odd_sizes() -> None:
    with pytest.raises(ValueError, match="9 rows are not 4 query"):
        tensors.unpack_qkv(torch.zeros(9), 4, 2)
    with pytest.raises(ValueError, match="not 3 query"):
        tensors.unpack_qkv(torch.zeros(7), 3, 2)
    with pytest.raises(ValueError, match="gate and up"):
        tensors.unpack_gate_up(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="differ in shape"):
        tensors.pack_gate_up(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="do not fit"):
        tensors.add_vocab_padding(torch.zeros(5, 2), 4)
    with pytest.raises(ValueError, match="fewer than"):
        tensors.remove_vocab_padding(torch.zeros(3, 2), 4)
