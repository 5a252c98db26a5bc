"""launchers/ and what nemo-run makes of recipes: shell that shellcheck accepts, manifests, scripts.

`tests/unit/launched/` holds what was written when these files were last looked at;
`pytest tests/unit/test_launchers.py --write-launched` writes them anew.
"""

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from megatron_zero import config as config_module
from megatron_zero import config_io
from megatron_zero.launch_args import parse_args
from recipes import EXPERIMENTS, RECIPES

ROOT = Path(__file__).parents[2]
LAUNCHERS = ROOT / "launchers"
SCRIPTS = sorted([*LAUNCHERS.rglob("*.sh"), *LAUNCHERS.rglob("*.sbatch")])
SCHEMA = json.loads((Path(__file__).parent / "pytorchjob.schema.json").read_text())
COMMITTED = Path(__file__).parent / "launched"
SHELLCHECK = Path(sys.executable).parent / "shellcheck"


@pytest.fixture(scope="module")
def launch():
    """recipes.launch; nemo-run is imported by nothing else."""
    return pytest.importorskip("recipes.launch")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    from nemo_run import config

    monkeypatch.setattr(config, "_NEMORUN_HOME", str(tmp_path / "nemo_run"))


def shell_is_sound(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    found = subprocess.run([SHELLCHECK, path], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_launcher_is_sound_and_executable(path: Path) -> None:
    shell_is_sound(path)
    assert path.suffix == ".sbatch" or os.access(path, os.X_OK)
    words = re.findall(r"^\s*(if|for|while|case|function)\b", path.read_text(), re.MULTILINE)
    assert not words, "no logic here"


def test_shellcheck_finds_something(tmp_path: Path) -> None:
    (tmp_path / "bad.sh").write_text("#!/bin/bash\ncd $1\n")
    with pytest.raises(AssertionError, match="SC2164"):
        shell_is_sound(tmp_path / "bad.sh")


def refusals(manifest: dict) -> "list[str]":
    return [
        error.message for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(manifest)
    ]


def test_the_kubernetes_manifest_fits_its_schema() -> None:
    manifest = yaml.safe_load((LAUNCHERS / "kubernetes" / "pytorchjob.yaml").read_text())
    assert refusals(manifest) == []
    pod = manifest["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    mounted = {m["name"] for m in pod["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    environment = {e["name"]: e.get("value") for e in pod["containers"][0]["env"]}
    config = config_io.resolve(pod["containers"][0]["args"][0], [], environment["COMMAND"])
    assert config.name == "qwen3_30b_a3b"
    manifest["spec"]["runPolicy"]["restarts"] = 3
    pod["containers"][0]["args"].append(7)
    assert len(refusals(manifest)) == 2


def same_as_committed(name: str, text: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Compare, after what differs from machine to machine is taken out."""
    text = re.sub(r"\S*/(code|log-|sbatch_)", r"DIR/\1", text.replace(str(tmp_path), "DIR"))
    text = re.sub(r"_\d{10,}", "_ID", re.sub(r"--rdzv-id \d+", "--rdzv-id ID", text))
    path = COMMITTED / name
    if request.config.getoption("--write-launched"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.rstrip() + "\n")
    assert text.rstrip() == path.read_text().rstrip()


STORAGE_OF = {
    "slurm": ["--storage", "/lab", "--account", "lab", "--image", "registry/megatron_zero:1"],
    "k8s": ["--volume", "lab", "--image", "registry/megatron_zero:1"],
    "skypilot": ["--volume", "lab"],
}


def parsed(launch, words: "list[str]"):
    return launch.make_parser().parse_intermixed_args(words)


def resolved(words: "list[str]", kind: str):
    """What a process that is given these words would run, by the program's own parser."""
    return parse_args(kind, words).config


def container_of(manifest: dict) -> dict:
    pod = manifest["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    return pod["containers"][0]


def claim_mounts(manifest: dict) -> "list[str]":
    """Where a pod's volume claims are mounted."""
    pod = manifest["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    claims = {v["name"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
    mounts = container_of(manifest)["volumeMounts"]
    return [mount["mountPath"] for mount in mounts if mount["name"] in claims]


def test_slurm_scripts_of_an_experiment(launch, tmp_path, request, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # nemo-run's shell commands look at it
    words = ["ablation", "--executor", "slurm", "--dryrun", "--output", str(tmp_path)]
    words += ["--account", "lab", "--partition", "a100", "--image", "registry/megatron_zero:1"]
    words += ["--storage", "/lab/new", "--mount", "/data"]
    words += ["--env", "HF_HOME=/data/hf", "data.data_dir=/data/my sets"]
    assert launch.main(words) == 0
    scripts = sorted(tmp_path.glob("experiments/ablation/*/*_sbatch.sh"))
    names = [script.name.removesuffix("_sbatch.sh") for script in scripts]
    assert names == sorted(EXPERIMENTS["ablation"].recipes)
    for name, script in zip(names, scripts, strict=True):
        subprocess.run(["bash", "-n", script], check=True)
        # the style of nemo-run's own template, and its exit status of the line before
        style = "--exclude=SC2206,SC2128,SC2034,SC2046,SC2086,SC2207"
        found = subprocess.run([SHELLCHECK, style, script], capture_output=True, text=True)
        assert found.returncode == 0, found.stdout
        (line,) = [line for line in script.read_text().splitlines() if " -m megatron_zero." in line]
        command = shlex.split(line)
        config = resolved(command[command.index("megatron_zero.train") + 1 :], "train")
        assert config.run_dir == f"/lab/new/runs/{name}"
        assert config.data.data_dir == "/data/my sets"
        mounts = command[command.index("--container-mounts") + 1].split(",")
        assert {"/data", "/lab/new:/lab/new"} <= set(mounts)
        assert "--resume" in command
    same_as_committed("ablation_nostd_constant.sbatch", scripts[0].read_text(), tmp_path, request)


@pytest.mark.parametrize(
    ("recipe", "kind", "more"),
    [
        ("deepseek_v3", "train", []),
        ("llama3_2_3b_numina_pretrain", "pretrain", []),
        ("qwen3_30b_a3b", "train", ["--storage", "/mnt/lab", "data.data_dir=/mnt/lab/sets"]),
        ("quickstart", "train", ["runs_dir=mine", "--env", "LOG_DIR=/shared/x"]),
    ],
)
def test_a_pod_writes_where_its_volume_is_mounted(
    launch, tmp_path, request, recipe, kind, more
) -> None:
    words = [recipe, "--executor", "k8s", *STORAGE_OF["k8s"], "--retries", "5", *more]
    args = parsed(launch, [*words, "--output", str(tmp_path)])
    (job,) = launch.jobs_of(args)
    manifest = launch.manifest_of(job, args)
    assert refusals(manifest) == []
    container = container_of(manifest)
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    config = resolved(container["args"], environment["COMMAND"])
    assert config == job.config and environment["COMMAND"] == kind
    (mount,) = claim_mounts(manifest)
    for path in (config.run_dir, environment["LOG_DIR"], environment["HF_HOME"]):
        assert Path(path).is_relative_to(mount)
    assert environment["STORAGE"] == mount
    resource = "nvidia.com/gpu" if job.hardware.memory_gib else "cpu"
    assert container["resources"]["limits"] == {resource: job.hardware.gpus_per_node}
    assert "--resume" in container["args"]
    if kind == "train" and recipe != "quickstart":
        assert Path(config.data.data_dir).is_relative_to(mount)
    if not more:
        text = yaml.safe_dump(manifest, sort_keys=False)
        same_as_committed(f"{recipe}.yaml", text, tmp_path, request)


def test_stages_find_one_another_on_the_storage(launch) -> None:
    words = ["llama3_2_3b_two_stages", "--executor", "k8s", *STORAGE_OF["k8s"]]
    for more, runs_dir in ([[], "/shared/runs"], [["runs_dir=paper"], "/shared/paper"]):
        first, second = launch.jobs_of(parsed(launch, [*words, *more]))
        assert first.config.run_dir == f"{runs_dir}/llama3_2_3b_numina_pretrain"
        assert first.config.documents.source == "/shared/numinamath_1_5"
        assert second.config.model.path == f"{first.config.run_dir}/hf/step_000860"
    first, second = launch.jobs_of(parsed(launch, ["llama3_2_3b_two_stages", "runs_dir=mine"]))
    assert second.config.model.path == "mine/llama3_2_3b_numina_pretrain/hf/step_000860"
    assert first.config.documents.source == "numinamath_1_5"  # this machine's own


def test_a_skypilot_task(launch, tmp_path, request) -> None:
    words = ["qwen2_5_math_7b_80g", "--executor", "skypilot", "--volume", "lab", "--dryrun"]
    words += ["data.data_dir=/shared/my data", "--nodes", "2", "--output", str(tmp_path)]
    assert launch.main(words) == 0
    text = (tmp_path / "qwen2_5_math_7b_80g.skypilot.yaml").read_text()
    same_as_committed("qwen2_5_math_7b_80g.skypilot.yaml", text, tmp_path, request)
    task = yaml.safe_load(text)
    (tmp_path / "run.sh").write_text("#!/bin/bash\n" + task["run"])
    subprocess.run(["bash", "-n", tmp_path / "run.sh"], check=True)
    config = resolved(shlex.split(task["envs"]["RUN"]), task["envs"]["COMMAND"])
    (mount,) = task["volumes"]
    assert Path(config.run_dir).is_relative_to(mount) and task["envs"]["STORAGE"] == mount
    assert config.data.data_dir == "/shared/my data"
    assert task["envs"]["HF_HOME"] == f"{mount}/huggingface"


def test_a_bucket_is_for_one_node(launch, capsys) -> None:
    words = ["qwen2_5_math_7b", "--executor", "skypilot", "--volume", "s3://lab", "--dryrun"]
    args = parsed(launch, words)
    (job,) = launch.jobs_of(args)
    task = launch.manifest_of(job, args)
    assert task["file_mounts"] == {"/shared": {"source": "s3://lab", "mode": "MOUNT_CACHED"}}
    assert task["resources"] == {"accelerators": "A100:8"}
    with pytest.raises(SystemExit):
        launch.main([*words, "--nodes", "2"])
    assert "--volume='s3://lab': must be a volume of `sky volumes`" in capsys.readouterr().err


def test_every_recipe_asks_skypilot_for_what_it_knows(launch) -> None:
    # its canonical names, as of SkyPilot 0.14
    known = {"A100", "A100-80GB", "H100", "H200", "B200", "B300"}
    words = ["--executor", "skypilot", *STORAGE_OF["skypilot"]]
    for recipe in RECIPES:
        args = parsed(launch, [recipe, *words])
        (job,) = launch.jobs_of(args)
        resources = launch.manifest_of(job, args)["resources"]
        if job.hardware.memory_gib:
            name, _, count = resources["accelerators"].partition(":")
            assert name in known and count == "8", recipe
        else:
            assert resources == {"cpus": "2+"}, recipe


def test_the_plain_manifests_write_where_they_mount() -> None:
    task = yaml.safe_load((LAUNCHERS / "skypilot.yaml").read_text())
    config = resolved(shlex.split(task["envs"]["RUN"]), task["envs"]["COMMAND"])
    (mount,) = task["file_mounts"]
    manifest = yaml.safe_load((LAUNCHERS / "kubernetes" / "pytorchjob.yaml").read_text())
    pods = resolved(container_of(manifest)["args"], "train")
    assert claim_mounts(manifest) == [mount] == ["/shared"]
    for found in (config, pods):
        assert Path(found.run_dir).is_relative_to(mount)
        assert Path(found.data.data_dir).is_relative_to(mount)
    environment = {entry["name"]: entry.get("value") for entry in container_of(manifest)["env"]}
    assert environment["STORAGE"] == task["envs"]["STORAGE"] == mount


def run_sbatch(tmp_path: Path, **settings: str) -> "list[str]":
    """`slurm.sbatch` with two programs of Slurm's in its place; the words that srun was given."""
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    (programs / "scontrol").write_text("#!/bin/sh\necho node0\n")
    (programs / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$STORAGE" "$LOG_DIR" "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": "/home/me"}
    environment |= {"SLURM_JOB_NODELIST": "x", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7"}
    command = ["bash", str(LAUNCHERS / "slurm.sbatch"), "math_smoke"]
    result = subprocess.run(
        command, env=environment | settings, capture_output=True, text=True, check=True
    )
    return result.stdout.splitlines()


def test_a_slurm_job_has_storage_in_and_out_of_containers(tmp_path: Path) -> None:
    storage, logs, *words = run_sbatch(tmp_path)
    assert (storage, logs) == ("/home/me", "/home/me/runs/logs")
    assert words[-3:] == ["launchers/many_nodes.sh", "math_smoke", "--resume"]
    assert not any(word.startswith("--container") for word in words)
    settings = {"STORAGE": "/lab", "CONTAINER_IMAGE": "image", "CONTAINER_MOUNTS": "/data"}
    storage, logs, *words = run_sbatch(tmp_path, **settings)
    assert storage == "/lab" and logs.startswith("/lab/")
    assert "--container-mounts=/lab:/lab,/data" in words
    settings.pop("CONTAINER_MOUNTS")
    assert "--container-mounts=/lab:/lab" in run_sbatch(tmp_path, **settings)


SLURM = ["--executor", "slurm", *STORAGE_OF["slurm"]]
POD = ["--executor", "k8s", *STORAGE_OF["k8s"]]
SKY = ["--executor", "skypilot", *STORAGE_OF["skypilot"]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quickstrt"], "quickstrt: no such recipe or experiment"),
        (["quickstart", "rollout.group_sise=4"], "did you mean rollout.group_size"),
        (["math_smoke", "model.tokenizer=characters", "--nodes", "2"], "--nodes=2: must be 1 with"),
        (["qwen3_30b_a3b", "--executor", "slurm", "--storage", "/lab"], "--account and --image"),
        (["qwen2_5_math_7b", *SLURM, "--nproc", "3"], "must divide the number of"),
        (["ablation", "name=x"], "name: the runs of ablation have their own"),
        (["math_smoke", "--env", "A"], "--env A: must be NAME=VALUE"),
        (["deepseek_v3", "--executor", "k8s", "--volume", "lab"], "--image"),
        # a place that outlives the job: needed
        (["qwen3_30b_a3b", "--executor", "slurm"], "--storage='': needed with --executor slurm"),
        (["deepseek_v3", "--executor", "k8s", "--image", "x"], "--volume='': needed with"),
        (["qwen2_5_math_7b", "--executor", "skypilot"], "--volume='': needed with"),
        (["qwen2_5_math_7b", *POD, "--storage", "shared"], "--storage='shared': must be an absol"),
        (["qwen2_5_math_7b", *POD, "--storage", "/"], "--storage='/': must be an absolute folder"),
        (["qwen2_5_math_7b", *POD, "--storage", "/a b"], "--storage='/a b': must have no space"),
        (["qwen2_5_math_7b", *SLURM, "--mount", "/a,b"], "--mount='/a,b': must have no space"),
        # ... and kept to
        (["qwen2_5_math_7b", *POD, "runs_dir=/runs"], "runs_dir='/runs': must be on storage that"),
        (["qwen2_5_math_7b", *SKY, "runs_dir=~/runs"], "runs_dir='~/runs': must be on storage"),
        (["qwen2_5_math_7b", *SLURM, "runs_dir=../x"], "runs_dir='/x': must be on storage that"),
        (["qwen2_5_math_7b", *SLURM, "runs_dir=/lab/../x"], "runs_dir='/lab/../x': must be on"),
        (["qwen2_5_math_7b", *SLURM, "runs_dir=/labx"], "runs_dir='/labx': must be on storage"),
        (
            ["qwen2_5_math_7b", *SLURM, "--mount", "/old:/old:ro", "runs_dir=/old"],
            "runs_dir='/old': must be on storage that is mounted (/lab)",
        ),
        (["qwen2_5_math_7b", *SLURM, "--mount", "data"], "--mount='data': must be FROM or FROM:TO"),
        (["qwen2_5_math_7b", *SLURM, "data.data_dir=/data"], "data.data_dir='/data': must be on"),
        (["qwen2_5_math_7b", *POD, "model.path=/models/q"], "model.path='/models/q': must be on"),
        (["qwen2_5_math_7b", *POD, "model.tokenizer=/t"], "model.tokenizer='/t': must be on"),
        (["qwen2_5_math_7b", *POD, "data.dataset=/a.parquet"], "data.dataset='/a.parquet': must"),
        (
            ["qwen2_5_math_7b", *POD, "evaluation.datasets=aime,/b.jsonl"],
            "evaluation.datasets='/b.jsonl': must be on storage that is mounted (/shared)",
        ),
        (
            ["llama3_2_3b_numina_pretrain", *SKY, "documents.source=/n.parquet"],
            "documents.source='/n.parquet': must be on storage",
        ),
        (
            ["math_smoke", "model.tokenizer=characters", "runs_dir=/dev/null/runs"],
            "runs_dir='/dev/null/runs': /dev/null is no folder",
        ),
    ],
)
def test_what_is_refused_before_anything_is_submitted(launch, capsys, tmp_path, words, message):
    with pytest.raises(SystemExit) as caught:
        launch.main([*words, "--dryrun", "--output", str(tmp_path)])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_is_only_read_may_be_on_another_mount(launch) -> None:
    mounts = ["--mount", "/old:/data:ro", "--mount", "/home/me:/lab"]
    words = ["qwen2_5_math_7b", *SLURM, *mounts, "data.data_dir=/data"]
    args = parsed(launch, [*words, "runs_dir=/lab/x", "data.dataset=mine/set.parquet"])
    (job,) = launch.jobs_of(args)
    assert job.config.data.data_dir == "/data" and job.config.run_dir == "/lab/x/qwen2_5_math_7b"
    assert job.config.data.dataset == "/lab/mine/set.parquet"
    assert job.config.model.path == "Qwen/Qwen2.5-Math-7B"  # a hub id is no path
    assert launch.mounts_of(args) == ["/old:/data:ro", "/home/me:/lab"]  # it has the storage


def test_this_machine_needs_no_storage_but_may_have_one(launch, tmp_path) -> None:
    words = ["math_smoke", "model.tokenizer=characters", "data.data_dir=sets"]
    (job,) = launch.jobs_of(parsed(launch, words))
    assert job.overrides == words[1:] and launch.environment_of(parsed(launch, words)) == {}
    (job,) = launch.jobs_of(parsed(launch, [*words, "--storage", str(tmp_path)]))
    assert job.config.run_dir == f"{tmp_path}/runs/math_smoke"
    assert job.config.data.data_dir == f"{tmp_path}/sets"
    assert resolved(job.words(parsed(launch, words)), "train") == job.config


def test_a_data_folder_can_be_declined(launch) -> None:
    for words, folder in ([[], "/shared/data"], [["data.data_dir="], ""]):
        (job,) = launch.jobs_of(parsed(launch, ["qwen2_5_math_7b", *POD, *words]))
        assert job.config.data.data_dir == folder


@pytest.mark.parametrize(
    ("words", "program"), [(SLURM, "sbatch"), (POD, "kubectl"), (SKY, "sky")], ids=str
)
def test_a_missing_program_is_named(launch, capsys, tmp_path, monkeypatch, words, program) -> None:
    if program == "kubectl" and launch.has_executor("k8s"):
        pytest.skip("nemo-run reaches Kubernetes itself")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(SystemExit) as caught:
        launch.main(["qwen2_5_math_7b", *words, "--output", str(tmp_path / "out")])
    assert caught.value.code == 2
    message = f"needs {program}, which is not on PATH; --dryrun writes what would be submitted\n"
    assert capsys.readouterr().err.endswith(message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "least"),
    [("nodes", 0, 1), ("nodes", -3, 1), ("nproc", 0, 1), ("retries", -1, 0)],
)
def test_numbers_of_the_command_are_checked(launch, capsys, option, value, least) -> None:
    with pytest.raises(SystemExit) as ended:
        launch.main(["qwen2_5_math_7b", *SKY, "--dryrun", f"--{option}={value}"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: --{option}={value}: must be at least {least}\n"


def test_runs_that_follow_one_another_are_not_submitted_at_once(launch, capsys, tmp_path) -> None:
    words = ["llama3_2_3b_two_stages", *SKY, "--output", str(tmp_path)]
    assert launch.main([*words, "--dryrun"]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        launch.main(words)
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: name='llama3_2_3b_two_stages': its runs need one another's")
    assert message.endswith("launch llama3_2_3b_numina_pretrain, then llama3_2_3b_numina\n")


def test_what_a_scheduler_refuses_is_no_traceback(launch, capfd, tmp_path, monkeypatch) -> None:
    (tmp_path / "sky").write_text("#!/bin/sh\necho no cloud is set up >&2\nexit 3\n")
    (tmp_path / "sky").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert launch.main(["qwen2_5_math_7b", *SKY, "--output", str(tmp_path / "out")]) == 1
    said, last = capfd.readouterr().err.splitlines()
    assert said == "no cloud is set up" and last.endswith("ended with status 3")
    assert last.startswith("error: qwen2_5_math_7b: `sky jobs launch")


@pytest.mark.parametrize("word", ["num_steps=3", "executor=local", "quickstart"])
def test_nemos_command_refuses_a_word_without_config(launch, capsys, word: str) -> None:
    with pytest.raises(SystemExit) as ended:
        launch.RecipeContext(name="x").parse_fn(launch.train, ["config=quickstart", word])
    assert ended.value.code == 2
    expected = f"error: {word}: settings are config.<setting>=<value>; also resume=\n"
    assert capsys.readouterr().err == expected


def test_without_nemo_run_the_cure_is_named(tmp_path: Path) -> None:
    (tmp_path / "nemo_run.py").write_text("raise ModuleNotFoundError('No module named nemo_run')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "recipes.launch", "quickstart"]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: No module named nemo_run: pip install '.[launch]'")
    assert result.stderr.count("\n") == 1


def test_the_commands_of_the_docstring_are_valid(launch) -> None:
    text = launch.__doc__.replace("\\\n", " ")
    commands = re.findall(r"^python -m recipes\.launch (.*)$", text, re.MULTILINE)
    executors = set()
    for command in commands:
        # the base model of quickstart is made by another command
        made = ["model.path=", "model.init=random", "model.tokenizer=characters"]
        words = shlex.split(command)
        args = parsed(launch, words + made if words[0] == "quickstart" else words)
        jobs = launch.jobs_of(args)
        executors.add(args.executor)
        for job in jobs:
            if args.executor in ("k8s", "skypilot"):
                launch.manifest_of(job, args)
            else:
                launch.executor_of(args, job.hardware)
    assert executors == set(launch.EXECUTORS)


def nemo(tmp_path: Path, *words: str) -> subprocess.CompletedProcess:
    """The `nemo` command with setup.py's entry point, whose metadata is put on the path."""
    if not (tmp_path / "megatron_zero.egg-info").exists():
        egg_info = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
        subprocess.run(egg_info, cwd=ROOT, check=True, capture_output=True)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    environment |= {"NEMORUN_HOME": str(tmp_path), "COLUMNS": "400"}
    return subprocess.run(
        [str(Path(sys.executable).parent / "nemo"), "megatron_zero", *words, "--dryrun", "--yes"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )


def shown_config(output: str) -> object:
    """The configuration in nemo-run's table, built by our classes from how it is written there."""
    cells = [line.split("│")[2] for line in output.splitlines() if line.count("│") >= 3]
    text = " ".join(cell.strip() for cell in cells)
    found = re.match(r".*?((?:Run|Pretrain)Config\(.*\)) (?:True|False)\s*$", text)
    assert found, output
    return eval(found[1], vars(config_module))


def test_the_nemo_command_reads_settings_as_the_program_does(tmp_path: Path) -> None:
    settings = ["num_steps=3", "rollout.group_size=4", "batch.global_batch_size=128"]
    settings += ["optimizer.lr=1e-4", "optimizer.min_lr=0", "evaluation.datasets=aime,math"]
    settings += ["data.template=no", "data.shuffle=false", "name=my_run"]
    words = [f"config.{setting}" for setting in settings]
    shown = nemo(tmp_path, "train", *words[:3], "config=quickstart", *words[3:], "resume=true")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert shown_config(shown.stdout) == config_io.resolve("quickstart", settings, "train")
    assert re.search(r"resume\s*│ True", shown.stdout)


def task_of(launch, entry_point, words: "list[str]"):
    """What the command's words become, in this process."""
    return launch.RecipeContext(name="x").parse_fn(entry_point, words)


def test_the_nemo_command_line_reads_every_kind_of_setting(launch, tmp_path) -> None:
    import fiddle

    settings = ["documents.sequence_length=256", "model.architecture.num_hidden_layers=2"]
    words = ["config=quickstart_base", *(f"config.{setting}" for setting in settings)]
    expected = config_io.resolve("quickstart_base", settings, "pretrain")
    assert fiddle.build(task_of(launch, launch.pretrain, words).config) == expected
    config_io.save_config(expected, tmp_path / "config.yaml")
    task = task_of(launch, launch.pretrain, [f"config={tmp_path / 'config.yaml'}", "resume=true"])
    assert fiddle.build(task.config) == expected and task.resume is True
    for text in ("[aime, math]", "aime,math", ""):
        words = ["config=quickstart", f"config.evaluation.datasets={text}"]
        datasets = fiddle.build(task_of(launch, launch.train, words).config).evaluation.datasets
        assert datasets == (["aime", "math"] if text else [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["config=quickstart", "config.rollout.group_sise=4"], "did you mean rollout.group_size?"),
        (["config=quickstart", "config.num_steps=x"], "num_steps='x': must be an integer"),
        (["config=quickstart_base"], "quickstart_base: is for `megatron-zero pretrain`"),
        (["config.num_steps=3"], "config: give config=<recipe or YAML file>"),
    ],
)
def test_the_nemo_command_line_refuses_in_one_sentence(launch, capsys, words, message) -> None:
    with pytest.raises(SystemExit) as caught:
        task_of(launch, launch.train, words)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and error.count("\n") == 1


def test_the_client_asks_a_server() -> None:
    """A real HTTP exchange with what an OpenAI-compatible server answers."""
    import http.server
    import threading

    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer({"data": [{"id": "base"}]})

        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.answer({"choices": [{"text": "46 </answer>"}]})

        def answer(self, body):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        command = [sys.executable, str(LAUNCHERS / "serving" / "client.py"), address, "12 + 34?"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        answer = subprocess.check_output(command, env=environment, text=True, timeout=60)
        server.shutdown()
    assert answer == "46 </answer>\n"
    assert asked[0]["model"] == "base" and asked[0]["prompt"].endswith("Assistant: <think>")
    assert asked[0]["stop"] == ["</answer>"]
