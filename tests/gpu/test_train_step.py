"""The training step's share of the GPU's peak, measured and printed."""

import json

from tests.launch import REPOSITORY, torchrun_anew


def test_the_training_step_uses_the_gpu(tmp_path, capsys) -> None:
    out = tmp_path / "train_step.json"
    benchmark = REPOSITORY / "benchmarks" / "gpu" / "train_step.py"
    torchrun_anew(1, benchmark, "--steps", "3", "--output", out, timeout_s=600)
    report = json.loads(out.read_text())
    with capsys.disabled():
        print(f"\n{report['kernels']['layers']} layers: {report['median']}")
    assert 0.1 < report["median"]["matmul_fraction"] < 1
    assert report["median"]["loss_is_finite"]
