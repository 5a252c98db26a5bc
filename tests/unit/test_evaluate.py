"""From records to numbers and tables, by hand; continuing where an evaluation ended."""

import json
import re
from pathlib import Path

import pytest

from megatron_zero import eval as eval_command
from megatron_zero import evaluate
from megatron_zero.benchmark_run import begin, resume
from megatron_zero.benchmark_tables import compare, table
from megatron_zero.config import DataConfig, EvaluationConfig, ModelConfig, RunConfig
from megatron_zero.data.arithmetic import build_character_tokenizer


def record(benchmark: str, index: int, correct: bool, **changes: object) -> evaluate.Record:
    made = {"benchmark": benchmark, "index": index, "temperature": 0.0, "sample": 0}
    made |= {"num_tokens": 10, "truncated": False, "formatted": True, "correct": correct}
    return made | changes


def sampled(benchmark: str, index: int, num_correct: int) -> list[evaluate.Record]:
    return [
        record(benchmark, index, i < num_correct, temperature=1.0, sample=i, truncated=i == 3)
        for i in range(4)
    ]


GREEDY = [record("aime", 0, True, num_tokens=20), record("aime", 1, False, formatted=False)]
GREEDY += [record("math", 7, True)]


def test_numbers_by_hand():
    results = evaluate.summarize([*GREEDY, *sampled("aime", 0, 1), *sampled("aime", 1, 4)])
    assert list(results) == ["greedy", "sampled"]
    greedy = {name: entry["metrics"] for name, entry in results["greedy"].items()}
    assert list(greedy) == ["aime", "math", "average"]
    assert [greedy[name]["accuracy"][0] for name in greedy] == [0.5, 1.0, 0.75]
    assert greedy["aime"]["length_mean"][0] == 15 and greedy["aime"]["formatted_frac"][0] == 0.5
    assert results["greedy"]["aime"]["problems"] == {"0": 1.0, "1": 0.0}
    aime = results["sampled"]["aime"]
    values = {metric: numbers[0] for metric, numbers in aime["metrics"].items()}
    assert values == {
        "accuracy": 0.625,  # (1/4 + 4/4) / 2
        "pass@2": 0.75,  # (1/2 + 1) / 2
        "pass@4": 1.0,
        "truncated_frac": 0.25,
        "formatted_frac": 1.0,
        "length_mean": 10.0,
    }
    assert aime["num_samples"] == 4 and aime["problems"] == {"0": 0.25, "1": 1.0}
    for entry in [*results["greedy"].values(), *results["sampled"].values()]:
        assert all(low <= value <= high for value, low, high in entry["metrics"].values())


def test_metrics_for_logs():
    one, two = evaluate.summarize(GREEDY[:2]), evaluate.summarize(GREEDY)
    assert evaluate.evaluation_metrics(one)["eval/aime/accuracy"] == 0.5
    assert not any("average" in name for name in evaluate.evaluation_metrics(one))
    assert evaluate.evaluation_metrics(two)["eval/average/accuracy"] == 0.75


def test_a_table_has_benchmarks_as_columns_and_their_average_last():
    results = evaluate.summarize(GREEDY + sampled("aime", 0, 1) + sampled("math", 0, 2))
    lines = table({"r1": results, "no": results}).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["metric", "template", "aime", "math", "average"]
    assert len({len(line) for line in lines}) == 1  # aligned
    rows = {(metric, template): rest for metric, template, *rest in cells[2:]}
    assert rows["greedy accuracy", "r1"] == rows["greedy accuracy", "no"]
    assert re.match(
        r"100.0 \[[0-9]\.[0-9], 100.0\]", rows["greedy accuracy", "r1"][1]
    )  # one problem
    assert rows["avg@4", "r1"][2].startswith("37.5 [") and ("sampled pass@2", "no") in rows
    assert rows["greedy length_mean", "r1"][0] == "15.0 [10.0, 20.0]"


def write_results(path: Path, records: "list[evaluate.Record]") -> Path:
    path.write_bytes(evaluate.results_json(evaluate.summarize(records), {}))
    return path


def test_comparing_two_results(tmp_path):
    better = [record("aime", i, True) for i in range(20)] + [record("math", 0, False)]
    worse = [record("aime", i, i % 2 == 0) for i in reversed(range(20))]
    a = write_results(tmp_path / "a.json", [*worse, record("math", 0, True)])
    b = write_results(tmp_path / "b.json", better)
    rows = [re.split(r" *\| *", line)[1:-1] for line in compare(a, b).splitlines()[2:]]
    assert [row[:4] for row in rows] == [
        ["greedy", "aime", "50.0", "100.0"],
        ["greedy", "math", "100.0", "0.0"],
        ["greedy", "average", "75.0", "50.0"],
    ]
    low, high = map(float, re.findall(r"[-+][0-9.]+", rows[0][4])[1:])
    assert 25 < low < 35 and 65 < high < 75 and rows[0][4].startswith("+50.0 [")
    assert float(rows[0][5]) == pytest.approx(2 / 2**10, abs=0.002)  # ten differences, one sign
    assert float(rows[1][5]) == 1.0 and float(rows[2][5]) > 0.2
    assert [row.split("|")[6].strip() for row in compare(a, a).splitlines()[2:]] == ["1.0000"] * 3


def test_what_cannot_be_compared_is_refused(tmp_path):
    a = write_results(tmp_path / "a.json", GREEDY)
    b = write_results(tmp_path / "b.json", [record("aime", 0, True)])
    with pytest.raises(ValueError, match=r"--compare='aime': has not the same problems in both"):
        compare(a, b)
    c = write_results(tmp_path / "c.json", sampled("aime", 0, 1))
    with pytest.raises(ValueError, match="no benchmark in the same mode in both"):
        compare(a, c)
    (tmp_path / "d.json").write_text("[]")
    for path in (tmp_path / "d.json", tmp_path / "none.json"):
        with pytest.raises(ValueError, match=r"--compare='.*': not a file of results"):
            compare(a, path)


@pytest.mark.parametrize("torn", [b"", b'{"index": 9, "outp'])
@pytest.mark.parametrize(
    ("num_lines", "done", "kept"), [(0, 0, 0), (4, 1, 3), (6, 2, 6), (7, 3, 7)]
)
def test_an_evaluation_goes_on_after_its_last_whole_batch(tmp_path, torn, num_lines, done, kept):
    path = tmp_path / "r1.jsonl"
    assert resume(path, [0, 3, 6, 7]) == 0
    lines = [
        json.dumps({"index": i, "output": "ä\u2028"}).encode() + b"\n" for i in range(num_lines)
    ]
    path.write_bytes(b"".join(lines) + torn)
    assert resume(path, [0, 3, 6, 7]) == done
    assert path.read_bytes() == b"".join(lines[:kept])


def test_a_folder_is_continued_under_the_same_settings_and_by_one_process(tmp_path):
    out = tmp_path / "out"
    settings = {"seed": 0, "versions": {"vllm": "1"}, "data.data_dir": ""}
    lock = begin(out, settings)
    with pytest.raises(ValueError, match=r"--out='.*out': another evaluation is at work there"):
        begin(out, settings)
    lock.close()
    begin(out, settings).close()
    with pytest.raises(ValueError, match=r"seed=1: .*out was begun with 0: take another --out"):
        begin(out, settings | {"seed": 1})


def test_the_command_line_makes_a_checked_configuration(tmp_path):
    words = ["model", "--out", "x", "--template", "r1", "--n", "8", "--temperature", "0.6"]
    words += ["--benchmarks", "aime,math", "--max-tokens", "64", "rollout.kv_cache_gib=1"]
    args, config = eval_command.parse_args(words)
    assert (args.out, args.sweep_templates, config.model.path) == (Path("x"), False, "model")
    assert config.evaluation.datasets == ["aime", "math"] and config.answer_format == "answer_tag"
    assert (config.evaluation.num_samples, config.evaluation.temperature) == (8, 0.6)
    assert (config.max_evaluation_tokens, config.rollout.kv_cache_gib) == (64, 1.0)
    few_shot = eval_command.parse_args(["model", "--out", "x", "--few-shot", "a.jsonl"])[1].data
    assert (few_shot.template, few_shot.few_shot) == ("few_shot", "a.jsonl")
    for wrong, message in [
        (
            ["model", "--n", "8", "--out", "x"],
            "evaluation.num_samples=8: must be 1 when temperatur",
        ),
        (["model", "--template", "qwen", "--out", "x"], "data.template='qwen': must be one of"),
        (["model", "--out", "x", "--nproc", "0"], "eval.nproc=0: must be at least 1"),
        (["model", "--out", "x", "--max-tokens", "many"], "max_response_tokens='many'"),
    ]:
        with pytest.raises(ValueError, match=message):
            eval_command.parse_args(wrong)


def test_no_problem_is_left_out_of_a_benchmark(tmp_path):
    """Unlike a training set, of which prompts that are too long are."""
    file = tmp_path / "data.jsonl"
    problems = ["What is 1+1?", "What is " + "1+" * 40 + "1?"]
    file.write_text("".join(json.dumps({"problem": p, "answer": "2"}) + "\n" for p in problems))
    config = RunConfig(
        name="test",
        model=ModelConfig(init="random", tokenizer="characters"),
        data=DataConfig(template="arithmetic", max_prompt_tokens=16),
        evaluation=EvaluationConfig(datasets=[str(file)], max_response_tokens=50),
    )
    tokenizer = build_character_tokenizer()
    prompts = evaluate.evaluation_prompts(config, 128, tokenizer)
    assert [len(prompt.token_ids) for prompt in prompts] == [13, 91]
    assert evaluate.max_model_len(config, prompts, 256) == 141
    assert evaluate.max_model_len(config, prompts, 128) == 128
    with pytest.raises(ValueError, match="1 prompts do not fit into the model's 91 positions"):
        evaluate.evaluation_prompts(config, 91, tokenizer)
