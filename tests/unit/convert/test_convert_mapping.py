"""The Qwen2 mapping: HF -> shards -> full -> HF, against a second account, and how much is read."""

import pytest
import torch
from convert_reference import CountingSource, DictSource, hf_tensors, qwen2_config, reference_shards
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zero.convert.families import mapping_for
from megatron_zero.convert.mapping import Mapping
from megatron_zero.convert.rules import Family, HfTensor, Rule

PADDED = 56  # of 53: a multiple of 4 with 3 rows of padding


def load(mapping: Mapping, hf: dict, tp_rank: int, tp_size: int) -> dict[str, torch.Tensor]:
    source = DictSource(hf)
    names = (*mapping.megatron_names(), *(["output_layer.weight"] if mapping.tied else []))
    return {name: mapping.to_megatron_shard(name, source, tp_rank, tp_size) for name in names}


def export(mapping: Mapping, shards: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    result: dict[str, torch.Tensor] = {}
    for name in shards[0]:
        full = mapping.merge_shards(name, [shard[name] for shard in shards])
        for hf_name, tensor in mapping.to_hf(name, full):
            assert hf_name not in result
            result[hf_name] = tensor
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_round_trip_is_bitwise_and_shards_match_the_reference(
    tp_size: int, tied: bool, dtype: torch.dtype
) -> None:
    config = qwen2_config(tie_word_embeddings=tied)
    hf = hf_tensors(config, dtype)
    mapping = mapping_for(config, PADDED)
    mapping.check_source(DictSource(hf))
    shards = [load(mapping, hf, rank, tp_size) for rank in range(tp_size)]
    for rank, shard in enumerate(shards):
        expected = reference_shards(hf, config, PADDED, rank, tp_size)
        assert shard.keys() == expected.keys()
        for name, tensor in shard.items():
            assert torch.equal(tensor, expected[name]), (name, rank)
            assert tensor.dtype == dtype
            assert tuple(tensor.shape) == mapping.shard_shape(name, tp_size)
    back = export(mapping, shards)
    assert back.keys() == hf.keys() == set(mapping.hf_names())
    assert all(torch.equal(back[name], hf[name]) for name in hf)
    assert all(back[name].dtype == dtype for name in hf)


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 4),
    heads_per_group=st.integers(1, 4),
    head_dim=st.sampled_from([2, 4, 6]),
    tp_size=st.sampled_from([1, 2, 3, 4, 8]),
    ffn=st.integers(1, 3),
    vocab=st.integers(5, 40),
    tied=st.booleans(),
)
def test_any_sizes_round_trip_or_are_refused(
    groups: int, heads_per_group: int, head_dim: int, tp_size: int, ffn: int, vocab: int, tied: bool
) -> None:
    config = qwen2_config(
        num_attention_heads=groups * heads_per_group,
        num_key_value_heads=groups,
        head_dim=head_dim,
        hidden_size=6,
        intermediate_size=ffn * tp_size,
        vocab_size=vocab,
        num_hidden_layers=1,
        tie_word_embeddings=tied,
    )
    padded = -(-vocab // tp_size) * tp_size
    mapping, hf = mapping_for(config, padded), hf_tensors(config)
    heads = groups * heads_per_group
    divides = [(heads + 2 * groups) * head_dim % tp_size, heads * head_dim % tp_size]
    if any(divides):
        with pytest.raises(ValueError, match="do not divide by tensor-parallel size"):
            load(mapping, hf, 0, tp_size)
        return
    shards = [load(mapping, hf, rank, tp_size) for rank in range(tp_size)]
    for rank, shard in enumerate(shards):
        expected = reference_shards(hf, config, padded, rank, tp_size)
        assert all(torch.equal(shard[name], expected[name]) for name in expected)
    back = export(mapping, shards)
    assert back.keys() == hf.keys() and all(torch.equal(back[n], hf[n]) for n in hf)


def test_more_ranks_than_groups_cut_through_a_group() -> None:
    # One layer's packed rows, one row per head: q0 q1 k0 v0 | q2 q3 k1 v1, two rows per rank.
    config = qwen2_config(head_dim=1, num_hidden_layers=1)
    hf = hf_tensors(config)
    at = "model.layers.0.self_attn."
    for x, start in (("q", 0), ("k", 10), ("v", 20)):
        bias = hf[f"{at}{x}_proj.bias"]
        hf[f"{at}{x}_proj.bias"] = torch.arange(start, start + len(bias)).float()
    mapping = mapping_for(config)
    name = "decoder.layers.0.self_attention.linear_qkv.bias"
    shards = [mapping.to_megatron_shard(name, DictSource(hf), r, 4).tolist() for r in range(4)]
    assert shards == [[0, 1], [10, 20], [2, 3], [11, 21]]


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_a_rank_reads_only_its_part(tp_size: int) -> None:
    config = qwen2_config()
    hf, mapping = hf_tensors(config), mapping_for(config, PADDED)
    hidden, vocab = 24, 53
    for rank in range(tp_size):
        source = CountingSource(hf)
        for name in mapping.megatron_names():
            mapping.to_megatron_shard(name, source, rank, tp_size)
        for name, tensor in hf.items():
            if "norm" in name:
                expected = tensor.numel()
            elif "embed_tokens" in name or "lm_head" in name:
                start, end = (min(vocab, (rank + i) * PADDED // tp_size) for i in (0, 1))
                expected = (end - start) * hidden
            elif any(f"{x}_proj" in name for x in "qkv"):
                heads, own = "qqkvqqkv", 8 // tp_size
                share = heads[rank * own : (rank + 1) * own].count(name[name.index("_proj") - 1])
                expected = tensor.numel() * share // heads.count(name[name.index("_proj") - 1])
            else:
                expected = tensor.numel() // tp_size
            assert source.elements[name] == expected, (name, rank)


def test_a_rank_of_padding_only_reads_nothing() -> None:
    config = qwen2_config(tie_word_embeddings=True)
    source = CountingSource(hf_tensors(config, torch.bfloat16))
    mapping = mapping_for(config, 128)
    name = "embedding.word_embeddings.weight"
    shard = mapping.to_megatron_shard(name, source, 3, 4)
    assert shard.shape == (32, 24) and not shard.any() and shard.dtype == torch.bfloat16
    assert source.elements == {"model.embed_tokens.weight": 0}


def test_tied_output_layer_is_read_from_the_embedding_and_not_exported() -> None:
    config = qwen2_config(tie_word_embeddings=True)
    hf, mapping = hf_tensors(config), mapping_for(config, PADDED)
    assert mapping.tied and "output_layer.weight" not in mapping.megatron_names()
    assert "lm_head.weight" not in mapping.hf_names()
    shard = mapping.to_megatron_shard("output_layer.weight", DictSource(hf), 1, 2)
    assert torch.equal(shard[:25], hf["model.embed_tokens.weight"][28:])
    assert mapping.parameter("output_layer.weight").hf_names == ("model.embed_tokens.weight",)
    assert mapping.to_hf("output_layer.weight", torch.ones(PADDED, 24)) == []


def test_tied_checkpoint_with_a_stored_head_never_reads_it() -> None:
    config = qwen2_config(tie_word_embeddings=True)
    source = CountingSource(hf_tensors(config) | {"lm_head.weight": torch.full((53, 24), 9.0)})
    mapping = mapping_for(config)
    mapping.check_source(source)
    for name in (*mapping.megatron_names(), "output_layer.weight"):
        mapping.to_megatron_shard(name, source, 0, 1)
    assert "lm_head.weight" not in source.elements


def test_transformer_engine_names_are_the_same_parameters() -> None:
    config = qwen2_config()
    mapping, source = mapping_for(config), DictSource(hf_tensors(config))
    for fused, plain in (
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
    ):
        tensors = [
            mapping.to_megatron_shard(f"decoder.layers.1.{name}", source, 0, 1)
            for name in (fused, plain)
        ]
        assert torch.equal(*tensors)
        for name in (fused, plain):
            name = f"decoder.layers.1.{name}"
            assert mapping.canonical_name(name) == f"decoder.layers.1.{plain}"
        assert mapping.to_hf(f"decoder.layers.1.{fused}", tensors[0])[0][0].startswith(
            "model.layers.1."
        )


def test_names_run_in_forward_order() -> None:
    names = mapping_for(qwen2_config()).megatron_names()
    assert names[0] == "embedding.word_embeddings.weight"
    assert [n.split(".")[2] for n in names[1:-2]] == ["0"] * 7 + ["1"] * 7
    assert names[-2:] == ("decoder.final_layernorm.weight", "output_layer.weight")
    assert mapping_for(qwen2_config()).hf_names()[0] == "model.embed_tokens.weight"


def test_replicated_parameter_needs_one_shard_only() -> None:
    mapping = mapping_for(qwen2_config())
    norm = torch.randn(24)
    assert mapping.parameter("decoder.final_layernorm.weight").tp_dim is None
    assert mapping.parameter("decoder.layers.0.self_attention.linear_proj.weight").tp_dim == 1
    for count in (1, 4):
        merged = mapping.merge_shards("decoder.final_layernorm.weight", [norm] * count)
        assert torch.equal(merged, norm)


def test_rules_may_count_experts_too() -> None:
    expert = "mlp.experts.local_experts.{expert}.linear_fc1.weight"
    hf_expert = "model.layers.{layer}.mlp.experts.{expert}."
    shape = ("intermediate_size", "hidden_size")
    family = Family(
        model_type="toy",
        rules=(
            Rule(
                megatron="decoder.layers.{layer}." + expert,
                hf=tuple(HfTensor(f"{hf_expert}{x}_proj.weight", shape) for x in ("gate", "up")),
                kind="gate_up",
                tp_dim=0,
            ),
        ),
        tied_rules=(),
        untied_rules=(),
        checks={},
        defaults={},
        counts={"layer": "num_hidden_layers", "expert": "num_attention_heads"},
    )
    mapping = Mapping(family, qwen2_config(architectures=None))
    assert len(mapping.megatron_names()) == 2 * 4 and len(mapping.hf_names()) == 2 * 4 * 2
    full = torch.randn(80, 24)
    name = "decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight"
    (gate, _), (up, tensor) = mapping.to_hf(name, full)
    assert gate == "model.layers.1.mlp.experts.3.gate_proj.weight"
    assert up == "model.layers.1.mlp.experts.3.up_proj.weight" and torch.equal(tensor, full[40:])
