"""Files that cannot be read: one sentence with the setting, the file and the line or row."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets as hf_datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_zero.checks import UserError
from megatron_zero.config import (
    DataConfig,
    DocumentsConfig,
    EvaluationConfig,
    ModelConfig,
    PretrainConfig,
    RunConfig,
)
from megatron_zero.data import documents, preflight
from megatron_zero.data.datasets import load_rows
from megatron_zero.data.preflight import check_data_files
from megatron_zero.data.templates import apply_template

ROOT = Path(__file__).parents[3]
RECORD = '{"problem": "q", "answer": "1", "text": "t", "solution": "s"}'
LINES = f"{RECORD}\n{RECORD}\n"
ACCENT = '{"problem": "é", "answer": "1", "text": "é", "solution": "s"}'
MODEL = ModelConfig(init="random", tokenizer="characters")
NUL_HINT = "; it holds NUL bytes: it is binary, UTF-16 or was cut off while it was written"


def of_rows(path):
    load_rows(DataConfig(dataset=str(path)))


def of_documents(path):
    documents.read_texts(DocumentsConfig(source=str(path)))


def of_worked_problems(path):
    apply_template("few_shot", "q", few_shot=str(path))


def of_training(path):
    check_data_files(RunConfig(name="a", model=MODEL, data=DataConfig(dataset=str(path))))


def of_evaluation(path):
    evaluation = EvaluationConfig(datasets=["arithmetic_heldout", str(path)])
    check_data_files(RunConfig(name="a", model=MODEL, evaluation=evaluation))


def of_few_shot(path):
    data = DataConfig(template="few_shot", few_shot=str(path))
    check_data_files(RunConfig(name="a", model=MODEL, data=data))


def of_pretraining(path):
    check_data_files(
        PretrainConfig(name="a", model=MODEL, documents=DocumentsConfig(source=str(path)))
    )


READERS = {
    of_rows: "data.dataset",
    of_documents: "documents.source",
    of_worked_problems: "data.few_shot",
    of_training: "data.dataset",
    of_evaluation: "evaluation.datasets",
    of_few_shot: "data.few_shot",
    of_pretraining: "documents.source",
}


def refusal(function, *args) -> str:
    with pytest.raises(UserError) as caught:  # said in one line, without a traceback
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


UNREADABLE = {
    "latin.jsonl": (LINES.encode() + ACCENT.encode("latin-1"), "line 3 is not UTF-8: byte 0xe9"),
    "latin.json": (f"[{RECORD},\n{ACCENT}]".encode("latin-1"), "line 2 is not UTF-8: byte 0xe9"),
    "utf16.jsonl": (LINES.encode("utf-16"), "line 1 is not UTF-8: byte 0xff at character 1; it "),
    "utf16.json": (f"[{RECORD}]".encode("utf-16-le"), "line 1 is not JSON: "),
    "gzip.jsonl": (gzip.compress(LINES.encode()), "it looks like gzip: decompress it first"),
    "parquet.jsonl": (b"PAR1\x15\x04", "it looks like parquet: name it .parquet"),
    "empty.jsonl": (b"", "holds no records"),
    "empty.json": (b"", "holds no records"),
    "blank.jsonl": (b"\n \n", "holds no records"),
    "blank.json": (b"\n \n", "holds no records"),
    "no.json": (b" [ \n ] ", "holds no records"),
    "broken.jsonl": (f"{LINES}{{oops\n".encode(), "line 3 is not JSON: Expecting property name"),
    "quotes.jsonl": (b"{'problem': 'q'}", "line 1 is not JSON: Expecting property name"),
    "two.jsonl": (f"{RECORD}{RECORD}".encode(), "line 1 is not JSON: there is more behind its fi"),
    "control.jsonl": (b'{"problem": "a\tb"}', "line 1 is not JSON: Invalid control character at"),
    "cut.jsonl": (f"{RECORD}\n{RECORD[:-9]}".encode(), "line 2 is not JSON: Unterminated string"),
    "cut.json": (f"[{RECORD},\n{RECORD}".encode(), "line 2 is not JSON: a comma or the list's end"),
    "cut_string.json": (f"[{RECORD},\n{RECORD[:-9]}".encode(), "line 2 is not JSON: Untermina"),
    "comma.json": (f"[{RECORD}\n{RECORD}]".encode(), "line 2 is not JSON: a comma or the list's"),
    "trailing.json": (f"[{RECORD},\n]".encode(), "line 2 is not JSON: Expecting value at char"),
    "behind.json": (f"[{RECORD}]\n\nx".encode(), "line 3 is not JSON: there is more behind the l"),
    "inner.json": (b'[{"a": 1,\n "b": 2,\n c}]', "line 3 is not JSON: Expecting property name"),
    "nul.jsonl": (LINES.encode() + b"\0" * 9, f"line 3 is not JSON: Expecting value.*{NUL_HINT}"),
    "nul.json": (f"[{RECORD},\n\0]".encode(), f"line 2 is not JSON: Expecting value.*{NUL_HINT}"),
    "twice.jsonl": (
        f'{RECORD}\n{{"a": 1, "b": 2, "a": 3}}'.encode(),
        "line 2 has an object with t",
    ),
    "twice.json": (f'[{RECORD},\n{{"b": {{"a": 1,\n "a": 3}}}}]'.encode(), "line 2 .* key 'a' tw"),
    "number.jsonl": (b"3", "line 1 holds int, not an object"),
    "mixed.json": (f"[{RECORD},\n\n[1]]".encode(), "line 3 holds list, not an object"),
    "object.json": (b'{"problem": ["q"]}', "holds a single object: must be a list of objects, or"),
    "text.json": (b'"q"', "holds str: must be a list of objects, or hold several, one per line"),
    "deep.jsonl": (b'{"a": ' + b"[" * 10**5, "line 1 is nested too deeply"),
    "deep.json": (b'[\n{"a": ' + b"[" * 10**5, "line 2 is nested too deeply"),
    "digits.jsonl": (b'{"a": %s}' % (b"1" * 5000), "line 1 has an integer of more than 4300 digit"),
    "digits.json": (b'[\n{"a": %s}]' % (b"1" * 5000), "line 2 has an integer of more than 4300"),
    "empty.parquet": (b"", "cannot be read as parquet: Parquet file size is 0 bytes"),
    "magic.parquet": (b"PAR1", "cannot be read as parquet: "),
    "text.parquet": (LINES.encode(), "cannot be read as parquet: Parquet magic bytes not found"),
}


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_cannot_be_read_is_named_with_its_line(tmp_path, read, name):
    content, message = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{READERS[read]}='{tmp_path / name}': .*{message}"):
        read(tmp_path / name)
    refusal(read, tmp_path / name)


READABLE = {
    "lines.json": LINES.encode(),
    "spaced.json": f"\n  {RECORD}\n\n{RECORD}".encode(),
    "list.json": f"[{RECORD},\n{RECORD}]\n".encode(),
    "windows.json": f"[{RECORD},\r\n{RECORD}]\r\n".encode(),
    "mark.json": f"\ufeff[{RECORD},{RECORD}]".encode(),
    "mark_lines.json": f"\ufeff{LINES}".encode(),
    "mark.jsonl": f"\ufeff{LINES}".encode(),
    "windows.jsonl": f"{RECORD}\r\n{RECORD}\r\n".encode(),
    "old_mac.jsonl": f"{RECORD}\r{RECORD}".encode(),
    "no_end.jsonl": f"{RECORD}\n\n{RECORD}".encode(),
}


@pytest.mark.parametrize("name", READABLE)
def test_what_can_only_mean_one_thing_is_read(tmp_path, name):
    (tmp_path / name).write_bytes(READABLE[name])
    rows = load_rows(DataConfig(dataset=str(tmp_path / name)))
    assert [(row.question, row.answers) for row in rows] == [("q", ("1",))] * 2
    assert documents.read_texts(DocumentsConfig(source=str(tmp_path / name))) == (["t", "t"], 2)


def test_line_separators_inside_of_a_text_are_kept(tmp_path):
    record = {"problem": "a\u2028b\x85c", "answer": "1"}
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
    assert load_rows(DataConfig(dataset=str(path)))[0].question == record["problem"]


def damaged_parquet(path, change):
    count = 20_000
    table = pa.table({name: [f"{name}{i}" for i in range(count)] for name in ("problem", "answer")})
    pq.write_table(table.append_column("text", table["problem"]), path)
    data = bytearray(path.read_bytes())
    path.write_bytes(change(data))


def zeroed(data: bytearray) -> bytearray:
    data[1000:3000] = bytes(2000)
    return data


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data[: len(data) // 2], "Parquet magic bytes not found"),
        (zeroed, "Corrupt snappy compressed data"),
    ],
)
@pytest.mark.parametrize("place", ["r.parquet", "folder/r.parquet"])
def test_a_damaged_parquet_file_is_named(tmp_path, place, change, reason):
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    damaged_parquet(path, change)
    given = path if path.parent == tmp_path else path.parent
    message = refusal(of_rows, given)
    assert message.startswith(f"data.dataset='{path}': cannot be read as parquet: {reason}")


def test_a_text_in_parquet_that_is_not_utf8_is_named_by_row(tmp_path):
    wrong = pa.array([b"ok", b"\xff"]).buffers()
    column = pa.Array.from_buffers(pa.string(), 2, wrong)
    path = tmp_path / "r.parquet"
    pq.write_table(pa.table({"problem": column, "answer": ["1", "2"], "text": column}), path)
    assert refusal(of_rows, path) == (
        f"data.dataset='{path}': row 1: problem is not UTF-8: byte 0xff"
    )
    assert "row 1: text is not UTF-8" in refusal(of_documents, path)


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "r.parquet"
    pq.write_table(pa.table([["1"], ["2"], ["3"]], names=["problem", "answer", "answer"]), path)
    assert refusal(of_rows, path) == f"data.dataset='{path}': has two columns named 'answer'"


def test_a_table_without_rows_is_refused(tmp_path):
    path = tmp_path / "r.parquet"
    empty = pa.table({name: pa.array([], pa.string()) for name in ("problem", "answer")})
    pq.write_table(empty, path)
    hf_datasets.Dataset(empty).save_to_disk(tmp_path / "saved")
    assert "has no rows" in refusal(of_rows, path)
    assert "has no rows" in refusal(of_rows, tmp_path / "saved")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("data-00000-of-00001.arrow", b"\xff\xff\xff\xff\xb0\x01\0\0x", "Expected to read"),
        ("data-00000-of-00001.arrow", None, "No such file"),
        ("state.json", None, "neither a `Dataset` directory"),
        ("dataset_info.json", b"{", "Expecting property name"),
        ("dataset_info.json", b"[]", "'list' object"),
        ("dataset_info.json", b'{"features": {"problem": {"_type": "X"}}}', "Feature type 'X'"),
    ],
)
def test_a_damaged_saved_data_set_is_named(tmp_path, name, content, reason):
    path = tmp_path / "saved"
    hf_datasets.Dataset.from_dict({"problem": ["q"], "answer": ["1"]}).save_to_disk(path)
    (path / name).unlink()
    if content is not None:
        (path / name).write_bytes(content)
    message = refusal(of_rows, path)
    assert message.startswith(f"data.dataset='{path}': cannot be read as a saved data set: ")
    assert reason in message


@pytest.mark.parametrize("name", ["r.jsonl.gz", "r.parquet.zst"])
def test_a_compressed_file_is_not_read(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(LINES.encode()))
    message = refusal(of_rows, tmp_path / name)
    assert message.endswith("end in one of .parquet, .jsonl, .json (decompress it first)")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\né".encode("latin-1"), "line 2 is not UTF-8: byte 0xe9 at character 1"),
        ("a\nb".encode("utf-16"), "line 1 is not UTF-8: byte 0xff at character 1; it looks like U"),
        (b"a\nb\0", "line 2 holds a NUL character: it is binary, UTF-16 or damaged"),
    ],
)
def test_text_files_that_are_no_text(tmp_path, content, message):
    (tmp_path / "book.txt").write_bytes(content)
    text = refusal(of_documents, tmp_path / "book.txt")
    assert text.startswith(f"documents.source='{tmp_path / 'book.txt'}': {message}")


def test_a_byte_order_mark_is_not_part_of_a_text(tmp_path):
    (tmp_path / "book.txt").write_bytes("\ufeffé\r\n".encode())
    found = documents.read_texts(DocumentsConfig(source=str(tmp_path / "book.txt")))
    assert found == (["é\n"], 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("7", "row 1 (line 2) of {}: int, not text"),
        ('["t"]', "row 1 (line 2) of {}: list, not text"),
        ('"a\\ud800"', r"row 1 (line 2) of {}: a lone surrogate '\ud800' at character 2, which"),
    ],
)
def test_documents_that_are_no_text(tmp_path, text, message):
    path = tmp_path / "c.jsonl"
    path.write_text(f'{{"text": "t"}}\n{{"text": {text}}}\n')
    found = refusal(of_documents, path)
    assert found.startswith(f"documents.text_key='text': {message.format(path)}")
    path.write_text('{"text": "a\\u0000b"}\n')  # kept: programs have some
    assert documents.read_texts(DocumentsConfig(source=str(path))) == (["a\0b"], 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"problem": "p"}', "no such column in {0}; it has problem"),
        (
            '{"problem": "p", "solution": null}',
            "row 0 (line 1) of {0}: its solution is None, not a",
        ),
        (
            '{"problem": " ", "solution": "s"}',
            "row 0 (line 1) of {0}: its problem is ' ', not a te",
        ),
        ('{"problem": 3, "solution": "s"}', "row 0 (line 1) of {0}: its problem is 3, not a text"),
        ('{"problem": "p", "solution": "\\ud800"}', "row 0 (line 1) of {0}: a lone surrogate"),
    ],
)
def test_worked_problems_that_are_no_text(tmp_path, text, message):
    path = tmp_path / "shots.jsonl"
    path.write_text(text)
    for read in (of_worked_problems, of_few_shot):
        assert message.format(path) in refusal(read, path)


@pytest.fixture
def unreadable(tmp_path_factory):
    """A folder with things that nobody may read, seen by somebody who is not root."""
    folder = Path(tempfile.mkdtemp())  # tmp_path lies in a folder that only its owner may enter
    folder.chmod(0o755)
    (folder / "r.jsonl").write_text(LINES)
    (folder / "book.txt").write_text("text")
    pq.write_table(pa.table({"problem": ["q"], "answer": ["1"]}), folder / "r.parquet")
    (folder / "closed").mkdir()
    (folder / "closed" / "r.jsonl").write_text(LINES)
    for name in ("r.jsonl", "book.txt", "r.parquet", "closed"):
        (folder / name).chmod(0)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    yield folder
    if is_root:
        os.seteuid(0)
    (folder / "closed").chmod(0o755)
    shutil.rmtree(folder)


def test_what_may_not_be_read(unreadable):
    for name in ("r.jsonl", "r.parquet", "closed", "closed/r.jsonl"):
        for read, setting in READERS.items():
            message = refusal(read, unreadable / name)
            assert message == f"{setting}='{unreadable / name}': cannot be read: Permission denied"
    for read in (of_documents, of_pretraining):
        assert "book.txt': cannot be read: Permission denied" in refusal(
            read, unreadable / "book.txt"
        )
    data = DataConfig(dataset="math_12k", data_dir=str(unreadable / "closed"))
    message = refusal(check_data_files, RunConfig(name="a", model=MODEL, data=data))
    assert message.startswith(f"data.data_dir='{unreadable}/closed': cannot be read: Permission")


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_a_path_that_is_none(tmp_path, read):
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    message = refusal(read, tmp_path / "loop.jsonl")
    assert message.endswith(": cannot be read: Too many levels of symbolic links")
    message = refusal(read, tmp_path / f"{'x' * 300}.jsonl")
    assert message.endswith(": cannot be read: File name too long")
    for path in (tmp_path / "none.jsonl", tmp_path / "a\0b.jsonl", "/dev/null"):
        assert "no such file" in (text := refusal(read, path)) or "that exists and ends" in text


# before any process is started


def test_everything_that_a_run_reads_is_checked_without_torch(tmp_path):
    """In a fresh process: what it loads, and that it is quick to load, is what this is about."""
    pq.write_table(pa.table({"problem": ["q"], "answer": ["1"]}), tmp_path / "r.parquet")
    (tmp_path / "r.json").write_text(f"[{RECORD}]")
    (tmp_path / "book.txt").write_text("text")
    script = f"""
import sys
from megatron_zero.config import *
from megatron_zero.data.preflight import check_data_files
model = ModelConfig(init="random", tokenizer="characters")
data = DataConfig(dataset={str(tmp_path / "r.parquet")!r}, template="few_shot")
evaluation = EvaluationConfig(datasets=["aime", "owner/name", {str(tmp_path / "r.json")!r}])
check_data_files(RunConfig(name="a", model=model, data=data, evaluation=evaluation))
documents = DocumentsConfig(source={str(tmp_path / "book.txt")!r})
check_data_files(PretrainConfig(name="a", model=model, documents=documents))
heavy = ("torch", "transformers", "datasets", "pandas", "megatron.core", "vllm")
print([name for name in heavy if name in sys.modules])
"""
    answer = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert answer.stdout == "[]\n" and answer.stderr == ""


def test_the_hub_is_not_asked(monkeypatch):
    monkeypatch.setattr(hf_datasets, "load_dataset", None)
    data = DataConfig(dataset="math_12k")
    evaluation = EvaluationConfig(datasets=["aime", "all@owner/name"])
    check_data_files(RunConfig(name="a", model=MODEL, data=data, evaluation=evaluation))


@pytest.mark.parametrize(
    ("data", "evaluation", "message"),
    [
        ({"dataset": "math12k"}, [], "data.dataset='math12k': must be one of math_12k, "),
        ({"dataset": "asdiv"}, [], "data.dataset='asdiv': is on no hub: set data.data_dir"),
        ({"dataset": "aime", "data_dir": "/none"}, [], "data.data_dir='/none': no such folder"),
        ({"dataset": "./none.parquet"}, [], "data.dataset='none.parquet': no such file or folder"),
        ({}, ["aimee"], "evaluation.datasets='aimee': must be one of math_12k, "),
        ({"dataset": "gsm8k", "split": "test"}, [], "data.split='test': gsm8k is always its split"),
    ],
)
def test_names_that_lead_nowhere_are_refused_at_once(data, evaluation, message):
    config = RunConfig(
        name="a",
        model=MODEL,
        data=DataConfig(**data),
        evaluation=EvaluationConfig(datasets=evaluation),
    )
    assert refusal(check_data_files, config).startswith(message)


def test_columns_are_checked_at_once(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(LINES)
    data = DataConfig(dataset=str(path), answer_key="anser")
    message = refusal(check_data_files, RunConfig(name="a", model=MODEL, data=data))
    assert message.endswith('it has problem, answer, text, solution; did you mean "answer"?')


def test_warnings_are_left_to_the_ranks(tmp_path, caplog):
    path = tmp_path / "r.jsonl"
    path.write_text(f'{RECORD}\n{{"problem": "q", "answer": "", "text": ""}}\n')
    of_training(path)
    of_pretraining(path)
    assert caplog.text == ""


def test_a_large_corpus_is_not_read_twice(tmp_path, monkeypatch):
    (tmp_path / "corpus").mkdir()
    table = pa.table({"texts": ["t" * 100]})
    for number in range(2):
        pq.write_table(table, tmp_path / "corpus" / f"part-{number}.parquet")
    text = tmp_path / "corpus.jsonl"
    text.write_bytes(b"\xff")
    assert "line 1 is not UTF-8" in refusal(of_pretraining, text)
    monkeypatch.setattr(preflight, "MAX_DOCUMENT_BYTES", 0)
    of_pretraining(text)
    message = refusal(of_pretraining, tmp_path / "corpus")
    assert message.startswith("documents.text_key='text': no such column in ")
    shutil.rmtree(tmp_path / "corpus")
    assert "a folder, or a file that exists" in refusal(of_pretraining, tmp_path / "corpus")
