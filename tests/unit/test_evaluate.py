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
from megatron_zero.config_data import dataset_name
from megatron_zero.data.arithmetic import build_character_tokenizer
from megatron_zero.hf_config import read_hf_config


def record(benchmark: str, index: int, correct: bool, **changes: object) -> evaluate.Record:
    made = {"benchmark": benchmark, "index": index, "temperature": 0.0, "sample": 0}
    made |= {"num_tokens": 10, "truncated": False, "formatted": True, "correct": correct}
    made |= {"answer_class": 0 if correct else 1}
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
        "maj@2": 0.625,  # one of two, or the tie of both: as one alone
        "maj@4": 0.5,  # 3 to 1 against, and all for it
        "pass@2": 0.75,  # (1/2 + 1) / 2
        "pass@4": 1.0,
        "truncated_frac": 0.25,
        "formatted_frac": 1.0,
        "length_mean": 10.0,
    }
    assert aime["num_samples"] == 4 and aime["problems"] == {"0": 0.25, "1": 1.0}
    assert aime["at_k"]["maj@4"] == {"0": 0.0, "1": 1.0}
    assert aime["at_k"]["pass@2"] == {"0": 0.5, "1": 1.0}
    assert list(aime["at_k"]) == ["maj@2", "maj@4", "pass@2", "pass@4"]
    for entry in [*results["greedy"].values(), *results["sampled"].values()]:
        assert all(low <= value <= high for value, low, high in entry["metrics"].values())


def test_a_majority_is_of_answers_not_of_verdicts():
    """Two samples of five are right and agree, three are wrong in different ways."""
    classes = [0, 1, 2, 3, 0]
    rows = [sampled("aime", 0, 0)[0] for _ in classes]
    for sample, (row, answer_class) in enumerate(zip(rows, classes, strict=True)):
        row |= {"sample": sample, "answer_class": answer_class, "correct": answer_class == 0}
    metrics = evaluate.summarize(rows)["sampled"]["aime"]["metrics"]
    assert metrics["maj@5"][0] == 1.0 and metrics["accuracy"][0] == 0.4
    for row in rows[1:4]:
        row["answer_class"] = 1  # now they agree
    assert evaluate.summarize(rows)["sampled"]["aime"]["metrics"]["maj@5"][0] == 0.0
    for row in rows[1:4]:
        row["answer_class"] = None  # or give none
    metrics = evaluate.summarize(rows)["sampled"]["aime"]["metrics"]
    value, low, high = metrics["maj@5"]
    assert value == high == 1.0 and low < 0.1  # one problem says little
    assert metrics["maj@2"][0] == 0.7  # pairs of ten: three have no answer


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
    assert rows["sampled maj@4", "no"][1].startswith("50.0 [")  # two against two
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
        ["greedy accuracy", "aime", "50.0", "100.0"],
        ["greedy accuracy", "math", "100.0", "0.0"],
        ["greedy accuracy", "average", "75.0", "50.0"],
    ]
    low, high = map(float, re.findall(r"[-+][0-9.]+", rows[0][4])[1:])
    assert 25 < low < 35 and 65 < high < 75 and rows[0][4].startswith("+50.0 [")
    assert float(rows[0][5]) == pytest.approx(2 / 2**10, abs=0.002)  # ten differences, one sign
    assert float(rows[1][5]) == 1.0 and float(rows[2][5]) > 0.2
    assert [row.split("|")[6].strip() for row in compare(a, a).splitlines()[2:]] == ["1.0000"] * 3


def test_comparing_samples_has_majorities_and_says_what_was_drawn_differently(tmp_path):
    files = []
    for name, num_correct, top_p in (("a", 1, 1.0), ("b", 3, 0.9)):
        records = [row for i in range(6) for row in sampled("aime", i, num_correct)]
        settings = {"evaluation.top_p": top_p, "evaluation.temperature": 1.0, "data.template": "no"}
        files.append(tmp_path / f"{name}.json")
        data = evaluate.results_json(evaluate.summarize(records), settings)
        files[-1].write_bytes(data)
    *lines, last = compare(*files).splitlines()
    rows = [re.split(r" *\| *", line)[1:-1] for line in lines[2:]]
    assert [row[:4] for row in rows if row[1] == "aime"] == [
        ["sampled accuracy", "aime", "25.0", "75.0"],
        ["sampled maj@4", "aime", "0.0", "100.0"],
        ["sampled pass@4", "aime", "100.0", "100.0"],
    ]
    assert last == "different: evaluation.top_p is 1.0 in A and 0.9 in B"
    # what was written before there were majorities has accuracies alone
    old = json.loads(files[0].read_text())
    del old["results"]["sampled"]["aime"]["at_k"]
    files[0].write_text(json.dumps(old))
    assert len(compare(*files).splitlines()) == 2 + 2 + 1


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
    sampling = ["--temperature", "1", "--top-p", "0.95", "--top-k", "20"]
    drawn = eval_command.parse_args(["model", "--out", "x", *sampling])[1]
    assert (drawn.evaluation.top_p, drawn.evaluation.top_k) == (0.95, 20)
    assert (config.evaluation.top_p, config.evaluation.top_k) == (1.0, 0)
    assert config.rollout.top_p == 1.0  # training's is another, and stays
    for wrong, message in [
        (
            ["model", "--n", "8", "--out", "x"],
            "evaluation.num_samples=8: must be 1 when temperatur",
        ),
        (["model", "--template", "qwen", "--out", "x"], "data.template='qwen': must be one of"),
        (["model", "--out", "x", "--nproc", "0"], "eval.nproc=0: must be at least 1"),
        (["model", "--out", "x", "--max-tokens", "many"], "max_response_tokens='many'"),
        (["model", "--out", "x", "--benchmarks", ""], "--benchmarks='': must name a data set"),
        (["model", "--out", "x", "--top-p", "0.9"], "evaluation.top_p=0.9: must be 1 when temper"),
        (["model", "--out", "x", "--top-k", "5"], "evaluation.top_k=5: must be 0 when temperature"),
        (
            ["model", "--out", "x", "--temperature", "1", "--top-p", "0"],
            r"evaluation.top_p=0.0: must be in \(0, 1\]",
        ),
        (
            ["model", "--out", "x", "--temperature", "1", "--top-k", "-1"],
            "evaluation.top_k=-1: must be at least 0",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            eval_command.parse_args(wrong)


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        (["aime", "aime"], r"\['aime', 'aime'\]: aime is there twice: each data set must be there"),
        (["a/te.parquet", "b/te.jsonl"], "a/te.parquet and b/te.jsonl would both be called te"),
        (["/data/aime.parquet", "aime"], "/data/aime.parquet and aime would both be called aime"),
        (["x.parquet", "./x.parquet"], "x.parquet and ./x.parquet would both be called x"),
        (["owner/gsm8k", "other/gsm8k"], "would both be called gsm8k: leave one out, or rename"),
        (["aime", ""], r"\['aime', ''\]: has an empty name"),
        (["average.jsonl"], "'average.jsonl': results call the mean over data sets so: rename it"),
    ],
)
def test_a_data_set_counts_once(datasets, message):
    with pytest.raises(ValueError, match=r"evaluation\.datasets=.*" + message):
        EvaluationConfig(datasets=datasets)
    with pytest.raises(ValueError, match=r"evaluation\.datasets="):
        eval_command.parse_args(["model", "--out", "x", "--benchmarks", ",".join(datasets)])


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("aime", "aime"),
        ("/tmp/a b/Aimé 24.parquet", "Aimé_24"),
        ("data/eval/", "eval"),
        ("~/x.v2.jsonl", "x.v2"),
        ("owner/MATH-500", "MATH-500"),
        ("main@openai/gsm8k", "main-gsm8k"),
        ("socratic@openai/gsm8k", "socratic-gsm8k"),
    ],
)
def test_a_data_set_has_a_plain_name(dataset, name):
    assert dataset_name(dataset) == name


def test_the_same_problems_under_two_names_are_refused(shared_dir):
    config = RunConfig(
        name="test",
        model=ModelConfig(init="random", tokenizer="characters"),
        data=DataConfig(data_dir=str(shared_dir / "data")),
        evaluation=EvaluationConfig(datasets=["aime", "math", "math500"], max_prompts=3),
    )
    with pytest.raises(
        ValueError,
        match=r"evaluation\.datasets='math500': has the same problems as math, which would count",
    ):
        evaluate.evaluation_prompts(config, 4096, build_character_tokenizer())


def test_a_run_directory_stands_for_its_newest_model(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("kind: train\n")
    with pytest.raises(ValueError, match=r"model.path='.*run': a run without a model in hf"):
        eval_command.parse_args([str(run), "--out", "x"])
    for name in ("step_000005", "step_000080", "step_1000000", "step_000090_keep", "step_latest"):
        (run / "hf" / name).mkdir(parents=True)
        (run / "hf" / name / "config.json").write_text("{}")
    (run / "hf" / "step_2000000").mkdir()  # not a model
    newest = str(run / "hf" / "step_1000000")
    for given in (run, run / "hf", newest):
        assert eval_command.parse_args([str(given), "--out", "x"])[1].model.path == newest
    assert eval_command.model_of("Qwen/Qwen2.5-Math-7B") == "Qwen/Qwen2.5-Math-7B"
    # training begins with a model that is named
    with pytest.raises(ValueError, match=r"run has no config.json; did you mean .*step_1000000\?"):
        read_hf_config(ModelConfig(path=str(run)))


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
    assert {prompt.source for prompt in prompts} == {"data"}  # the file's name, not its path
    assert evaluate.max_model_len(config, prompts, 256) == 141
    assert evaluate.max_model_len(config, prompts, 128) == 128
    with pytest.raises(ValueError, match="1 prompts do not fit into the model's 91 positions"):
        evaluate.evaluation_prompts(config, 91, tokenizer)
