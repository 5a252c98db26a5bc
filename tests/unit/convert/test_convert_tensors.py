"""Where the rows of HF tensors lie in a Megatron tensor: worked examples, and properties."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zero.convert.tensors import KINDS, take_rows


def test_qkv_order_is_queries_key_value_of_each_group() -> None:
    dims = {"num_key_value_heads": 2}
    rows = KINDS["qkv"].ranges([(4,), (2,), (2,)], dims)
    assert rows == [[(0, 2), (4, 6)], [(2, 3), (6, 7)], [(3, 4), (7, 8)]]
    assert KINDS["qkv"].full_shape([(4, 3), (2, 3), (2, 3)], dims) == (8, 3)


def test_gate_lies_over_up_and_padding_after_the_vocabulary() -> None:
    assert KINDS["gate_up"].ranges([(5, 2), (5, 2)], {}) == [[(0, 5)], [(5, 10)]]
    assert KINDS["gate_up"].full_shape([(5, 2), (5, 2)], {}) == (10, 2)
    dims = {"padded_vocab_size": 8}
    assert KINDS["vocab"].ranges([(5, 2)], dims) == [[(0, 5)]]
    assert KINDS["vocab"].full_shape([(5, 2)], dims) == (8, 2)


@settings(max_examples=60, deadline=None)
@given(groups=st.integers(1, 6), heads_per_group=st.integers(1, 5), head_dim=st.integers(1, 5))
def test_qkv_rows_are_a_permutation(groups: int, heads_per_group: int, head_dim: int) -> None:
    sizes = [groups * heads_per_group * head_dim, groups * head_dim, groups * head_dim]
    rows = KINDS["qkv"].ranges([(size,) for size in sizes], {"num_key_value_heads": groups})
    assert [sum(b - a for a, b in ranges) for ranges in rows] == sizes
    held = [row for ranges in rows for a, b in ranges for row in range(a, b)]
    assert sorted(held) == list(range(sum(sizes)))


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6), data=st.data())
def test_rows_taken_from_pieces_are_those_of_the_whole(sizes: list[int], data: st.DataObject):
    start, end = sorted(data.draw(st.lists(st.integers(0, sum(sizes)), min_size=2, max_size=2)))
    whole = torch.arange(sum(sizes))
    taken = take_rows(whole.split(sizes), start, end)
    assert torch.equal(torch.cat([whole[:0], *taken]), whole[start:end])
    assert all(len(piece) for piece in taken)
