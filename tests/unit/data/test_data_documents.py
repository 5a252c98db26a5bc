"""Documents: every token is predicted once an epoch, sequences are full, access is stateless."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zero.config import ArithmeticConfig, DocumentsConfig
from megatron_zero.data import arithmetic
from megatron_zero.data.documents import DocumentStream, cut_into_blocks

EOS = 1


@pytest.fixture(scope="module")
def tokenizer():
    return arithmetic.build_character_tokenizer()


def num_positions(sequence):
    return sum(len(piece) - 1 for piece in sequence)


def make_config(source="arithmetic", **changes):
    return DocumentsConfig(source=str(source), **changes)


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_the_examples_of_the_docstring():
    assert cut_into_blocks([5, 3], 4) == [[(0, 5)], [(5, 8)]]
    assert cut_into_blocks([5, 3], 3) == [[(0, 4)], [(3, 5), (5, 8)]]


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), max_size=40), st.integers(1, 25))
def test_blocks_are_full_and_predict_every_token_once(lengths, sequence_length):
    blocks = cut_into_blocks(lengths, sequence_length)
    sizes = [sum(end - start - 1 for start, end in block) for block in blocks]
    assert all(size == sequence_length for size in sizes[:-1])
    assert all(0 < size <= sequence_length for size in sizes[-1:])
    assert all(end - start >= 2 for block in blocks for start, end in block)
    predicted = [t for block in blocks for start, end in block for t in range(start + 1, end)]
    starts = {sum(lengths[:i]) for i in range(len(lengths))}
    assert predicted == [t for t in range(sum(lengths)) if t not in starts]
    for block in blocks:  # no piece has tokens of two documents
        for start, end in block:
            assert not starts & set(range(start + 1, end))


@pytest.mark.parametrize("sequence_length", [2, 7, 60, 1024])
def test_generated_sequences_are_full_and_made_of_documents(tokenizer, sequence_length):
    config = make_config(sequence_length=sequence_length, sequences_per_step=3)
    stream = DocumentStream(config, tokenizer, seed=5)
    assert stream.sequences_per_epoch == 0
    for step in (0, 1, 1000):
        sequences = stream.sequences(step)
        assert len(sequences) == 3
        for i, sequence in enumerate(sequences):
            assert num_positions(sequence) == sequence_length
            number = (step * 3 + i) * sequence_length
            for j, piece in enumerate(sequence):
                text = arithmetic.document(5, number + j, config.arithmetic)
                tokens = (*tokenizer(text)["input_ids"], EOS)
                assert piece == (tokens if j < len(sequence) - 1 else tokens[: len(piece)])


def test_generated_sequences_are_all_different(tokenizer):
    stream = DocumentStream(make_config(sequence_length=256), tokenizer, seed=0)
    documents = [piece for step in range(4) for seq in stream.sequences(step) for piece in seq[:-1]]
    assert len(set(documents)) > 0.9 * len(documents)  # 8100 pairs: a few come twice


def test_documents_hold_no_held_out_problem(tokenizer):
    config = make_config(sequence_length=1024, arithmetic=ArithmeticConfig(max_operand=40))
    held_out = {question for question, _ in arithmetic.held_out_problems(config.arithmetic)}
    stream = DocumentStream(config, tokenizer, seed=0)
    for step in range(3):
        for piece in (piece for sequence in stream.sequences(step) for piece in sequence):
            assert tokenizer.decode(piece).split("\n")[0] not in held_out


@pytest.mark.parametrize("source", ["arithmetic", "text"])
def test_access_is_stateless(tokenizer, tmp_path, source):
    """Resuming is asking for the next step; a rank may ask for its share only."""
    if source == "text":
        source = tmp_path / "corpus.txt"
        source.write_text("".join(chr(48 + i % 60) for i in range(500)))
    config = make_config(source, sequence_length=16, sequences_per_step=4)
    stream = DocumentStream(config, tokenizer, seed=9)
    steps = [stream.sequences(step) for step in range(20)]
    fresh = DocumentStream(config, tokenizer, seed=9)
    for step in (13, 2, 19, 2):
        assert fresh.sequences(step) == steps[step]
        assert [fresh.sequence(step * 4 + i) for i in range(4)] == steps[step]
    assert DocumentStream(config, tokenizer, seed=10).sequences(0) != steps[0]


def test_an_epoch_of_text_has_every_block_once_in_a_new_order(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", [{"text": chr(48 + i) * (i + 1)} for i in range(40)])
    config = make_config(path, sequence_length=16, sequences_per_step=4)
    stream = DocumentStream(config, tokenizer, seed=0)
    num_blocks = stream.sequences_per_epoch
    assert num_blocks == -(-sum(range(1, 41)) // 16)  # n characters and EOS: n positions
    epochs = [[stream.sequence(e * num_blocks + i) for i in range(num_blocks)] for e in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    sizes = sorted(num_positions(sequence) for sequence in epochs[0])
    assert sizes[1:] == [16] * (num_blocks - 1) and sizes[0] == 820 - 16 * (num_blocks - 1)
    for sequence in epochs[0]:
        for piece in sequence:
            assert EOS not in piece[:-1]
            assert len(set(piece) - {EOS}) == 1  # one document each


def test_a_text_file_is_one_document(tokenizer, tmp_path):
    text = "first\n\nsecond paragraph\n"
    (tmp_path / "book.txt").write_text(text)
    stream = DocumentStream(make_config(tmp_path / "book.txt"), tokenizer, seed=0)
    [[piece]] = [stream.sequence(i) for i in range(stream.sequences_per_epoch)]
    assert tokenizer.decode(piece) == text + "<eos>"


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "folder"])
def test_columns_are_joined_with_a_newline(tokenizer, tmp_path, kind):
    records = [{"problem": "1+1?", "solution": "2"}, {"problem": "2+2?", "solution": "4"}]
    path = tmp_path / ("corpus" if kind == "folder" else f"corpus.{kind}")
    if kind == "jsonl":
        write_jsonl(path, records)
    elif kind == "json":
        path.write_text(json.dumps(records))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.mkdir()
        pq.write_table(pa.Table.from_pylist(records), path / "a.parquet")
    config = make_config(path, text_key="problem+solution")
    stream = DocumentStream(config, tokenizer, seed=0)
    [sequence] = [stream.sequence(0)]
    assert [tokenizer.decode(piece) for piece in sequence] == ["1+1?\n2<eos>", "2+2?\n4<eos>"]


def test_documents_without_text_are_left_out_and_counted(tokenizer, tmp_path, caplog):
    records = [{"a": "x", "b": "y"}, {"a": "x", "b": None}, {"a": " ", "b": "y"}, {"b": "y"}]
    path = write_jsonl(tmp_path / "c.jsonl", records)
    stream = DocumentStream(make_config(path, text_key="a+b"), tokenizer, seed=0)
    assert [tokenizer.decode(piece) for piece in stream.sequence(0)] == ["x\ny<eos>"]
    assert "3 of 4 documents left out, without text in a+b" in caplog.text


def test_bos_is_in_front_of_every_document(tmp_path):
    from tokenizers import processors

    tokenizer = arithmetic.build_character_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    path = write_jsonl(tmp_path / "c.jsonl", [{"text": "ab"}])
    [piece] = DocumentStream(make_config(path), tokenizer, seed=0).sequence(0)
    assert tokenizer.decode(piece) == "<bos>ab<eos>"


@pytest.mark.parametrize(
    "name, content, key, message",
    [
        ("c.txt", "  \n", "text", r"documents.source='.*c.txt': holds no text"),
        ("c.jsonl", '{"text": ""}\n', "text", r"documents.source='.*': holds no text"),
        ("c.jsonl", '{"texts": "a"}\n', "text", r"text_key='text': .* has texts; did you mean"),
        ("c.jsonl", '{"text": 1}\n', "text", r"text_key='text': row 0 \(line 1\) of .*: int, not"),
        ("c.pdf", "a", "text", r"documents.source='.*c.pdf': must be \"arithmetic\", a folder,"),
    ],
)
def test_sources_that_cannot_be_used(tokenizer, tmp_path, name, content, key, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        DocumentStream(make_config(tmp_path / name, text_key=key), tokenizer, seed=0)


def test_a_source_that_is_not_there_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"documents.source='arithmetics': must be \"arithmetic\""):
        DocumentStream(make_config("arithmetics"), tokenizer, seed=0)


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = arithmetic.build_character_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"model.tokenizer=.*must have an EOS token"):
        DocumentStream(make_config(), tokenizer, seed=0)
