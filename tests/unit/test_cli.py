import json
import os
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import pytest

import megatron_zero
from megatron_zero import cli, config_io, hf_config, launch_args
from megatron_zero.config import ModelConfig, PretrainConfig, RunConfig

ROOT = Path(megatron_zero.__file__).parents[1]
SMALL = ModelConfig(init="random", tokenizer="characters")
CONFIG = RunConfig(name="small", model=SMALL)
LAUNCH_VARIABLES = ("TORCHELASTIC_RUN_ID", *launch_args.JOB_VARIABLES)


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in (*LAUNCH_VARIABLES, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    config_io.save_config(CONFIG, "small.yaml")


@pytest.fixture
def executed(monkeypatch):
    """What would have been executed: [(command, environment)]."""
    calls = []
    monkeypatch.setattr(os, "execve", lambda path, argv, env: calls.append((argv, env)))
    return calls


def run_cli(*words: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": f"{Path.cwd()}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "megatron_zero.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)


def refused(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_train_becomes_torchrun_on_the_saved_config(executed):
    assert (
        cli.main(["train", "small.yaml", "num_steps=7", "--nproc", "2", "--run-dir", "out/x"]) == 0
    )
    ((command, env),) = executed
    assert command == [
        sys.executable,
        "-m",
        "megatron_zero.torchrun",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "--",
        "megatron_zero.train",
        "out/x/config.yaml",
    ]
    assert env["OMP_NUM_THREADS"] == "1"
    saved = config_io.load_config("out/x/config.yaml")
    assert (saved.num_steps, saved.name, saved.runs_dir) == (7, "x", "out")


def test_processes_default_to_the_gpus(executed, monkeypatch):
    cli.main(["train", "small.yaml"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    cli.main(["train", "small.yaml"])
    (cpu, _), (gpu, gpu_env) = executed
    assert "--nproc-per-node=1" in cpu and "--nproc-per-node=4" in gpu
    assert "OMP_NUM_THREADS" not in gpu_env


def test_a_thread_count_that_is_set_stays(executed, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    cli.main(["train", "small.yaml"])
    assert executed[0][1]["OMP_NUM_THREADS"] == "5"


def test_pretrain_runs_pretrain(executed):
    config_io.save_config(PretrainConfig(name="base", model=SMALL), "base.yaml")
    cli.main(["pretrain", "base.yaml"])
    assert executed[0][0][-2:] == ["megatron_zero.pretrain", "runs/base/config.yaml"]


def test_results_are_not_written_over(executed, capsys):
    cli.main(["train", "small.yaml"])
    cli.main(["train", "small.yaml"])  # nothing was learned yet: may be started again
    metrics = Path("runs/small/metrics.jsonl")
    metrics.write_text('{"step": 0}\n')
    error = refused(capsys, "train", "small.yaml")
    assert "runs/small" in error and "--resume" in error
    assert len(executed) == 2 and metrics.read_text() == '{"step": 0}\n'


def test_resume_reports_what_is_different(executed, capsys):
    cli.main(["train", "small.yaml"])
    Path("runs/small/metrics.jsonl").write_text('{"step": 0}\n')
    capsys.readouterr()
    cli.main(["train", "runs/small/config.yaml", "--resume", "num_steps=200"])
    assert "resumed with num_steps=200 (was 100)" in capsys.readouterr().out
    assert executed[-1][0][-2:] == ["runs/small/config.yaml", "--resume"]
    assert config_io.load_config("runs/small/config.yaml").num_steps == 200
    assert config_io.load_config("runs/small/config.1.yaml").num_steps == 100


def test_resume_of_another_kind_is_refused(executed, capsys):
    cli.main(["train", "small.yaml"])
    config_io.save_config(PretrainConfig(name="small", model=SMALL), "base.yaml")
    assert "is a train run" in refused(capsys, "pretrain", "base.yaml", "--resume")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["train", "small.yaml", "rollout.group_sise=4"], "did you mean rollout.group_size?"),
        (["train", "small.yaml", "rollout.group_size=x"], "rollout.group_size='x': must be an int"),
        (["train", "none.yaml"], "none.yaml: cannot be read: No such file"),
        (["pretrain", "small.yaml"], "`megatron-zero train`, not `pretrain`"),
        (["trian", "small.yaml"], "did you mean train?"),
        (["train"], "needs a recipe or a YAML file"),
        (["train", "small.yaml", "--nproc", "-1"], "--nproc=-1: must be at least 1"),
        (
            ["train", "small.yaml", "--nproc", "3", "parallel.tensor_model_parallel_size=3"],
            "parallel.tensor_model_parallel_size=3: must divide the model's attention heads=4",
        ),
        (
            ["train", "small.yaml", "--nproc", "3"],
            "batch.global_batch_size=128: must be a multiple of the data-parallel size, 3",
        ),
        (
            ["train", "small.yaml", "model.init=pretrained", "model.path=/no/where"],
            "model.path='/no/where': no such folder",
        ),
    ],
)
def test_mistakes_are_one_line_and_start_nothing(words, part, executed, capsys):
    assert part in refused(capsys, *words)
    assert not executed and not Path("runs").exists()


def test_under_torchrun_the_command_runs_here(executed, monkeypatch):
    ran = []
    module = types.SimpleNamespace(main=ran.append)
    monkeypatch.setitem(sys.modules, "megatron_zero.train", module)
    for name in launch_args.JOB_VARIABLES:
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert cli.main(["train", "small.yaml", "--resume"]) == 0
    assert ran == [["small.yaml", "--resume"]] and not executed


@pytest.mark.parametrize("command", ["train", "pretrain", "eval"])
def test_leftover_variables_of_a_job_are_named(command, executed, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    config_io.save_config(PretrainConfig(name="base", model=SMALL), "base.yaml")
    folder = Path("model")
    folder.mkdir()
    (folder / "tokenizer.json").write_text('{"model": {}, "added_tokens": []}')
    sizes = dict.fromkeys(hf_config._REQUIRED, 8)
    (folder / "config.json").write_text(json.dumps(sizes))
    target = {"train": ["small.yaml"], "pretrain": ["base.yaml"]}
    target["eval"] = ["model", "--out", "out", "--benchmarks", "arithmetic"]
    error = refused(capsys, command, *target[command])
    assert "LOCAL_RANK=0, WORLD_SIZE=1" in error and "RANK, MASTER_ADDR, MASTER_PORT" in error
    assert "unset LOCAL_RANK WORLD_SIZE" in error and not executed


def test_help(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {command} " in text for command in ("train", "pretrain", "eval", "doctor"))
    assert cli.main([]) == 2
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for option in ("--nproc", "--run-dir", "--resume", "key=value"):
        assert option in text


def test_errors_of_the_real_command():
    done = run_cli("train", "small.yaml", "rollout.group_sise=4")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: rollout.group_sise='4': unknown key; did you mean")
    assert done.stderr.count("\n") == 1


def test_recipes_are_found_and_nothing_heavy_is_imported():
    Path("recipes").mkdir()
    Path("recipes/__init__.py").write_text(
        textwrap.dedent("""
        from megatron_zero.config import ModelConfig, RunConfig
        def tiny():
            return RunConfig(name="t", model=ModelConfig(init="random", tokenizer="characters"))
        RECIPES = {"tiny": tiny}
        """)
    )
    Path("probe.py").write_text(
        textwrap.dedent("""
        import os, sys
        def execve(path, argv, env):
            heavy = {"torch", "numpy", "megatron", "vllm", "transformers", "rich"}
            print("heavy:", sorted(heavy & sys.modules.keys()))
            print(argv[-1])
        os.execve = execve
        from megatron_zero import cli
        sys.exit(cli.main(["train", "tiny", "seed=3"]))
        """)
    )
    env = {**os.environ, "PYTHONPATH": f"{Path.cwd()}{os.pathsep}{ROOT}"}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "probe.py"], capture_output=True, text=True, env=env, timeout=60
    )
    elapsed = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == ["heavy: []", "runs/t/config.yaml"]
    assert config_io.load_config("runs/t/config.yaml").seed == 3
    assert elapsed < 5  # 0.2 s on an idle machine
    assert "recipes: tiny" in run_cli("train", "tyni").stderr
