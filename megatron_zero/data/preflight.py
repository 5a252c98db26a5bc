"""Whether a run's data can be read, before any process is started.

Every file that a run will read is opened here, in the launcher: columns, questions, answers and
documents are checked by the functions that the ranks read them with, so that a mistake costs a
second and one line. It needs no tokenizer, and neither torch nor transformers is imported.
"""

from megatron_zero.config import DataConfig, PretrainConfig, RunConfig, fail
from megatron_zero.data.datasets import evaluation_data, is_local, load_rows
from megatron_zero.data.documents import read_texts
from megatron_zero.data.templates import check_few_shot


def check_data_files(config: RunConfig | PretrainConfig) -> None:
    """Open everything that a run reads from this machine; nothing is asked over the network.

    Of a data set that would come from the hub, only the name is checked.

    Raises:
        ValueError: what is missing or cannot be read: setting, file and row, in one sentence.
    """
    if isinstance(config, PretrainConfig):
        if config.documents.source != "arithmetic" and not read_texts(config.documents):
            fail("documents.source", config.documents.source, "holds no text")
        return
    _check_dataset(config.data, config.seed, "data.dataset")
    for name in config.evaluation.datasets:
        data = evaluation_data(config.data, name, config.evaluation.max_prompts)
        _check_dataset(data, config.seed, "evaluation.datasets")
    if config.data.template == "few_shot":
        check_few_shot(config.data.few_shot)


def _check_dataset(data: DataConfig, seed: int, setting: str) -> None:
    if is_local(data, setting):
        load_rows(data, seed=seed, setting=setting)
