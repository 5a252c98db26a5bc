"""The sections of `config` that name the model and the data. Standard library only.

Import them from `config`: it has every section.
"""

import os
import re
from dataclasses import dataclass, field

from megatron_zero.checks import CONFIG_OPTIONS, at_least, divides, fail, one_of

# template -> where the answer of a response to it is looked for
TEMPLATES = {"qwen_math": "boxed", "r1": "answer_tag", "no": "boxed", "arithmetic": "boxed"}
TEMPLATES |= {"open_reasoner_zero": "answer_tag_lenient", "prime_zero": "boxed"}
TEMPLATES |= {"llama_instruct": "boxed", "r1_distill_qwen": "boxed_after_think"}
TEMPLATES |= {"qwen3": "boxed_after_think", "few_shot": "boxed"}

FILE_SUFFIXES = (".parquet", ".jsonl", ".json")  # of data sets that are files
_HUB_ID_WITH_CONFIG = re.compile(r"([\w.-]+)@[\w.-]+/([\w.-]+)")


def dataset_name(dataset: str) -> str:
    """What a data set that is evaluated is called in metrics, files and tables.

    A known name is itself, a path its last part without the suffix, a hub id what follows the
    owner, behind its config if it has one. What cannot stand in a metric's name becomes "_".

    Example:
        dataset_name("/data/eval/aime.parquet") == "aime"
        dataset_name("main@openai/gsm8k") == "main-gsm8k"
    """
    with_config = _HUB_ID_WITH_CONFIG.fullmatch(dataset)
    if with_config:
        name = f"{with_config[1]}-{with_config[2]}"
    else:
        name = os.path.basename(os.path.abspath(dataset))
        for suffix in FILE_SUFFIXES:
            name = name.removesuffix(suffix)
    return re.sub(r"[^\w.-]", "_", name)


def check_dataset_names(path: str, datasets: "list[str]") -> None:
    """Refuse data sets that would be counted twice, or that have one name.

    Args:
        path: of the setting, for the message.

    Raises:
        ValueError: an entry is empty, is there twice, is called as another one, or as the average.
    """
    by_name: dict[str, str] = {}
    for dataset in datasets:
        if not dataset.strip():
            fail(path, datasets, "has an empty name")
        name = dataset_name(dataset)
        if name == "average":
            fail(path, dataset, "results call the mean over data sets so: rename it")
        if name in by_name and by_name[name] == dataset:
            fail(path, datasets, f"{dataset} is there twice: each data set must be there once")
        if name in by_name:
            both = f"{by_name[name]} and {dataset} would both be called {name}"
            fail(path, datasets, f"{both}: leave one out, or rename one")
        by_name[name] = dataset


@dataclass(**CONFIG_OPTIONS)
class ArchitectureConfig:
    """A Qwen2 made from scratch, used only with `model.init="random"`; names as in HF's config."""

    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    vocab_size: int = 0  # 0: the tokenizer's size, rounded up to a multiple of 128
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        here = "model.architecture"
        at_least(self, here, 1, "hidden_size", "intermediate_size", "num_hidden_layers")
        at_least(self, here, 1, "num_attention_heads", "num_key_value_heads")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        divides(f"{here}.num_attention_heads", heads, self.hidden_size, "hidden_size")
        divides(f"{here}.num_key_value_heads", kv_heads, heads, "num_attention_heads")


@dataclass(**CONFIG_OPTIONS)
class ModelConfig:
    """The policy's starting point."""

    path: str = ""  # HF directory or hub id; its config.json alone is read when init="random"
    init: str = "pretrained"  # pretrained: weights of `path`; random: seeded, layout-independent
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    tokenizer: str = ""  # directory, hub id or "characters"; "": the model's
    dtype: str = "bf16"  # bf16 (float32 master weights) or fp32

    def __post_init__(self) -> None:
        one_of(self, "model", "init", ["pretrained", "random"])
        one_of(self, "model", "dtype", ["bf16", "fp32"])
        if not self.path and (self.init == "pretrained" or not self.tokenizer):
            name = "path" if self.init == "pretrained" else "tokenizer"
            fail(f"model.{name}", "", f"needed with model.init={self.init!r} and no model.path")


@dataclass(**CONFIG_OPTIONS)
class ArithmeticConfig:
    """Generated addition problems (`data.arithmetic`): no download, known answers."""

    min_operand: int = 10
    max_operand: int = 99
    wrong_fraction: float = 0.5  # pretraining documents whose final answer is wrong

    def __post_init__(self) -> None:
        at_least(self, "arithmetic", 0, "min_operand")
        if self.max_operand <= self.min_operand:
            fail("arithmetic.max_operand", self.max_operand, f"must be above {self.min_operand}")
        if not 0 <= self.wrong_fraction < 1:
            fail("arithmetic.wrong_fraction", self.wrong_fraction, "must be in [0, 1)")


@dataclass(**CONFIG_OPTIONS)
class DataConfig:
    """Which prompts are trained on."""

    dataset: str = "arithmetic"  # a known name, a file or folder, or a hub id
    data_dir: str = ""  # folder that is looked into before the hub for known names
    split: str = "train"
    prompt_key: str = ""  # "": the known data set's, else "problem"
    answer_key: str = ""  # "": the known data set's, else "answer"
    template: str = "qwen_math"
    few_shot: str = ""  # worked problems of template few_shot, a file; "": the built-in four
    max_prompt_tokens: int = 1024  # longer templated prompts are left out
    max_prompts: int = 0  # use only the first n rows; 0: all
    shuffle: bool = True
    arithmetic: ArithmeticConfig = field(default_factory=ArithmeticConfig)

    def __post_init__(self) -> None:
        one_of(self, "data", "template", TEMPLATES)
        at_least(self, "data", 1, "max_prompt_tokens")
        at_least(self, "data", 0, "max_prompts")


@dataclass(**CONFIG_OPTIONS)
class DocumentsConfig:
    """What `pretrain` reads: packed to `sequence_length` tokens, an EOS after each document."""

    source: str = "arithmetic"  # "arithmetic" (generated solutions), or a text or parquet file
    text_key: str = "text"  # parquet, JSONL: column to read; several joined: "problem+solution"
    sequence_length: int = 1024
    sequences_per_step: int = 32  # all ranks
    arithmetic: ArithmeticConfig = field(default_factory=ArithmeticConfig)

    def __post_init__(self) -> None:
        at_least(self, "documents", 2, "sequence_length")
        at_least(self, "documents", 1, "sequences_per_step")
