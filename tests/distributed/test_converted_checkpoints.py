"""Converted checkpoints under the real Megatron: any layout reads them, and its own come back."""

import json
import sys
from pathlib import Path

import pytest
import torch

from megatron_zero.convert import first_difference, hf_to_megatron, megatron_to_hf
from megatron_zero.convert.families import mapping_for
from megatron_zero.convert.safetensors_io import SafetensorsSource, write_hf_checkpoint
from tests import families
from tests.launch import REPOSITORY, run, torchrun

# model -> layouts that read its conversion
CASES = {
    "qwen2_tied": ["dp4", "tp4", "pp2", "tp2-pp2"],
    "qwen2": ["tp2-pp2", "pp2-vp2", "cp2"],
    "qwen3_moe": ["dp4", "tp2-sp-pp2-ep2"],
    "deepseek_v3": ["pp2-vp2-ep2", "tp2-sp-ep2"],
}
LAYOUTS = [(name, layout) for name, layouts in CASES.items() for layout in layouts]


def write_hf(directory: Path, *, seed: int = 0, name: str = "qwen2") -> Path:
    """Every tensor random, norms and biases too: a swapped one would show."""
    config = families.config_of(name)
    mapping = mapping_for(config)
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: mapping.hf_shape(name) for name in mapping.hf_names()}
    tensors = {
        key: (0.05 * torch.randn(shape, generator=generator) + (len(shape) == 1)).bfloat16()
        for key, shape in shapes.items()
    }
    for key in tensors:
        if key.endswith("e_score_correction_bias"):
            tensors[key] = tensors[key].float()
    write_hf_checkpoint(directory, tensors.items(), max_shard_bytes=300_000)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Per model `hf`, `megatron` made of it for TP 2, PP 2, and exports of what layouts read."""
    base = tmp_path_factory.mktemp("converted")
    directories = {name: base / name for name in CASES}
    for name, directory in directories.items():
        write_hf(directory / "hf", name=name)
        hf_to_megatron(
            directory / "hf",
            directory / "megatron",
            tensor_model_parallel_size=2,
            pipeline_model_parallel_size=2,
            progress=False,
        )
    worker = REPOSITORY / "tests" / "distributed" / "converted_worker.py"
    torchrun(4, worker, *(f"{directories[name]}:{layout}" for name, layout in LAYOUTS))
    return directories


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_megatron_reads_what_was_converted(
    converted: dict[str, Path], name: str, layout: str
) -> None:
    assert first_difference(converted[name] / "hf", converted[name] / layout) is None


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen2"])
def test_a_training_checkpoint_becomes_the_original(converted: dict[str, Path], name: str) -> None:
    directory = converted[name]
    step = directory / "checkpoints" / "step_000001"
    with pytest.raises(ValueError, match="hf_config=None: must be given"):
        megatron_to_hf(step, directory / "never", progress=False)
    megatron_to_hf(step, directory / "exported", hf_config=directory / "hf", progress=False)
    assert first_difference(directory / "hf", directory / "exported") is None
    (directory / "model").mkdir()  # where a run keeps config and tokenizer
    (directory / "model" / "config.json").write_bytes((directory / "hf/config.json").read_bytes())
    megatron_to_hf(step, directory / "wide", dtype="fp32", progress=False)
    wide, hf = SafetensorsSource(directory / "wide"), SafetensorsSource(directory / "hf")
    assert all(torch.equal(wide.read(n), hf.read(n).float()) for n in hf.names())


def test_logits_are_compared_with_transformers(tmp_path: Path) -> None:
    """The programs as they are called, from a checkout; of a model beyond its first length.

    And the output layer is another one than the embedding, although they are said to be tied.
    """
    write_hf(tmp_path / "hf")
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
    changes = {"tie_word_embeddings": True, "rope_parameters": yarn | {"rope_theta": 10000.0}}
    config = json.loads((tmp_path / "hf" / "config.json").read_text()) | changes
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    tool = [sys.executable, str(REPOSITORY / "tools" / "convert" / "hf_to_megatron.py")]
    output = run([*tool, str(tmp_path / "hf"), str(tmp_path / "megatron"), "--verify"])
    assert "lm_head.weight is stored and is not the embedding" in output
    assert "verified: 51 tensors are the same on both sides" in output
    assert "logits: largest relative difference" in output
    write_hf(tmp_path / "other", seed=1)
    check = [sys.executable, "-m", "megatron_zero.policy.check_logits"]
    paths = [str(tmp_path / "other"), str(tmp_path / "megatron")]
    assert "bound 1e-05" in run([*check, *paths], expect_status=1)
