"""Only what is named exactly as a step is a step: not read, counted or deleted is all else."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zero.analyze_tables import rollout_files
from megatron_zero.observability.run_dir import RunDir
from megatron_zero.policy.checkpoint import load_latest, prune, saved_steps
from megatron_zero.step_names import step_name, step_of, steps_in

# What people and tools leave beside step_000004 and step_000010.
OTHERS = [
    "step_5_keep",
    "step_000005_keep",
    "step_000010.bak",
    "step_000010 (copy)",
    "step_000010~",
    "step_latest",
    "step_000004_1",
    "step_0_0001",
    "step_00_0011",
    "step_10",
    "step_00010",
    "step_0000010",
    "step_-00010",
    "step_+00010",
    "step_ 000010",
    "step_000010 ",
    "step_000010\n",
    "step_٠٠٠٠١٢",
    "step_00001²",
    "step_",
    "Step_000012",
    "xstep_000012",
    "step_1e6",
    "old",
]


@pytest.mark.parametrize("name", OTHERS)
def test_other_names_are_no_steps(name):
    assert step_of(name) is None


@settings(deadline=None)
@given(st.integers(0, 10**9))
def test_a_steps_own_name_is_its(step):
    assert step_of(step_name(step)) == step


@settings(deadline=None)
@given(st.text(max_size=12))
def test_whatever_is_read_as_a_step_has_its_name(text):
    step = step_of(f"step_{text}")
    assert step is None or step_name(step) == f"step_{text}"


def test_steps_come_in_order_of_steps_not_of_names(tmp_path):
    for step in (10**6, 999_999, 4):
        (tmp_path / step_name(step)).mkdir()
    assert steps_in(tmp_path) == [4, 999_999, 10**6]
    assert steps_in(tmp_path / "none") == []


def content_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.fixture
def checkpoints(tmp_path):
    """Three checkpoints among everything else, all of it with something inside."""
    folder = tmp_path / "run" / "checkpoints"
    for name in ("step_000004", "step_000007", "step_000010", *OTHERS):
        (folder / name).mkdir(parents=True)
        (folder / name / "metadata.json").write_text("{}")
    for name in OTHERS:
        (folder / f"{name}.incomplete").mkdir()
    (folder / "step_000012").write_text("a file")
    (folder / "step_000013.incomplete").write_text("a file")
    return folder


def test_only_checkpoints_are_counted(checkpoints):
    assert saved_steps(checkpoints) == [4, 7, 10]


@pytest.mark.parametrize(
    ("keep", "left"), [(0, [4, 7, 10]), (1, [10]), (2, [7, 10]), (3, [4, 7, 10]), (9, [4, 7, 10])]
)
def test_retention_removes_checkpoints_and_nothing_else(checkpoints, keep, left):
    (checkpoints / "step_000011.incomplete").mkdir()
    before = content_of(checkpoints)
    prune(checkpoints, keep=keep)
    assert saved_steps(checkpoints) == left
    gone = {step for step in (4, 7, 10) if step not in left}
    paths = {f"{step_name(s)}{inside}" for s in gone for inside in ("", "/metadata.json")}
    assert before - content_of(checkpoints) == {"step_000011.incomplete", *paths}


def test_a_checkpoint_that_is_a_link_is_read_and_not_removed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder = tmp_path / "checkpoints"
    for step in (7, 10):
        (folder / step_name(step)).mkdir(parents=True)
    (folder / "step_000004").symlink_to(elsewhere)
    (folder / "step_000005.incomplete").symlink_to(elsewhere)
    assert saved_steps(folder) == [4, 7, 10]
    prune(folder, keep=1)
    assert elsewhere.is_dir() and saved_steps(folder) == [4, 10]


def test_nothing_is_resumed_from_folders_with_other_names(tmp_path):
    for name in OTHERS:
        (tmp_path / name).mkdir()
    assert load_latest(tmp_path, policy=None) is None


def test_rollouts_are_those_of_steps_in_order(tmp_path):
    run_dir = RunDir(tmp_path)
    for name in (*OTHERS, *map(step_name, (10**6, 999_999, 4))):
        path = run_dir.path / "rollouts" / f"{name}.jsonl.zst"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    (run_dir.path / "rollouts" / ".step_000005.jsonl.zst.partial").write_bytes(b"")
    (run_dir.path / "rollouts" / "step_000005.jsonl.zst.bak").write_bytes(b"")
    assert rollout_files(tmp_path) == [run_dir.rollouts(step) for step in (4, 999_999, 10**6)]
