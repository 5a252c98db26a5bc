"""Reading and writing HF checkpoints, damaged ones included, and random weights."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from convert_reference import DictSource, hf_tensors, qwen2_config
from safetensors.torch import save_file

from megatron_zero.convert.families import mapping_for
from megatron_zero.convert.random_source import RandomSource
from megatron_zero.convert.safetensors_io import (
    INDEX_NAME,
    SINGLE_NAME,
    SafetensorsSource,
    write_hf_checkpoint,
)

CONFIG = qwen2_config()


@pytest.fixture
def hf() -> dict[str, torch.Tensor]:
    return hf_tensors(CONFIG, torch.bfloat16)


@pytest.mark.parametrize(("max_bytes", "num_files"), [(1 << 20, 1), (8000, 4)])
def test_written_checkpoint_is_read_back_bitwise(
    tmp_path: Path, hf: dict, max_bytes: int, num_files: int
) -> None:
    total = write_hf_checkpoint(tmp_path / "out", hf.items(), max_shard_bytes=max_bytes)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert total == sum(t.nbytes for t in hf.values())
    assert len(files) == num_files and (tmp_path / "out" / INDEX_NAME).exists() == (num_files > 1)
    assert all(file.stat().st_size <= max_bytes + 4096 for file in files)
    source = SafetensorsSource(tmp_path / "out")
    mapping_for(CONFIG).check_source(source)
    for name, tensor in hf.items():
        assert source.dtype(name) == torch.bfloat16
        assert torch.equal(source.read(name), tensor)
        assert torch.equal(source.read(name, slice(3, 7)), tensor[3:7])
        if tensor.dim() == 2:
            assert torch.equal(source.read(name, slice(None), slice(5, 6)), tensor[:, 5:6])


def test_shards_of_a_file_equal_shards_from_memory(tmp_path: Path, hf: dict) -> None:
    write_hf_checkpoint(tmp_path / "out", hf.items(), max_shard_bytes=9000)
    file, memory, mapping = (
        SafetensorsSource(tmp_path / "out"),
        DictSource(hf),
        mapping_for(CONFIG, 56),
    )
    for name in mapping.megatron_names():
        for rank in range(4):
            shards = [mapping.to_megatron_shard(name, source, rank, 4) for source in (file, memory)]
            assert torch.equal(*shards)


def test_files_are_opened_only_when_needed(tmp_path: Path, hf: dict) -> None:
    write_hf_checkpoint(tmp_path / "out", hf.items(), max_shard_bytes=8000)
    index = json.loads((tmp_path / "out" / INDEX_NAME).read_text())["weight_map"]
    for file in set(index.values()) - {index["model.norm.weight"]}:
        (tmp_path / "out" / file).write_bytes(b"")
    source = SafetensorsSource(tmp_path / "out")
    assert torch.equal(source.read("model.norm.weight"), hf["model.norm.weight"])


def test_transformers_reads_the_same_files(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = qwen2_config(hidden_size=32)  # heads of 8, as transformers derives them
    tensors = hf_tensors(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    write_hf_checkpoint(
        out, tensors.items(), max_shard_bytes=20000, copy_files=[tmp_path / "config.json"]
    )
    # Without it transformers would build its default model, of many billion parameters.
    assert json.loads((out / "config.json").read_text()) == config
    model = transformers.Qwen2ForCausalLM.from_pretrained(out, dtype=torch.float32)
    state = model.state_dict()
    assert set(state) == set(tensors) == set(mapping_for(config).hf_names())
    assert all(torch.equal(state[name], tensors[name]) for name in tensors)
    saved = json.loads(model.config.to_json_string(use_diff=False))
    assert mapping_for(saved).hf_names() == mapping_for(config).hf_names()


def test_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"neither {SINGLE_NAME} nor"):
        SafetensorsSource(tmp_path)


def test_truncated_file_is_named(tmp_path: Path, hf: dict) -> None:
    path = tmp_path / SINGLE_NAME
    save_file(hf, path)
    data = path.read_bytes()
    for length in (len(data) - 1, 40, 3, 0):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=rf"{SINGLE_NAME} is damaged or not complete"):
            SafetensorsSource(tmp_path)


def test_missing_and_truncated_shard_are_named(tmp_path: Path, hf: dict) -> None:
    write_hf_checkpoint(tmp_path / "out", hf.items(), max_shard_bytes=8000)
    shard = tmp_path / "out" / "model-00002-of-00004.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-2])
    source = SafetensorsSource(tmp_path / "out")
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"{shard.name} is damaged"):
            mapping_for(CONFIG).check_source(source)
    shard.unlink()
    with pytest.raises(ValueError, match=rf"lacks shards \['{shard.name}'\]"):
        SafetensorsSource(tmp_path / "out")


def test_index_that_disagrees_with_its_shards(tmp_path: Path, hf: dict) -> None:
    write_hf_checkpoint(tmp_path / "out", hf.items(), max_shard_bytes=8000)
    path = tmp_path / "out" / INDEX_NAME
    index = json.loads(path.read_text())
    index["weight_map"]["invented"] = index["weight_map"].pop("model.norm.weight")
    path.write_text(json.dumps(index))
    source = SafetensorsSource(tmp_path / "out")
    for _ in range(2):  # a refused shard stays refused
        with pytest.raises(
            ValueError, match=r"disagree about \['invented', 'model\.norm\.weight'\]"
        ):
            source.read("invented")


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": []}'])
def test_malformed_index(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(ValueError, match="is not an index"):
        SafetensorsSource(tmp_path)


def test_unknown_name_and_integer_tensor(tmp_path: Path) -> None:
    save_file({"codes": torch.zeros(4, dtype=torch.int8)}, tmp_path / SINGLE_NAME)
    source = SafetensorsSource(tmp_path)
    with pytest.raises(ValueError, match="no tensor 'weights'"):
        source.shape("weights")
    with pytest.raises(ValueError, match=r"codes in .* is I8"):
        source.read("codes")


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.zeros(10)
        yield "b", torch.zeros(10)
        assert (tmp_path / "out.incomplete" / "0").exists()  # written as it went
        raise RuntimeError("a rank died")

    with pytest.raises(RuntimeError, match="a rank died"):
        write_hf_checkpoint(tmp_path / "out", broken(), max_shard_bytes=40)
    assert list(tmp_path.iterdir()) == []


def test_writer_holds_at_most_one_file_and_copies_what_it_holds(tmp_path: Path) -> None:
    out, buffer = tmp_path / "out", torch.empty(4)

    def reused() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(6):
            written = len(list((tmp_path / "out.incomplete").iterdir()))
            assert number - 2 * written <= 2  # two tensors fill a file
            yield str(number), buffer.fill_(float(number))

    write_hf_checkpoint(out, reused(), max_shard_bytes=32)
    source = SafetensorsSource(out)
    assert [source.read(str(n)).tolist() for n in range(6)] == [[float(n)] * 4 for n in range(6)]


def test_writer_refuses_to_overwrite_and_doubles(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_hf_checkpoint(tmp_path / "out", [("a", torch.ones(2))])  # an empty directory is fine
    with pytest.raises(ValueError, match="exists already"):
        write_hf_checkpoint(tmp_path / "out", [("a", torch.ones(2))])
    with pytest.raises(ValueError, match="tensor a was given twice"):
        write_hf_checkpoint(tmp_path / "new", [("a", torch.ones(2))] * 2)
    with pytest.raises(ValueError, match="no tensors"):
        write_hf_checkpoint(tmp_path / "new", [])
    with pytest.raises(ValueError, match="max_shard_bytes=0"):
        write_hf_checkpoint(tmp_path / "new", [("a", torch.ones(2))], max_shard_bytes=0)
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.incomplete").exists()


def test_stale_partial_directory_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out.incomplete").mkdir()
    (tmp_path / "out.incomplete" / "old").write_text("of a killed run")
    write_hf_checkpoint(tmp_path / "out", [("a", torch.ones(2))])
    assert [p.name for p in (tmp_path / "out").iterdir()] == [SINGLE_NAME]


def test_random_weights_do_not_depend_on_the_layout_or_the_order() -> None:
    mapping = mapping_for(CONFIG, 56)
    full, other = RandomSource(mapping, seed=3), RandomSource(mapping, seed=3)
    mapping.check_source(full)
    for name in reversed(mapping.megatron_names()):
        shards = [mapping.to_megatron_shard(name, other, rank, 4) for rank in range(4)]
        whole = mapping.to_megatron_shard(name, full, 0, 1)
        assert torch.equal(mapping.merge_shards(name, shards), whole)


def test_random_weights_have_the_values_hf_starts_from() -> None:
    mapping = mapping_for(qwen2_config(vocab_size=2000))
    source = RandomSource(mapping, seed=0)
    embedding = source.read("model.embed_tokens.weight")
    assert abs(embedding.std().item() - 0.02) < 2e-4 and abs(embedding.mean().item()) < 4e-4
    assert not source.read("model.layers.0.self_attn.q_proj.bias").any()
    assert source.read("model.layers.1.post_attention_layernorm.weight").eq(1).all()
    assert not torch.equal(embedding, source.read("lm_head.weight"))
    assert not torch.equal(embedding, RandomSource(mapping, 1).read("model.embed_tokens.weight"))
    half = RandomSource(mapping, 0, torch.bfloat16)
    assert half.dtype("lm_head.weight") == torch.bfloat16
    assert torch.equal(half.read("model.embed_tokens.weight"), embedding.to(torch.bfloat16))
    assert embedding[0, :3].tolist() == pytest.approx(GOLDEN)
    with pytest.raises(ValueError, match="invented"):
        source.read("invented")
    with pytest.raises(ValueError, match="initializer_range"):
        RandomSource(mapping_for(qwen2_config(initializer_range=None)), 0)


GOLDEN = [-0.016643818, -0.031038707, 0.0056573697]  # changing these makes old runs unrepeatable
