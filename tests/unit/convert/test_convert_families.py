"""Every family's table: bitwise there and back, strict about the config, 8-bit blocks."""

import pytest
import torch
from convert_reference import DictSource

from megatron_zero.convert.families import FAMILIES, mapping_for
from megatron_zero.convert.fp8 import DequantizedSource
from megatron_zero.convert.mapping import Mapping
from megatron_zero.convert.random_source import RandomSource
from tests import families

CONFIGS = {name: families.config_of(name) for name in families.FAMILIES} | {
    "deepseek_v3_mtp": families.config_of("deepseek_v3", num_nextn_predict_layers=2)
}


def source_of(mapping: Mapping) -> DictSource:
    random = RandomSource(mapping, 3)
    tensors = {name: random.read(name) + 0.1 for name in random.names()}
    for layer in (4, 5):  # multi-token prediction stores both once more
        for copy, original in (
            ("embed_tokens", "model.embed_tokens"),
            ("shared_head.head", "lm_head"),
        ):
            name = f"model.layers.{layer}.{copy}.weight"
            if name in tensors:
                tensors[name] = tensors[f"{original}.weight"]
    return DictSource(tensors)


def test_every_family_is_here() -> None:
    assert {config["model_type"] for config in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_is_bitwise(name: str, tp_size: int) -> None:
    mapping = mapping_for(CONFIGS[name], 136)
    source = source_of(mapping)
    mapping.check_source(source)
    back = {}
    for megatron_name in mapping.megatron_names():
        shards = [
            mapping.to_megatron_shard(megatron_name, source, rank, tp_size)
            for rank in range(tp_size)
        ]
        full = mapping.merge_shards(megatron_name, shards)
        tensors = mapping.to_hf(megatron_name, full)
        assert tuple(key for key, _ in tensors) == mapping.hf_targets(megatron_name)
        back |= tensors
    assert sorted(back) == sorted(source.names())
    for key, tensor in back.items():
        assert torch.equal(tensor, source.read(key)), key


@pytest.mark.parametrize("name", CONFIGS)
def test_pieces_together_are_the_parameter(name: str) -> None:
    mapping = mapping_for(CONFIGS[name], 136)
    source = source_of(mapping)
    for megatron_name in mapping.megatron_names():
        full = mapping.to_megatron_shard(megatron_name, source, 0, 1)
        pieces = mapping.to_megatron_rows(megatron_name, source)
        assert torch.equal(torch.cat(pieces), full), megatron_name
        stored = list(full.split(3))  # with borders anywhere
        back = mapping.to_hf_rows(megatron_name, stored)
        assert tuple(back) == mapping.hf_targets(megatron_name)
        for key, rows in back.items():
            assert torch.equal(torch.cat(rows), source.read(key)), key


@pytest.mark.parametrize("name", CONFIGS)
def test_checkpoint_entries_are_distinct_and_hold_whole_parameters(name: str) -> None:
    mapping = mapping_for(CONFIGS[name])
    entries = [(n, mapping.checkpoint_entry(n)) for n in mapping.megatron_names()]
    assert len({(e.key, e.expert) for _, e in entries}) == len(entries)
    for megatron_name, entry in entries:
        shape = mapping.full_shape(megatron_name)
        experts = () if entry.expert is None else (mapping.dims["num_experts"],)
        assert entry.shape == (*experts, *shape)
        assert (entry.expert is None) == ("local_experts" not in megatron_name)


def test_prediction_layers_are_kept_or_ignored() -> None:
    config = CONFIGS["deepseek_v3_mtp"]
    kept = mapping_for(config)
    dropped = mapping_for(config, with_mtp=False)
    extra = set(kept.hf_names()) - set(dropped.hf_names())
    assert {name.split(".")[2] for name in extra} == {"4", "5"} and len(extra) == 88
    assert "mtp.layers.1.transformer_layer.mlp.router.weight" in kept.megatron_names()
    dropped.check_source(source_of(kept))  # still in the file, and no error
    with pytest.raises(ValueError, match=r"lacks model\.layers\.4"):
        kept.check_source(source_of(dropped))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (name, changes, message)
        for name in ("qwen3", "llama", "mistral", "mixtral", "qwen3_moe", "deepseek_v3")
        for changes, message in (
            ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
            ({"attention_bias": True}, "attention_bias=True"),
            ({"mlp_bias": True}, "mlp_bias=True"),
            ({"logit_scale": 0.5}, "logit_scale=0.5"),
            ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
            ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "'dynamic'"),
            ({"quantization_config": {"quant_method": "awq"}}, "quantization_config="),
            ({"architectures": ["Other"]}, "architectures="),
        )
    ]
    + [
        ("mistral", {"sliding_window": 4096}, "sliding_window=4096"),
        ("qwen2", {"attention_bias": False}, "attention_bias=False"),
        ("deepseek_v3", {"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc'"),
    ],
)
def test_other_mathematics_is_refused_by_name(name: str, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match="HF config") as error:
        mapping_for(CONFIGS[name] | changes)
    assert message in str(error.value)


def test_a_mistral_that_does_not_say_its_window_has_hf_default_window() -> None:
    config = {k: v for k, v in CONFIGS["mistral"].items() if k != "sliding_window"}
    with pytest.raises(ValueError, match="sliding_window=4096"):
        mapping_for(config)


QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [4, 8]}


def test_blocks_are_dequantized_whole_and_in_slices() -> None:
    torch.manual_seed(0)
    stored = torch.randn(10, 21).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 3) + 0.5
    source = DequantizedSource(
        DictSource({"a.weight": stored, "a.weight_scale_inv": scale, "b": torch.ones(2)}),
        QUANTIZATION,
        torch.float32,
    )
    expected = torch.empty(10, 21)
    for row in range(10):
        for column in range(21):
            expected[row, column] = stored[row, column].float() * scale[row // 4, column // 8]
    assert source.names() == ("a.weight", "b")
    assert source.dtype("a.weight") == torch.float32 and source.shape("a.weight") == (10, 21)
    assert torch.equal(source.read("a.weight"), expected)
    assert torch.equal(source.read("a.weight", slice(3, 9)), expected[3:9])
    assert torch.equal(source.read("a.weight", slice(None), slice(7, 18)), expected[:, 7:18])
    assert torch.equal(source.read("b"), torch.ones(2))


def test_scales_of_another_block_size_are_refused() -> None:
    tensors = {"a": torch.zeros(8, 8).to(torch.float8_e4m3fn), "a_scale_inv": torch.ones(1, 1)}
    source = DequantizedSource(DictSource(tensors), QUANTIZATION)
    with pytest.raises(ValueError, match=r"a_scale_inv has shape \[1, 1\], expected \[2, 1\]"):
        source.read("a")


def test_only_families_that_have_8_bit_checkpoints_accept_them() -> None:
    mapping_for(CONFIGS["deepseek_v3"] | {"quantization_config": QUANTIZATION})
    with pytest.raises(ValueError, match="quantization_config"):
        mapping_for(CONFIGS["qwen2"] | {"quantization_config": QUANTIZATION})
