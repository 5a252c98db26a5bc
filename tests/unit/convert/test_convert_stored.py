"""Files that contradict their config, converted there and back: what is stored is what counts."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from convert_reference import DictSource
from test_convert_families import CONFIGS, source_of

from megatron_zero.convert import first_difference, hf_to_megatron, megatron_to_hf
from megatron_zero.convert.dist_checkpoint import CheckpointReader
from megatron_zero.convert.families import mapping_for
from megatron_zero.convert.hf_dir import HF_DTYPES
from megatron_zero.convert.safetensors_io import SafetensorsSource, write_hf_checkpoint
from megatron_zero.convert.stored import folder_corrections, hf_corrections, same_values

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Tensors = dict[str, torch.Tensor]


def tensors_of(name: str) -> Tensors:
    source = source_of(mapping_for(CONFIGS[name]))
    return {key: source.read(key) for key in source.names()}


def write(directory: Path, tensors: Tensors, config: dict) -> Path:
    write_hf_checkpoint(directory, sorted(tensors.items()), max_shard_bytes=300_000)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def there_and_back(base: Path, **options: object) -> list[str]:
    """BASE/hf becomes BASE/megatron and that BASE/back; what was said, of both."""
    said = hf_to_megatron(base / "hf", base / "megatron", progress=False, **options)
    return said + megatron_to_hf(base / "megatron", base / "back", progress=False)


def told(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


# An output layer in the files of a tied model.


def other(embedding: torch.Tensor) -> torch.Tensor:
    return -embedding


def off_in_the_last_place(embedding: torch.Tensor) -> torch.Tensor:
    head = embedding.clone()
    head[-1, -1] = torch.nextafter(head[-1, -1], torch.tensor(9.0))
    return head


@pytest.mark.parametrize("name", ["qwen2_tied", "llama"])
@pytest.mark.parametrize("head", [other, off_in_the_last_place])
def test_another_output_layer_is_kept_and_said(
    tmp_path: Path, name: str, head: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    tensors = tensors_of(name)
    tensors[HEAD] = head(tensors[EMBEDDING])
    write(tmp_path / "hf", tensors, CONFIGS[name])
    said = there_and_back(tmp_path)
    assert first_difference(tmp_path / "hf", tmp_path / "back") is None
    for directory in ("megatron", "back"):
        assert told(tmp_path / directory) == CONFIGS[name] | {"tie_word_embeddings": False}
    assert sum("the model is untied" in line for line in said) == 1
    assert said[0].startswith(f"{tmp_path / 'hf'}: {HEAD} is stored and is not the embedding")
    # the config of the original says again that they are tied, the checkpoint knows better
    again = megatron_to_hf(
        tmp_path / "megatron", tmp_path / "again", hf_config=tmp_path / "hf", progress=False
    )
    assert first_difference(tmp_path / "hf", tmp_path / "again") is None
    assert "output_layer.weight is stored" in again[0]
    assert told(tmp_path / "again")["tie_word_embeddings"] is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_output_layer_is_redundant(tmp_path: Path, dtype: torch.dtype) -> None:
    """It does not come back, and neither do rotary buffers: docs/converting.md."""
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors = tensors_of("qwen2_tied")
    tensors |= {HEAD: tensors[EMBEDDING].to(dtype), buffer: torch.ones(16)}
    write(tmp_path / "hf", tensors, CONFIGS["qwen2_tied"])
    assert not any("untied" in line for line in there_and_back(tmp_path))
    back = SafetensorsSource(tmp_path / "back")
    assert {*back.names()} == {*tensors} - {HEAD, buffer}
    assert first_difference(tmp_path / "hf", tmp_path / "back") is not None
    assert told(tmp_path / "back") == CONFIGS["qwen2_tied"]


def test_an_output_layer_of_another_shape_is_refused(tmp_path: Path) -> None:
    tensors = tensors_of("qwen2_tied")
    tensors[HEAD] = tensors[EMBEDDING][:-1]
    write(tmp_path / "hf", tensors, CONFIGS["qwen2_tied"])
    shapes = r"\[130, 128\], expected \[131, 128\]"
    with pytest.raises(ValueError, match=rf"{HEAD} in .*safetensors has shape {shapes}"):
        there_and_back(tmp_path)


def test_verification_knows_the_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the logits are compared in a process of its own, tests/distributed
    monkeypatch.setattr("megatron_zero.convert.verify._logits_problem", lambda mapping: "not here")
    tensors = tensors_of("qwen2_tied")
    tensors[HEAD] = other(tensors[EMBEDDING])
    write(tmp_path / "hf", tensors, CONFIGS["qwen2_tied"])
    said = there_and_back(tmp_path, verify=True)
    assert f"verified: {len(tensors)} tensors are the same on both sides" in said


def test_a_difference_anywhere_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_zero.convert.stored._BLOCK_ELEMENTS", 10)
    for row in (0, 4, 12):
        one = torch.zeros(13, 4)
        two = one.clone()
        source = DictSource({"one": one, "two": two})
        assert same_values(source, "one", "two")
        two[row, 3] = 1
        assert not same_values(source, "one", "two")


# Multi-token prediction.

MTP = CONFIGS["deepseek_v3_mtp"]


def test_prediction_layers_that_are_not_stored_are_dropped_and_said(tmp_path: Path) -> None:
    """As transformers saves DeepSeek-V3; also where a query has no bottleneck."""
    for number, name in enumerate(("deepseek_v3", "deepseek_v3_whole_query")):
        base = tmp_path / name
        base.mkdir()
        config = CONFIGS["deepseek_v3"] | ({"q_lora_rank": None} if number else {})
        source = source_of(mapping_for(config))
        tensors = {key: source.read(key) for key in source.names()}
        write(base / "hf", tensors, config | {"num_nextn_predict_layers": 1})
        said = there_and_back(base)
        assert first_difference(base / "hf", base / "back") is None
        assert said[0].endswith("num_nextn_predict_layers=1: the model has none")
        assert told(base / "back") == told(base / "megatron") == config


def test_prediction_layers_that_are_stored_are_kept(tmp_path: Path) -> None:
    write(tmp_path / "hf", tensors_of("deepseek_v3_mtp"), MTP)
    assert not any("the model has none" in line for line in there_and_back(tmp_path))
    assert first_difference(tmp_path / "hf", tmp_path / "back") is None
    assert told(tmp_path / "back") == MTP


@pytest.mark.parametrize("lost", ["model.layers.5.eh_proj.weight", "model.layers.5."])
def test_prediction_layers_that_are_stored_in_part_are_refused(tmp_path: Path, lost: str) -> None:
    tensors = {k: t for k, t in tensors_of("deepseek_v3_mtp").items() if not k.startswith(lost)}
    write(tmp_path / "hf", tensors, MTP)
    with pytest.raises(ValueError, match=r"lacks model.layers.5.eh_proj.*--drop-mtp leaves it out"):
        there_and_back(tmp_path)
    there_and_back(tmp_path, drop_mtp=True)
    assert told(tmp_path / "back") == MTP | {"num_nextn_predict_layers": 0}


@pytest.mark.parametrize("copy", ["embed_tokens", "shared_head.head"])
def test_a_prediction_layer_with_an_embedding_of_its_own_is_refused(
    tmp_path: Path, copy: str
) -> None:
    tensors, name = tensors_of("deepseek_v3_mtp"), f"model.layers.4.{copy}.weight"
    tensors[name] = tensors[name] + 1
    write(tmp_path / "hf", tensors, MTP)
    with pytest.raises(ValueError, match=f"{name} is not .*: --drop-mtp leaves these layers out"):
        there_and_back(tmp_path)
    there_and_back(tmp_path, drop_mtp=True)


# Tensors of unlike types that Megatron joins.

UNLIKE = {
    "qwen2": ["layers.0.self_attn.k_proj.weight", "layers.1.self_attn.v_proj.bias"],
    "qwen2_tied": ["layers.2.mlp.up_proj.weight", "layers.3.input_layernorm.weight", "norm.weight"],
    "qwen3_moe": ["layers.1.mlp.experts.2.", "layers.2.mlp.experts.0.down_proj", "mlp.gate."],
    "mixtral": ["experts.1.w3.weight"],
    "deepseek_v3_mtp": ["shared_experts.gate_proj", "experts.3.", "layers.4.embed_tokens"],
}


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", UNLIKE)
def test_unlike_types_come_back_as_they_were(
    tmp_path: Path, name: str, narrow: torch.dtype
) -> None:
    tensors = tensors_of(name)
    changed = [key for key in tensors if any(part in key for part in UNLIKE[name])]
    for key in changed:
        tensors[key] = tensors[key].to(narrow)
    for key, original in mapping_for(CONFIGS[name]).copies().items():
        if key in tensors:  # narrower numbers, and so a narrower original
            tensors[original] = tensors[original].to(narrow).float()
            tensors[key] = tensors[original].to(tensors[key].dtype)
    write(tmp_path / "hf", tensors, CONFIGS[name])
    there_and_back(tmp_path)
    assert first_difference(tmp_path / "hf", tmp_path / "back") is None
    recorded = json.loads((tmp_path / "megatron" / HF_DTYPES).read_text())
    assert recorded.keys() <= {*changed} and not (tmp_path / "back" / HF_DTYPES).exists()


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe"])
def test_unlike_types_become_the_one_that_is_asked_for(
    tmp_path: Path, name: str, dtype: str
) -> None:
    tensors = tensors_of(name)
    for i, key in enumerate(sorted(tensors)):
        tensors[key] = tensors[key].to([torch.float32, torch.bfloat16, torch.float16][i % 3])
    write(tmp_path / "hf", tensors, CONFIGS[name])
    there_and_back(tmp_path, dtype=dtype)
    back = SafetensorsSource(tmp_path / "back")
    wanted = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    for key, tensor in tensors.items():
        assert torch.equal(back.read(key), tensor.to(wanted)), key
    assert not (tmp_path / "megatron" / HF_DTYPES).exists()


def test_the_widest_type_holds_both_of_two_narrow_ones(tmp_path: Path) -> None:
    tensors = {key: tensor.bfloat16() for key, tensor in tensors_of("qwen2").items()}
    key = "model.layers.0.self_attn.q_proj.weight"
    tensors[key] = tensors[key].half()
    write(tmp_path / "hf", tensors, CONFIGS["qwen2"])
    there_and_back(tmp_path)
    reader = CheckpointReader(tmp_path / "megatron")
    joined = "decoder.layers.0.self_attention.linear_qkv.weight"
    assert reader.dtype(joined) == torch.float32
    assert reader.dtype(joined.replace("layers.0", "layers.1")) == torch.bfloat16
    assert first_difference(tmp_path / "hf", tmp_path / "back") is None


def test_what_cannot_be_read_here_has_no_corrections(tmp_path: Path) -> None:
    """The engine has more families, and more formats."""
    assert folder_corrections(CONFIGS["qwen2_tied"], tmp_path).fields == {}
    assert folder_corrections({"model_type": "gemma2"}, tmp_path).fields == {}
    with pytest.raises(ValueError, match="model_type='gemma2'"):
        hf_corrections({"model_type": "gemma2"}, DictSource({}), tmp_path)
