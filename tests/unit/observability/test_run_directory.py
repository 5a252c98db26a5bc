import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_zero.checks import UserError
from megatron_zero.config import ModelConfig, RunConfig
from megatron_zero.config_io import load_config
from megatron_zero.observability.environment import collect_environment, git_commit
from megatron_zero.observability.run_dir import (
    RunDir,
    check_startable,
    create_run_dir,
    write_atomically,
)
from megatron_zero.step_names import step_name

RESULTS = [
    "metrics.jsonl",
    "rollouts/step_000010.jsonl.zst",
    "checkpoints/step_000010/x",
    "hf/step_000010/x",
    "eval/step_000010.json",
]


@pytest.fixture
def config(tmp_path):
    return RunConfig(name="run", runs_dir=str(tmp_path / "runs"), model=ModelConfig(path="m"))


def leave(run_dir: RunDir, result: str) -> Path:
    path = run_dir.path / result
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("kept")
    return path


def test_layout(tmp_path):
    run_dir = RunDir(tmp_path)
    relative = [
        str(path.relative_to(tmp_path))
        for path in (
            run_dir.config,
            run_dir.environment,
            run_dir.metrics,
            run_dir.rollouts(10),
            run_dir.checkpoint(10),
            run_dir.hf(10),
            run_dir.evaluation(10),
            run_dir.report,
        )
    ]
    assert relative == [
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "rollouts/step_000010.jsonl.zst",
        "checkpoints/step_000010",
        "hf/step_000010",
        "eval/step_000010.json",
        "report.html",
    ]
    assert list(tmp_path.iterdir()) == []  # naming makes nothing
    assert sorted([step_name(9), step_name(10), step_name(100)])[0] == step_name(9)


def test_a_new_run(config):
    run_dir = create_run_dir(config, resume=False, environment={"world_size": 2, "é": None})
    assert str(run_dir.path) == config.run_dir
    assert load_config(run_dir.config) == config
    assert json.loads(run_dir.environment.read_text()) == {"world_size": 2, "é": None}
    assert not run_dir.has_results()


@pytest.mark.parametrize("result", RESULTS)
def test_results_are_only_continued(config, result):
    run_dir = create_run_dir(config, resume=False)
    path = leave(run_dir, result)
    other = replace(config, seed=9)
    with pytest.raises(ValueError, match=r"runs/run: holds the results .*--resume.*name="):
        create_run_dir(other, resume=False)
    assert load_config(run_dir.config) == config and path.read_text() == "kept"
    create_run_dir(other, resume=True)
    assert load_config(run_dir.config) == other and path.read_text() == "kept"
    assert load_config(run_dir.path / "config.1.yaml") == config


def test_every_earlier_config_is_kept_once(config):
    run_dir = create_run_dir(config, resume=False)
    leave(run_dir, "metrics.jsonl")
    for seed in (1, 1, 2):
        create_run_dir(replace(config, seed=seed), resume=True, environment={"seed": seed})
    seeds = {p.name: load_config(p).seed for p in run_dir.path.glob("config*.yaml")}
    assert seeds == {"config.1.yaml": 0, "config.2.yaml": 1, "config.yaml": 2}
    assert json.loads((run_dir.path / "environment.1.json").read_text()) == {"seed": 1}


@pytest.mark.parametrize("leftover", ["config.yaml", "environment.json", "tensorboard/x"])
def test_a_start_that_failed_can_be_repeated(config, leftover):
    run_dir = RunDir.of(config)
    leave(run_dir, leftover)
    run_dir.metrics.touch()  # opened, nothing logged
    create_run_dir(config, resume=False, environment={})
    assert load_config(run_dir.config) == config
    assert not (run_dir.path / "config.1.yaml").exists()


def test_resuming_nothing_starts(config):
    assert load_config(create_run_dir(config, resume=True).config) == config


def test_a_file_in_the_way(config, tmp_path):
    (tmp_path / "runs").mkdir()
    Path(config.run_dir).write_text("")
    with pytest.raises(ValueError, match="is a file"):
        check_startable(config.run_dir, resume=True)


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a" / "b"
    write_atomically(path, b"first")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        write_atomically(path, b"second")
    assert path.read_bytes() == b"first"


def test_the_environment_names_versions_hardware_and_kernels():
    import torch

    found = collect_environment({"attention": "SDPA"}, world_size=2)
    assert found["versions"]["torch"] == torch.__version__
    for package in ("python", "megatron-core", "vllm", "transformers", "transformer-engine"):
        assert package in found["versions"]
    assert found["hardware"]["cpus"] >= 1 and found["hardware"]["memory_gib"] > 0
    assert found["hardware"]["gpus"] == [] or torch.cuda.is_available()
    assert found["kernels"] == {"attention": "SDPA"} and found["world_size"] == 2
    json.dumps(found)


def test_the_commit_says_when_files_differ(tmp_path):
    import subprocess

    assert git_commit(tmp_path / "none") is None
    assert git_commit(tmp_path) is None

    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True)

    git("init", "-q")
    assert git_commit(tmp_path) is None
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-q", "-m", "a")
    commit = git_commit(tmp_path)
    assert len(commit) == 40
    (tmp_path / "a").write_text("2")
    assert git_commit(tmp_path) == f"{commit}+changes"


# directories that cannot be made


@pytest.fixture
def without_privileges(tmp_path_factory):
    """A folder that nobody may write to, seen by somebody who is not root, who may do anything."""
    folder = Path(tempfile.mkdtemp())  # tmp_path lies in a folder that only its owner may enter
    folder.chmod(0o755)
    made = folder / "theirs" / "run"
    for name in ("checkpoints", "eval"):
        (made / name).mkdir(parents=True)
    (made / "checkpoints").chmod(0o777)
    made.chmod(0o777)
    (folder / "locked").mkdir(mode=0o700)
    folder.chmod(0o555)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    else:
        (made / "eval").chmod(0o555)
        (folder / "theirs").chmod(0o555)
        (folder / "locked").chmod(0)
    yield folder
    if is_root:
        os.seteuid(0)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    shutil.rmtree(folder)


def refusal(config, **changes) -> str:
    config = replace(config, **changes)
    with pytest.raises(UserError) as caught:
        create_run_dir(config, resume=True)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"run directory {config.run_dir}: ")
    return message.removeprefix(f"run directory {config.run_dir}: ")


SETTINGS = "; runs_dir and name, or --run-dir, say where it is"


@pytest.mark.parametrize(
    ("runs_dir", "reason"),
    [
        ("file", "Not a directory ({}/file is a file)"),
        ("file/below/it", "Not a directory ({}/file is a file)"),
        ("dangling", "File exists ({}/dangling)"),
        ("loop", "Too many levels of symbolic links"),
        pytest.param("x" * 300, "File name too long", id="long"),
        ("/proc/self", "No such file or directory"),
    ],
)
def test_a_run_directory_that_cannot_be_made(config, tmp_path, runs_dir, reason):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    message = refusal(config, runs_dir=str(tmp_path / runs_dir))
    assert message.startswith(f"cannot be made or written: {reason.format(tmp_path)}")
    assert message.endswith(SETTINGS)


def test_a_name_that_is_too_long(config):
    message = refusal(config, name="x" * 300)
    assert message == f"cannot be made or written: File name too long{SETTINGS}"


def test_runs_dir_may_be_missing_with_its_parents(config, tmp_path):
    made = create_run_dir(replace(config, runs_dir=str(tmp_path / "a" / "b")), resume=False)
    assert load_config(made.config).runs_dir == str(tmp_path / "a" / "b")


def test_no_permission(config, without_privileges):
    denied = "cannot be made or written: Permission denied"
    message = refusal(config, runs_dir=str(without_privileges))
    assert message == f"{denied}{SETTINGS}"
    message = refusal(config, runs_dir=str(without_privileges / "new" / "runs"))
    assert message == f"{denied} ({without_privileges}/new){SETTINGS}"
    assert denied in refusal(config, runs_dir=str(without_privileges / "locked"))
    # the directory itself can be written, but not what a run would write at its end
    message = refusal(config, runs_dir=str(without_privileges / "theirs"))
    assert message == "its eval cannot be written"


@pytest.mark.parametrize("folder", ["rollouts", "checkpoints", "hf", "eval", "model"])
def test_a_file_where_a_folder_goes_is_found_at_the_start(config, folder):
    leave(RunDir.of(config), folder)
    assert refusal(config) == f"its {folder} is a file"


def test_a_folder_where_the_config_goes(config):
    leave(RunDir.of(config), "config.yaml/x")
    assert refusal(config).startswith("cannot be made or written: Is a directory")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs_dir": ""}, "runs_dir='': must be a folder; '.' is the one you are in"),
        ({"name": "a\0b"}, r"name='a\x00b': must not hold a NUL character"),
        ({"runs_dir": "a\0b"}, r"runs_dir='a\x00b': must not hold a NUL character"),
    ],
)
def test_settings_that_can_be_no_directory(config, changes, message):
    with pytest.raises(ValueError) as caught:
        replace(config, **changes)
    assert str(caught.value) == message


def test_a_tilde_is_the_home_folder(config, tmp_path, monkeypatch):
    """Otherwise a folder named ~ would be made, which nobody dares to delete."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run_dir = create_run_dir(replace(config, runs_dir="~/runs"), resume=False)
    assert run_dir.path == tmp_path / "home" / "runs" / "run"
    assert load_config(run_dir.config).runs_dir == "~/runs"
