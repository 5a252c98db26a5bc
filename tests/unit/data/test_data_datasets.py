"""Rows from every kind of source, and what the errors say."""

import json

import datasets as hf_datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_zero.config import DataConfig
from megatron_zero.data import arithmetic
from megatron_zero.data.datasets import (
    BENCHMARKS,
    KNOWN,
    Row,
    evaluation_data,
    known_names,
    load_rows,
)

RECORDS = [{"problem": "1+1?", "answer": " 2 "}, {"problem": "2+2?\n", "answer": "4"}]
ROWS = [
    Row(index=0, question="1+1?", answers=("2",)),
    Row(index=1, question="2+2?\n", answers=("4",)),
]


def write_parquet(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(records), path)
    return path


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + "\n")
    return path


def write_json(path, records):
    path.write_text(json.dumps(records))
    return path


def write_dataset(path, records):
    hf_datasets.Dataset.from_list(records).save_to_disk(path)
    return path


def write_dataset_dict(path, records):
    other = hf_datasets.Dataset.from_list([{"problem": "no", "answer": "no"}])
    train = hf_datasets.Dataset.from_list(records)
    hf_datasets.DatasetDict(train=train, test=other).save_to_disk(path)
    return path


def write_folder(path, records):
    for i, record in enumerate(records):
        write_parquet(path / f"part-{i}.parquet", [record])
    return path


def write_snapshot(path, records):
    """As the hub lays out its repositories."""
    write_parquet(path / "data" / "train-00000-of-00001.parquet", records)
    write_parquet(path / "data" / "test-00000-of-00001.parquet", [{"problem": "n", "answer": "n"}])
    return path


@pytest.mark.parametrize(
    "write, name",
    [
        (write_parquet, "rows.parquet"),
        (write_jsonl, "rows.jsonl"),
        (write_json, "rows.json"),
        (write_dataset, "saved"),
        (write_dataset_dict, "saved_dict"),
        (write_folder, "folder"),
        (write_snapshot, "snapshot"),
    ],
)
def test_every_kind_of_source_gives_the_same_rows(tmp_path, write, name):
    path = write(tmp_path / name, RECORDS)
    assert load_rows(DataConfig(dataset=str(path))) == ROWS
    assert load_rows(DataConfig(dataset=str(path), max_prompts=1)) == ROWS[:1]
    assert load_rows(DataConfig(dataset=str(path), max_prompts=99)) == ROWS


@pytest.mark.parametrize("write", [write_dataset_dict, write_snapshot])
def test_split_chooses_and_a_missing_one_is_named(tmp_path, write):
    path = write(tmp_path / "source", RECORDS)
    assert load_rows(DataConfig(dataset=str(path), split="test"))[0].question.startswith("n")
    with pytest.raises(ValueError, match=r"data.split='dev': .* has (train, test|test, train)"):
        load_rows(DataConfig(dataset=str(path), split="dev"))


def test_list_column_answers_is_preferred_and_cleaned(tmp_path):
    records = [
        {"problem": "a", "answer": "no", "answers": ["9.6\n", "9.60", "9.6"]},
        {"problem": "b", "answer": "no", "answers": ["142.0"]},
    ]
    path = write_parquet(tmp_path / "rows.parquet", records)
    rows = load_rows(DataConfig(dataset=str(path)))
    assert [row.answers for row in rows] == [("9.6", "9.60"), ("142.0",)]
    by_key = load_rows(DataConfig(dataset=str(path), answer_key="answer"))
    assert by_key[0].answers == ("no",)


@pytest.mark.parametrize("value, text", [(142.0, "142.0"), (7, "7"), (0, "0"), (["1", "2"], "1")])
def test_numbers_are_kept_as_they_are(tmp_path, value, text):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"problem": "a", "answer": value}])
    assert load_rows(DataConfig(dataset=str(path)))[0].answers[0] == text


def test_nested_columns_are_reached_by_a_path(tmp_path):
    record = {
        "prompt": [{"role": "user", "content": "1+1?"}],
        "reward_model": {"ground_truth": "2", "style": "rule"},
    }
    path = write_parquet(tmp_path / "verl.parquet", [record])
    config = DataConfig(
        dataset=str(path), prompt_key="prompt.0.content", answer_key="reward_model.ground_truth"
    )
    assert load_rows(config) == ROWS[:1]
    with pytest.raises(
        ValueError, match=r"data.prompt_key='prompt': row 0 of .*: list, not a text"
    ):
        load_rows(DataConfig(dataset=str(path), prompt_key="prompt", answer_key="reward_model"))
    with pytest.raises(
        ValueError, match=r"'prompt.3.content': leads nowhere in .*: there, prompt is a list of 1$"
    ):
        load_rows(
            DataConfig(dataset=str(path), prompt_key="prompt.3.content", answer_key="reward_model")
        )


def test_a_column_with_a_dot_in_its_name_is_found_first(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"a.b": "q", "a": {"b": "no"}, "answer": "1"}])
    assert load_rows(DataConfig(dataset=str(path), prompt_key="a.b"))[0].question == "q"
    path = write_parquet(tmp_path / "r.parquet", [{"a.b": "q", "a": {"b": "no"}, "answer": "1"}])
    assert load_rows(DataConfig(dataset=str(path), prompt_key="a.b"))[0].question == "q"


@pytest.mark.parametrize("answer", [None, "", "  ", [], [" "]])
def test_rows_without_answer_are_left_out_and_counted(tmp_path, caplog, answer):
    """MATH has two, with an empty gold box: a response with an empty box would be right."""
    records = [{"problem": "a", "answer": answer}, *RECORDS]
    path = write_jsonl(tmp_path / "rows.jsonl", records)
    rows = load_rows(DataConfig(dataset=str(path)))
    assert [(row.index, row.question) for row in rows] == [(1, "1+1?"), (2, "2+2?\n")]
    assert "1 of 3 rows left out, without answer" in caplog.text
    with pytest.raises(ValueError, match=r"data.answer_key='answer': none of 1 rows of .* has one"):
        load_rows(DataConfig(dataset=str(path), max_prompts=1))


def test_missing_columns_list_those_there_are(tmp_path):
    path = write_parquet(tmp_path / "r.parquet", [{"Problem": "a", "solution": "1", "id": 1}])
    with pytest.raises(ValueError) as error:
        load_rows(DataConfig(dataset=str(path)))
    assert str(error.value) == (
        f"data.prompt_key='problem': no such column in {path}; it has Problem, solution, id; "
        'did you mean "Problem"?'
    )
    with pytest.raises(ValueError, match=r"data.answer_key='answer': no such column"):
        load_rows(DataConfig(dataset=str(path), prompt_key="Problem"))


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"problem": 1}\n{oops\n', r"data.dataset=.*line 2 is not JSON"),
        ("[1]\n", r"line 1 holds list, not an object"),
    ],
)
def test_broken_jsonl_names_the_line(tmp_path, content, message):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_rows(DataConfig(dataset=str(tmp_path / "rows.jsonl")))


def test_json_must_be_a_list(tmp_path):
    (tmp_path / "rows.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"must be a list of objects"):
        load_rows(DataConfig(dataset=str(tmp_path / "rows.json")))


def test_paths_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"data.dataset='.*none.parquet': no such file or folder"):
        load_rows(DataConfig(dataset=str(tmp_path / "none.parquet")))
    with pytest.raises(ValueError, match=r"a folder must hold parquet files"):
        load_rows(DataConfig(dataset=str(tmp_path)))
    (tmp_path / "rows.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"must be a folder or end in one of .parquet, .jsonl"):
        load_rows(DataConfig(dataset=str(tmp_path / "rows.csv")))


@pytest.mark.parametrize("name, meant", [("math12k", "math_12k"), ("olympiad", "olympiad_bench")])
def test_unknown_name_lists_the_known_and_the_nearest(name, meant):
    with pytest.raises(ValueError) as error:
        load_rows(DataConfig(dataset=name), setting="evaluation.datasets")
    text = str(error.value)
    assert text.startswith(f"evaluation.datasets={name!r}: must be one of math_12k, ")
    assert text.endswith(f'; did you mean "{meant}"?')
    assert all(known in text for known in known_names())


def test_empty_name_is_refused():
    with pytest.raises(ValueError, match=r"data.dataset='': must be one of"):
        load_rows(DataConfig(dataset=""))


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ""])
def test_known_names_are_found_under_data_dir(tmp_path, monkeypatch, name, suffix):
    monkeypatch.setattr(hf_datasets, "load_dataset", None)  # the hub would be an error
    path = tmp_path / f"{KNOWN[name].files[0]}{suffix}"
    path.parent.mkdir(parents=True)
    write = {".parquet": write_parquet, ".jsonl": write_jsonl, "": write_dataset}[suffix]
    write(path, RECORDS)
    assert load_rows(DataConfig(dataset=name, data_dir=str(tmp_path))) == ROWS


def test_the_reference_layout_is_a_data_dir(tmp_path):
    write_dataset_dict(tmp_path / "train" / "math_12k", RECORDS)
    suite = hf_datasets.DatasetDict(aime=hf_datasets.Dataset.from_list(RECORDS))
    suite.save_to_disk(tmp_path / "evaluation_suite")
    for name in ("math_12k", "aime"):
        assert load_rows(DataConfig(dataset=name, data_dir=str(tmp_path))) == ROWS


def test_gsm8k_with_its_test_set_is_not_taken(tmp_path):
    write_parquet(tmp_path / "train" / "gsm_8k.parquet", RECORDS)
    assert not any("gsm_8k" in file.split("/") for file in KNOWN["gsm8k"].files)
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return hf_datasets.Dataset.from_list([{"question": "q", "answer": "so 3*4=12\n#### 12"}])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_datasets, "load_dataset", load_dataset)
        rows = load_rows(DataConfig(dataset="gsm8k", data_dir=str(tmp_path)))
    assert calls == [(("openai/gsm8k", "main"), {"split": "train"})]
    assert rows == [Row(index=0, question="q", answers=("12",))]


HUB_ROWS = {  # one row with the columns that the hub's set has
    "orz_57k": {"0": {"value": "q"}, "1": {"ground_truth": {"value": "7"}}},
    "math_lvl3to5_8k": {"problem": "no", "answer": "no", "question": "q", "gt_answer": "7"},
    "dapo_17k": {"prompt": "q", "solution": "7"},
    "olympiad_bench": {"question": "q", "final_answer": ["7"]},
    "minerva": {"question": "q", "answer": "7"},
    "aime": {"problem": "q", "answer": "7", "solution": "no"},
    "amc": {"problem": "q", "answer": 7.0},
}


@pytest.mark.parametrize("name", HUB_ROWS)
def test_hub_columns_of_known_names(monkeypatch, name):
    def load_dataset(hub_id, config, *, split):
        hub_config, _, expected = KNOWN[name].hub.rpartition("@")
        assert (hub_id, config) == (expected, hub_config or None)
        assert split == KNOWN[name].split
        return hf_datasets.Dataset.from_list([HUB_ROWS[name]])

    monkeypatch.setattr(hf_datasets, "load_dataset", load_dataset)
    answer = "7.0" if name == "amc" else "7"
    assert load_rows(DataConfig(dataset=name)) == [Row(index=0, question="q", answers=(answer,))]


def test_a_hub_id_may_have_a_config(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return hf_datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(hf_datasets, "load_dataset", load_dataset)
    assert load_rows(DataConfig(dataset="owner/name", split="test")) == ROWS
    assert load_rows(DataConfig(dataset="all@owner/name")) == ROWS
    assert calls == [
        (("owner/name", None), {"split": "test"}),
        (("owner/name", "all"), {"split": "train"}),
    ]


@pytest.mark.parametrize(
    "error", [ConnectionError("offline"), ValueError("no split"), FileNotFoundError("no such id")]
)
def test_hub_failures_say_what_to_do(monkeypatch, error):
    def load_dataset(*args, **kwargs):
        raise error

    monkeypatch.setattr(hf_datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"data.dataset='math_12k': not found locally \(data.data"):
        load_rows(DataConfig(dataset="math_12k"))


def test_a_set_on_no_hub_names_the_file_to_put(tmp_path):
    with pytest.raises(ValueError, match=r"'asdiv': is on no hub: set data.data_dir .*asdiv_2k.pa"):
        load_rows(DataConfig(dataset="asdiv", data_dir=str(tmp_path)))


def test_a_missing_data_dir_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data.data_dir='.*nowhere': no such folder"):
        load_rows(DataConfig(dataset="aime", data_dir=str(tmp_path / "nowhere")))


def test_a_split_that_a_known_name_has_not_is_refused():
    with pytest.raises(ValueError, match=r"data.split='test': gsm8k is always its split 'train'"):
        load_rows(DataConfig(dataset="gsm8k", split="test"))


def test_evaluation_of_a_known_name_ignores_the_training_columns():
    config = DataConfig(dataset="x/y", split="en", prompt_key="p", answer_key="a", template="r1")
    known = evaluation_data(config, "aime", 5)
    assert (known.dataset, known.split, known.prompt_key, known.answer_key) == (
        *("aime", "train", ""),
        "",
    )
    assert (known.max_prompts, known.template) == (5, "r1")
    other = evaluation_data(config, "x/z", 0)
    assert (other.split, other.prompt_key, other.answer_key) == ("en", "p", "a")


def test_generated_sets():
    train = load_rows(DataConfig(dataset="arithmetic"), seed=4)
    assert len(train) == arithmetic.NUM_TRAIN_ROWS
    config = DataConfig().arithmetic
    assert [(r.question, r.answers[0]) for r in train[:50]] == [
        arithmetic.problem(4, i, config) for i in range(50)
    ]
    assert len(load_rows(DataConfig(dataset="arithmetic", max_prompts=10_000))) == 10_000
    held_out = load_rows(DataConfig(dataset="arithmetic_heldout"), seed=4)
    assert len(held_out) == 256 and [row.index for row in held_out] == list(range(256))
    assert held_out == load_rows(DataConfig(dataset="arithmetic_heldout"), seed=5)
    assert not {row.question for row in held_out} & {row.question for row in train}
    assert len(load_rows(DataConfig(dataset="arithmetic_heldout", max_prompts=3))) == 3


def test_every_benchmark_is_known():
    assert set(BENCHMARKS) <= set(known_names())
    assert KNOWN["math500"] == KNOWN["math"]
