"""Whether a run's data can be read, before any process is started.

Every file that a run will read is opened here, in the launcher: columns, questions, answers and
documents are checked by the functions that the ranks read them with, so that a mistake costs a
second and one line. It needs no tokenizer, and neither torch nor transformers is imported.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Optional, Protocol

from megatron_zero.config import DataConfig, DocumentsConfig, PretrainConfig, RunConfig, fail
from megatron_zero.data.datasets import Row, evaluation_data, is_local, read_rows
from megatron_zero.data.documents import check_columns, read_texts
from megatron_zero.data.tables import what_is_at
from megatron_zero.data.templates import check_few_shot

# A larger corpus is read by the ranks alone: here only its columns are checked, if that is quick.
MAX_DOCUMENT_BYTES = 256 * 2**20


class GoldCheck(Protocol):
    """What is to be said about the answers of a data set, by row; raises ValueError to refuse."""

    def __call__(self, golds: Mapping[int, Sequence[str]], *, setting: str, value: str) -> object:
        """`setting` and its `value` decide which answers these are."""


def check_data_files(
    config: RunConfig | PretrainConfig, *, check_golds: Optional[GoldCheck] = None
) -> None:
    """Open everything that a run reads from this machine; nothing is asked over the network.

    Of a data set that would come from the hub, only the name is checked. What is worth a warning
    but no refusal, such as rows without an answer, is left to the ranks to say.

    Args:
        check_golds: is given the answers of every data set that is read.

    Raises:
        ValueError: what is missing or cannot be read: setting, file and row, in one sentence.
    """
    if isinstance(config, PretrainConfig):
        _check_documents(config.documents)
        return
    rows = _check_dataset(config.data, config.seed, "data.dataset")
    if rows and check_golds is not None:
        check_golds(_answers(rows), setting="data.answer_key", value=config.data.answer_key)
    for name in config.evaluation.datasets:
        data = evaluation_data(config.data, name, config.evaluation.max_prompts)
        rows = _check_dataset(data, config.seed, "evaluation.datasets")
        if rows and check_golds is not None:
            check_golds(_answers(rows), setting="evaluation.datasets", value=name)
    if config.data.template == "few_shot":
        check_few_shot(config.data.few_shot)


def _check_dataset(data: DataConfig, seed: int, setting: str) -> list[Row]:
    """Its rows; none where it would come from the hub."""
    if not is_local(data, setting):
        return []
    rows, _ = read_rows(data, seed=seed, setting=setting)
    return rows


def _answers(rows: Sequence[Row]) -> dict[int, tuple[str, ...]]:
    return {row.index: row.answers for row in rows}


def _check_documents(documents: DocumentsConfig) -> None:
    if documents.source == "arithmetic":
        return
    path = Path(documents.source).expanduser()
    kind = what_is_at(path, "documents.source")
    files = [path] if kind == "file" else [*path.glob("*"), *path.glob("*/*")]
    if sum(file.stat().st_size for file in files if file.is_file()) > MAX_DOCUMENT_BYTES:
        check_columns(documents)
        return
    texts, _ = read_texts(documents)
    if not texts:
        fail("documents.source", documents.source, "holds no text")
