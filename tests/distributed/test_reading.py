"""Many ranks read a checkpoint once between them, and an export's messages stay within a bucket."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests import families
from tests.launch import REPOSITORY, torchrun

WORLD, BUCKET = 4, 60_000
DAMAGED = "model.layers.3.mlp.experts.2.down_proj.weight"  # one rank reads it in every layout
LAYOUTS = ["dp", "tp2-sp", "ep4", "pp2-ep2", "tp2-sp-ep2-etp2"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    directory: Path = tmp_path_factory.mktemp("reading")
    families.write("qwen3_moe", directory)
    tensors = load_file(directory / "model.safetensors")
    tensors[DAMAGED][-1, -1] = float("nan")
    (directory / "damaged").mkdir()
    save_file(tensors, directory / "damaged" / "model.safetensors")
    worker = REPOSITORY / "tests" / "distributed" / "reading_worker.py"
    output = torchrun(WORLD, worker, directory, str(BUCKET), *LAYOUTS)
    size = (directory / "model.safetensors").stat().st_size
    result = json.loads(output.rsplit("RESULT ", 1)[1].splitlines()[0])
    print(json.dumps({n: [round(b / size, 3) for b in r["read"]] for n, r in result.items()}))
    return {"size": size, "directory": directory, **result}


@pytest.mark.parametrize("layout", ["dp", "ep4", "pp2-ep2"])
def test_replicas_read_a_checkpoint_once_between_them(found: dict, layout: str) -> None:
    read, size = found[layout]["read"], found["size"]
    # the header of the file, which everybody reads, is the rest
    assert 0.99 * size <= sum(read) <= 1.15 * size
    assert max(read) <= 0.5 * size


@pytest.mark.parametrize("layout", ["tp2-sp", "tp2-sp-ep2-etp2"])
def test_tensor_parallel_ranks_read_rows_twice_at_most(found: dict, layout: str) -> None:
    """What TP cuts along dim 1 each of its ranks reads whole; it is on one node, in one cache."""
    assert sum(found[layout]["read"]) <= 1.6 * found["size"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_export_is_whole_and_its_messages_are_bounded(found: dict, layout: str) -> None:
    assert found[layout]["same"]
    # one expert of 49,152 bytes at a time, not the four that EP 4 would gather; a dense layer's
    # gate and up are a single larger tensor; with DP alone nothing travels
    bound = {"dp": 0, "ep4": BUCKET}.get(layout, 2 * 128 * 128 * 4)
    assert found[layout]["largest"] <= bound
    assert (found[layout]["largest"] > 0) == (layout != "dp")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_name_the_tensor_that_one_of_them_finds_damaged(found: dict, layout: str) -> None:
    """Else the first would wait for the one that has ended, and nobody would say why."""
    directory, said = found["directory"], found[layout]["said"]
    (from_file,) = set(said["file"])
    file = directory / "damaged" / "model.safetensors"
    assert from_file.startswith(f"HF tensor {DAMAGED} in {file} holds NaN or infinity, in 1 of ")
    (in_memory,) = set(said["memory"])
    assert in_memory.startswith("model.") and f" in {directory} holds NaN or in" in in_memory
