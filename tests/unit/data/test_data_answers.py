"""What a column may hold: the answer that is made of it, or the sentence that refuses it."""

import datetime
import decimal
import json

import datasets as hf_datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zero.config import DataConfig
from megatron_zero.data.answers import answer_texts
from megatron_zero.data.arrow_values import python_values
from megatron_zero.data.datasets import load_rows

ANY = r"text or a finite number is$"


def write_parquet(path, table):
    pq.write_table(table, path)


def write_saved(path, table):
    hf_datasets.Dataset(table).save_to_disk(path)


def write_formatted(path, table):
    """A format that a data set was left in must not reach the answers: arrays, tensors."""
    hf_datasets.Dataset(table).with_format("numpy").save_to_disk(path)


def answers_of(tmp_path, write, column) -> tuple[str, ...]:
    """The answers of the last of the column's rows, all of which have one."""
    path = tmp_path / ("rows.parquet" if write is write_parquet else "rows")
    write(path, pa.table({"problem": ["q"] * len(column), "answer": column}))
    rows = load_rows(DataConfig(dataset=str(path)))
    assert len(rows) == len(column)
    return rows[-1].answers


def refusal(config) -> str:
    with pytest.raises(ValueError) as caught:
        load_rows(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


ARROW_ANSWERS = {
    "text": (pa.array([" 7 "]), ("7",)),
    "large text": (pa.array(["7"], pa.large_string()), ("7",)),
    "dictionary": (pa.array(["7"]).dictionary_encode(), ("7",)),
    "float64": (pa.array([0.1]), ("0.1",)),
    "float64 of an integer": (pa.array([142.0]), ("142.0",)),
    "float32": (pa.array([0.1], pa.float32()), ("0.1",)),
    "float32 of an integer": (pa.array([142.0], pa.float32()), ("142.0",)),
    "float32, large": (pa.array([16777216.0], pa.float32()), ("16777216.0",)),
    "float32 in a list": (pa.array([[0.1, 2.5]], pa.list_(pa.float32())), ("0.1", "2.5")),
    "float32 in a list of two": (pa.array([[0.1, 2.5]], pa.list_(pa.float32(), 2)), ("0.1", "2.5")),
    "float16": (pa.array([np.float16(0.1)], pa.float16()), ("0.1",)),
    "int64": (pa.array([2**63 - 1]), ("9223372036854775807",)),
    "uint64": (pa.array([2**64 - 1], pa.uint64()), ("18446744073709551615",)),
    "bool": (pa.array([True]), ("True",)),
    "decimal": (pa.array([decimal.Decimal("1.50")]), ("1.50",)),
    "null in a list": (pa.array([["1", None, "2"]]), ("1", "2")),
}


@pytest.mark.parametrize("name", ARROW_ANSWERS)
@pytest.mark.parametrize("write", [write_parquet, write_saved, write_formatted])
def test_columns_that_are_answers(tmp_path, write, name):
    column, expected = ARROW_ANSWERS[name]
    assert answers_of(tmp_path, write, column) == expected


ARROW_REFUSALS = {
    "struct": (
        pa.array([{"style": "rule", "ground_truth": "2"}]),
        r"\(an object with fields style, ground_truth\) is no answer; "
        r"name one part, as in data.answer_key=answer.ground_truth$",
    ),
    "struct of numbers": (pa.array([{"a": 1}]), r"as in data.answer_key=answer.a$"),
    "list of structs": (
        pa.array([[{"value": "2"}]]),
        r"a list that holds an object with fields value\) .*data.answer_key=answer.0.value$",
    ),
    "list of lists": (pa.array([[["1"], ["2"]]]), r"holds a list\) .*=answer.0.0$"),
    "bytes": (pa.array([b"12"]), rf"b'12' \(bytes\) is no answer; {ANY}"),
    "nan": (pa.array([float("nan")]), rf"nan \(float\) is no answer; {ANY}"),
    "infinity": (pa.array([float("-inf")]), rf"-inf \(float\) is no answer; {ANY}"),
    "nan of float32": (pa.array([float("nan")], pa.float32()), rf"nan \(float\) .*{ANY}"),
    "nan in a list": (pa.array([[1.0, float("nan")]]), r"a list that holds float\)"),
    "date": (pa.array([datetime.date(2024, 1, 2)]), rf"\(date\) is no answer; {ANY}"),
    "time": (pa.array([datetime.time(1)]), r"\(time\) is no answer"),
    "timestamp": (pa.array([datetime.datetime(2024, 1, 2)]), r"\(datetime\) is no answer"),
    "duration": (pa.array([datetime.timedelta(1)]), r"\(timedelta\) is no answer"),
}


@pytest.mark.parametrize("name", ARROW_REFUSALS)
@pytest.mark.parametrize("write", [write_parquet, write_saved])
def test_columns_that_are_no_answers_are_refused_by_row(tmp_path, write, name):
    bad, message = ARROW_REFUSALS[name]
    path = tmp_path / ("rows.parquet" if write is write_parquet else "rows")
    column = pa.concat_arrays([pa.nulls(2, bad.type), bad])
    write(path, pa.table({"problem": ["q"] * 3, "answer": column}))
    with pytest.raises(
        ValueError, match=rf"data.answer_key='answer': row 2 of {path}: .*{message}"
    ):
        load_rows(DataConfig(dataset=str(path)))


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_class_label_is_its_name_not_its_number(tmp_path, kind):
    features = hf_datasets.Features(
        problem=hf_datasets.Value("string"), answer=hf_datasets.ClassLabel(names=["A", "B"])
    )
    columns = {"problem": ["q", "r", "s"], "answer": [1, -1, 0]}
    dataset = hf_datasets.Dataset.from_dict(columns, features=features)
    path = tmp_path / ("r.parquet" if kind == "parquet" else "saved")
    dataset.to_parquet(path) if kind == "parquet" else dataset.save_to_disk(path)
    rows = load_rows(DataConfig(dataset=str(path)))
    assert [(row.index, row.answers) for row in rows] == [(0, ("B",)), (2, ("A",))]


def test_a_map_is_an_object(tmp_path):
    column = pa.array([[("ground_truth", 0.1)]], pa.map_(pa.string(), pa.float32()))
    pq.write_table(pa.table({"problem": ["q"], "rm": column}), tmp_path / "r.parquet")
    config = DataConfig(dataset=str(tmp_path / "r.parquet"), answer_key="rm.ground_truth")
    assert load_rows(config)[0].answers == ("0.1",)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"7"', ("7",)),
        ("7", ("7",)),
        ("142.0", ("142.0",)),
        ("0.1", ("0.1",)),
        ("1e-7", ("1e-07",)),
        ("true", ("True",)),
        ("12345678901234567890123", ("12345678901234567890123",)),
        ('[null, 1, "2"]', ("1", "2")),
        ("{}", r"\{\} \(an empty object\) is no answer; " + ANY),
        (
            '{"a": {"b": 1}}',
            r"fields a\) is no answer; name one part, as in data.answer_key=answer.a.b$",
        ),
        ("NaN", rf"nan \(float\) is no answer; {ANY}"),
        ("1e400", rf"inf \(float\) is no answer; {ANY}"),
        ('"\\ud800"', r"a lone surrogate '\\ud800' at character 1, which is not text$"),
        ('"ab\\u0000"', r"a NUL character '\\x00' at character 3, which is not text$"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_json_answers(tmp_path, kind, text, expected):
    path = tmp_path / f"rows.{kind}"
    first, last = '{"problem": "q", "answer": "1"}', f'{{"problem": "q", "answer": {text}}}'
    path.write_text(f"{first}\n\n{last}\n" if kind == "jsonl" else f"[{first},\n\n{last}]\n")
    if isinstance(expected, tuple):
        assert load_rows(DataConfig(dataset=str(path)))[1].answers == expected
        return
    place = rf"data.answer_key='answer': row 1 \(line 3\) of {path}: "
    with pytest.raises(ValueError, match=f"{place}.*{expected}"):
        load_rows(DataConfig(dataset=str(path)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("null", "empty, not a text"),
        ('""', "empty, not a text"),
        ('" \\n "', r"' \\n ' is blank, not a question"),
        ("0", "int, not a text"),
        ("7", "int, not a text"),
        ('["q"]', "list, not a text; name one part, as in data.prompt_key=problem.0$"),
        ('[{"role": "user", "content": "q"}]', "as in data.prompt_key=problem.0.content$"),
        ('"\\udfff"', r"a lone surrogate '\\udfff' at character 1, which is not text$"),
        ('"\\u0000"', r"a NUL character '\\x00' at character 1, which is not text$"),
    ],
)
def test_json_questions_that_are_none(tmp_path, text, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"problem": "q", "answer": 1}}\n{{"problem": {text}, "answer": 1}}\n')
    place = rf"^data.prompt_key='problem': row 1 \(line 2\) of {path}: "
    with pytest.raises(ValueError, match=f"{place}{message}|{place}.*{message}"):
        load_rows(DataConfig(dataset=str(path)))


def test_a_row_of_several_parquet_files_is_named_by_its_file(tmp_path):
    for number, answers in enumerate([["1", "2"], ["3", " "], [" ", "6"]]):
        table = pa.table({"problem": ["q", "q" if number < 2 else " "], "answer": answers})
        pq.write_table(table, tmp_path / f"part-{number}.parquet")
    message = refusal(DataConfig(dataset=str(tmp_path)))
    assert message.startswith(f"data.prompt_key='problem': row 1 of {tmp_path}/part-2.parquet: ")


@pytest.mark.parametrize(
    ("key", "there"),
    [
        ("rm.groundtruth", 'rm has fields ground_truth, style; did you mean "ground_truth"?'),
        ("rm.x.y", "rm has fields ground_truth, style"),
        ("rm.ground_truth.x", "rm.ground_truth is str"),
        ("rm.style.1", "rm.style is a list of 1"),
    ],
)
def test_a_path_that_leads_nowhere_says_where_it_ends(tmp_path, key, there):
    path = tmp_path / "r.jsonl"
    empty = {"problem": "q", "rm": None}
    record = {"problem": "q", "rm": {"ground_truth": "2", "style": ["rule"]}}
    path.write_text(f"{json.dumps(empty)}\n{json.dumps(record)}\n")
    message = refusal(DataConfig(dataset=str(path), answer_key=key))
    assert message == f"data.answer_key={key!r}: leads nowhere in {path}: there, {there}"


def test_decimals_are_written_out():
    assert answer_texts(decimal.Decimal("12E3"), "answer", "row 0") == ("12000",)
    assert answer_texts(decimal.Decimal("1.50"), "answer", "row 0") == ("1.50",)
    for text in ("NaN", "Infinity"):
        with pytest.raises(ValueError, match=r"\(Decimal\) is no answer"):
            answer_texts(decimal.Decimal(text), "answer", "row 0")


@settings(deadline=None)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_a_float32_is_the_shortest_decimal_that_is_it(value):
    """Read back as float32 it is the same number, and no shorter decimal would be."""
    [number] = python_values(pa.chunked_array([pa.array([value], pa.float32())]))
    [text] = answer_texts(number, "answer", "row 0")
    assert np.float32(text) == np.float32(value)
    digits = decimal.Decimal(text).normalize().as_tuple().digits
    if len(digits) > 1:
        shorter = decimal.Context(prec=len(digits) - 1).create_decimal(decimal.Decimal(value))
        assert np.float32(str(shorter)) != np.float32(value)


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float64_is_spelled_as_python_does(value):
    [number] = python_values(pa.chunked_array([pa.array([value])]))
    assert answer_texts(number, "answer", "row 0") == (str(value),)
