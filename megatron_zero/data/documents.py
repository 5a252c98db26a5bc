"""Documents for next-token training: which tokens each step reads.

A sequence is a list of pieces of documents. Attention must not cross from one piece to the next,
so they are given apart. A piece of n tokens has n - 1 positions (each predicts the next token); the
pieces of a sequence have `sequence_length` positions together. Every document ends in EOS.

Two sources, one access, `DocumentStream.sequences(step)`, a pure function: resuming is calling it
with the next step, and every rank may compute its own share.

* Text (a file, JSONL, parquet, a folder): all documents in a row, cut every `sequence_length`
  positions. A cut repeats one token (the last label of one piece is the first input of the next),
  so in an epoch every token but the first of each document is predicted exactly once. The blocks
  are dealt out in a new order every epoch. Only the last block of the data may be shorter.
* Generated arithmetic: endless. Each sequence is filled with documents of its own; the last one is
  cut, not dropped: leaving out what does not fit would make long solutions rarer than short ones.

Example (sequence_length 4; documents abcd$ and ef$; $ is EOS):
    blocks [[abcd$]] and [[ef$]]: 4 and 2 positions
Example (sequence_length 3):
    blocks [[abcd]] and [[d$], [ef$]]: 3 and 1 + 2 positions
"""

import itertools
import logging
import re
from array import array
from pathlib import Path
from typing import Any

from megatron_zero.config import DocumentsConfig, fail
from megatron_zero.data import arithmetic
from megatron_zero.data.encoding import encode
from megatron_zero.data.seeding import epoch_order
from megatron_zero.data.tables import FILE_SUFFIXES, Table, open_table, what_is_at
from megatron_zero.data.text_files import read_text

logger = logging.getLogger(__name__)

TokenSequence = list[tuple[int, ...]]  # pieces of documents, each of at least 2 tokens

TEXT_SUFFIXES = (".txt", ".md")
_ENCODED_AT_ONCE = 1024  # documents
_GENERATED_AT_ONCE = 16
_SURROGATE = re.compile("[\ud800-\udfff]")


class DocumentStream:
    """The token sequences of a pretraining run, by step.

    Example:
        stream = DocumentStream(config.documents, tokenizer, config.seed)
        for sequence in stream.sequences(step):       # sequences_per_step of them
            for tokens in sequence: ...               # attention stays within `tokens`
    """

    def __init__(self, config: DocumentsConfig, tokenizer: Any, seed: int) -> None:
        """Read and tokenise the source; arithmetic is generated when asked.

        Raises:
            ValueError: the tokenizer has no EOS, or the source cannot be read, lacks the columns
                of `text_key`, or holds no text.
        """
        if tokenizer.eos_token_id is None:
            fail("model.tokenizer", tokenizer.name_or_path, "must have an EOS token")
        self._config, self._tokenizer, self._seed = config, tokenizer, seed
        self._blocks: list[list[tuple[int, int]]] = []  # pieces: [start, end) in _tokens
        self._tokens = array("i")
        if config.source != "arithmetic":
            texts, num_documents = read_texts(config)
            if len(texts) < num_documents:
                left_out = f"{num_documents - len(texts)} of {num_documents} documents left out"
                where = config.text_key
                logger.warning("%s: %s, without text in %s", config.source, left_out, where)
            self._tokens, lengths = _tokenise(texts, tokenizer)
            self._blocks = cut_into_blocks(lengths, config.sequence_length)
            if not self._blocks:
                fail("documents.source", config.source, "holds no text")
            sizes = f"{len(lengths)} documents, {len(self._tokens)} tokens"
            logger.info("%s: %s, %d sequences per epoch", config.source, sizes, len(self._blocks))

    @property
    def sequences_per_epoch(self) -> int:
        """0: endless."""
        return len(self._blocks)

    def sequences(self, step: int) -> list[TokenSequence]:
        """The `sequences_per_step` sequences of one step; all ranks together."""
        first = step * self._config.sequences_per_step
        return [self.sequence(first + i) for i in range(self._config.sequences_per_step)]

    def sequence(self, index: int) -> TokenSequence:
        """Sequence number `index` of the run: what a rank that reads only its share asks for."""
        if not self._blocks:
            return self._generated_sequence(index)
        epoch, offset = divmod(index, len(self._blocks))
        block = self._blocks[epoch_order(self._seed, epoch, len(self._blocks))[offset]]
        return [tuple(self._tokens[start:end]) for start, end in block]

    def _generated_sequence(self, index: int) -> TokenSequence:
        room = self._config.sequence_length
        pieces: TokenSequence = []
        # a document has at least one position: no number is used twice
        for number in itertools.count(index * room, _GENERATED_AT_ONCE):
            numbers = range(number, number + _GENERATED_AT_ONCE)
            made = (arithmetic.document(self._seed, n, self._config.arithmetic) for n in numbers)
            for tokens in _encode_documents(list(made), self._tokenizer):
                pieces.append(tuple(tokens[: room + 1]))
                room -= len(pieces[-1]) - 1
                if not room:
                    return pieces
        raise AssertionError("the numbers are endless")


def cut_into_blocks(lengths: list[int], sequence_length: int) -> list[list[tuple[int, int]]]:
    """Where to cut documents of `lengths` tokens that lie one after the other.

    Returns:
        Blocks of pieces, each piece a range [start, end) of at least 2 tokens; the positions
        (end - start - 1) of a block's pieces sum to `sequence_length`, in the last block to less
        or as much.

    Example:
        cut_into_blocks([5, 3], 3) == [[(0, 4)], [(3, 5), (5, 8)]]
    """
    blocks: list[list[tuple[int, int]]] = []
    room = 0
    document_start = 0
    for length in lengths:
        start, last = document_start, document_start + length - 1
        while start < last:  # positions start .. last - 1 are left
            if not room:
                blocks.append([])
                room = sequence_length
            num_positions = min(room, last - start)
            blocks[-1].append((start, start + num_positions + 1))
            start += num_positions
            room -= num_positions
        document_start += length
    return blocks


def _encode_documents(texts: list[str], tokenizer: Any) -> list[list[int]]:
    return [[*ids, tokenizer.eos_token_id] for ids in encode(texts, tokenizer)]


def _tokenise(texts: list[str], tokenizer: Any) -> tuple[array, list[int]]:
    """All documents' tokens in a row (4 bytes each), and the length of each."""
    tokens, lengths = array("i"), []
    for start in range(0, len(texts), _ENCODED_AT_ONCE):
        for ids in _encode_documents(texts[start : start + _ENCODED_AT_ONCE], tokenizer):
            tokens.extend(ids)
            lengths.append(len(ids))
    return tokens, lengths


def read_texts(config: DocumentsConfig) -> tuple[list[str], int]:
    """Non-empty documents, and how many there were with the empty ones; not for "arithmetic".

    A text file is one document; columns are joined with a newline.

    Raises:
        ValueError: the source cannot be read, or lacks the columns of `text_key`, or they hold
            something else than text.
    """
    path = Path(config.source).expanduser()
    kind = what_is_at(path, "documents.source")
    if path.suffix in TEXT_SUFFIXES and kind == "file":
        return _text_file(path)
    table = _open_source(config)
    columns = [table.values(key, "documents.text_key") for key in config.text_key.split("+")]
    texts = []
    for row, parts in enumerate(zip(*columns, strict=True)):
        for part in parts:
            problem = _why_no_text(part)
            if problem:
                fail("documents.text_key", config.text_key, f"{table.place(row)}: {problem}")
        if all(part and part.strip() for part in parts):
            texts.append("\n".join(parts))
    return texts, len(columns[0])


def check_columns(config: DocumentsConfig) -> None:
    """Of a source too large to read twice, check what costs nothing: a parquet file's columns.

    Raises:
        ValueError: no such source, or no such columns.
    """
    path = Path(config.source).expanduser()
    if path.suffix in (*TEXT_SUFFIXES, ".jsonl", ".json") and path.is_file():
        return
    table = _open_source(config)
    for key in config.text_key.split("+"):
        table.check_column(key, "documents.text_key")


def _text_file(path: Path) -> tuple[list[str], int]:
    text = read_text(path, "documents.source")
    if "\0" in text:
        line = 1 + text.count("\n", 0, text.index("\0"))
        valid = f"line {line} holds a NUL character: it is binary, UTF-16 or damaged"
        fail("documents.source", str(path), valid)
    return ([text] if text.strip() else []), 1


def _open_source(config: DocumentsConfig) -> Table:
    path = Path(config.source).expanduser()
    kind = what_is_at(path, "documents.source")
    if not kind or (kind == "file" and path.suffix not in FILE_SUFFIXES):
        suffixes = ", ".join((*TEXT_SUFFIXES, *FILE_SUFFIXES))
        valid = f"a folder, or a file that exists and ends in one of {suffixes}"
        fail("documents.source", config.source, f'must be "arithmetic", {valid}')
    return open_table(path, "train", "documents.source")


def _why_no_text(part: Any) -> str:
    """What is wrong with a value of a column, or "".

    None is left out later. A NUL is kept: pages of the web and programs have some.
    """
    if part is None:
        return ""
    if not isinstance(part, str):
        return f"{type(part).__name__}, not text"
    surrogate = None if part.isascii() else _SURROGATE.search(part)
    if surrogate is None:
        return ""
    where = f"{surrogate.group()!r} at character {surrogate.start() + 1}"
    return f"a lone surrogate {where}, which is not text"
