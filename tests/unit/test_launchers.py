"""launchers/ and what nemo-run makes of recipes: shell that shellcheck accepts, manifests, scripts.

`tests/unit/launched/` holds what was written when these files were last looked at;
`pytest tests/unit/test_launchers.py --write-launched` writes them anew.
"""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from megatron_zero import config_io
from recipes import EXPERIMENTS

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


def test_slurm_scripts_of_an_experiment(launch, tmp_path, request, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # nemo-run's shell commands look at it
    words = ["ablation", "--executor", "slurm", "--dryrun", "--output", str(tmp_path)]
    words += ["--account", "lab", "--partition", "a100", "--image", "registry/megatron_zero:1"]
    words += ["--mount", "/data", "--env", "HF_HOME=/data/hf", "data.data_dir=/data/my sets"]
    assert launch.main(words) == 0
    scripts = sorted(tmp_path.glob("experiments/ablation/*/*_sbatch.sh"))
    assert [s.name.removesuffix("_sbatch.sh") for s in scripts] == sorted(
        EXPERIMENTS["ablation"].recipes
    )
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
        # the style of nemo-run's own template, and its exit status of the line before
        style = "--exclude=SC2206,SC2128,SC2034,SC2046,SC2086,SC2207"
        found = subprocess.run([SHELLCHECK, style, script], capture_output=True, text=True)
        assert found.returncode == 0, found.stdout
        assert "'data.data_dir=/data/my sets' --resume" in script.read_text()
    same_as_committed("ablation_nostd_constant.sbatch", scripts[0].read_text(), tmp_path, request)


@pytest.mark.parametrize("recipe", ["deepseek_v3", "llama3_2_3b_numina_pretrain"])
def test_kubernetes_manifests(launch, tmp_path, request, recipe) -> None:
    words = [recipe, "--image", "registry/megatron_zero:1", "--volume", "lab", "--retries", "5"]
    args = launch.make_parser().parse_args([*words, "--executor", "k8s", "--output", str(tmp_path)])
    (config,) = launch.configs_of(recipe, []).values()
    manifest = launch.manifest_of(recipe, config, args, launch.hardware_of(recipe))
    assert refusals(manifest) == []
    text = yaml.safe_dump(manifest, sort_keys=False)
    same_as_committed(f"{recipe}.yaml", text, tmp_path, request)


def test_a_skypilot_task(launch, tmp_path, request) -> None:
    if launch.has_executor("skypilot"):
        pytest.skip("skypilot is installed: nemo-run's own executor is used")
    words = ["qwen2_5_math_7b_80g", "--executor", "skypilot", "--dryrun", "data.data_dir=/my data"]
    assert launch.main([*words, "--nodes", "2", "--output", str(tmp_path)]) == 0
    text = (tmp_path / "qwen2_5_math_7b_80g.skypilot.yaml").read_text()
    same_as_committed("qwen2_5_math_7b_80g.skypilot.yaml", text, tmp_path, request)
    task = yaml.safe_load(text)
    (tmp_path / "run.sh").write_text("#!/bin/bash\n" + task["run"])
    subprocess.run(["bash", "-n", tmp_path / "run.sh"], check=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quickstrt"], "quickstrt: no such recipe or experiment"),
        (["quickstart", "rollout.group_sise=4"], "did you mean rollout.group_size"),
        (["math_smoke", "--nodes", "2"], "--nodes=2: must be 1 with --executor local"),
        (["qwen3_30b_a3b", "--executor", "slurm"], "--account and --image: needed"),
        (["qwen2_5_math_7b", "--executor", "slurm", "--nproc", "3"], "must divide the number of"),
        (["ablation", "name=x"], "name: the runs of ablation have their own"),
        (["math_smoke", "--env", "A"], "--env A: must be NAME=VALUE"),
        (["deepseek_v3", "--executor", "k8s"], "--image"),
    ],
)
def test_what_is_refused_before_anything_is_submitted(launch, capsys, tmp_path, words, message):
    with pytest.raises(SystemExit) as caught:
        launch.main([*words, "--dryrun", "--output", str(tmp_path)])
    assert caught.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.glob("experiments/*"))


def test_the_nemo_command_line_sets_parts_of_a_recipe(launch) -> None:
    import fiddle
    from nemo_run.cli.cli_parser import parse_cli_args

    words = ["config=quickstart", "config.num_steps=3", "config.rollout.group_size=16"]
    task = parse_cli_args(launch.train, words)
    config = fiddle.build(task.config)
    expected = config_io.resolve("quickstart", ["num_steps=3", "rollout.group_size=16"], "train")
    assert config == expected
    task = parse_cli_args(launch.pretrain, ["config=quickstart_base"])
    assert fiddle.build(task.config) == config_io.resolve("quickstart_base", [], "pretrain")


def test_the_nemo_command_finds_the_entry_point(tmp_path: Path) -> None:
    """setup.py's entry point, without an installation: its metadata on the path."""
    egg_info = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(egg_info, cwd=ROOT, check=True, capture_output=True)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    environment |= {"NEMORUN_HOME": str(tmp_path), "COLUMNS": "200"}
    nemo = [
        str(Path(sys.executable).parent / "nemo"),
        "megatron_zero",
        "train",
        "--dryrun",
        "--yes",
    ]
    shown = subprocess.run(
        [*nemo, "config=qwen2_5_math_7b"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "path='Qwen/Qwen2.5-Math-7B'" in shown.stdout


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
