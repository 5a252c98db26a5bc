"""What other packages say at every start and does not hold here: the list, and why of each.

A message is dropped only where its source and its words are in these tables; whatever else a
package says, passes. Standard library only; the packages need not be imported yet.
"""

import functools
import json
import logging
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Known:
    """One message: who says it, how it begins (a regular expression), why it is dropped."""

    source: str  # a logger; of warnings, the module that warns (a regular expression)
    begins: str
    why: str


_NO_KERNELS = "there is no GPU: the report at start says `layers local` and the optimizer's class"
_NO_TRITON = "Triton is for GPUs, and there is none"
_CHOSEN = "we choose that, see rollout.vllm_engine"
_THEIRS = "a call within the package, by its old name"
_SPEED = "about an optional library; nothing is wrong"

# Python warnings, by the module that warns.
WARNINGS_WITHOUT_GPU = (
    Known(r"megatron\.core\.", "Transformer Engine and Apex are not installed", _NO_KERNELS),
    Known(r"megatron\.core\.", "Apex is not installed", _NO_KERNELS),
    Known(
        r"megatron\.core\.tensor_parallel\.layers",
        "When using async grad allreduce it is recommended to set the environment",
        "the variable is CUDA's",
    ),
)
WARNINGS = (
    # torch renames functions that Megatron and vLLM call: theirs to follow
    Known(r"(megatron\.core|torch\.distributed|vllm)\.", r"`[\w.]+` is deprecated", _THEIRS),
    Known(r"megatron\.core\.transformer\.transformer_config", "full scope is deprecated", _THEIRS),
    Known(
        r"megatron\.core\.optimizer\.optimizer",
        r"The \.grad attribute of a Tensor that is not a leaf",
        "Megatron asks each shard of a parameter for its gradient; those that have one are found",
    ),
)

# Messages of loggers.
LOGGED_WITHOUT_GPU = (
    Known("torch._library.triton", "Triton not available", _NO_TRITON),
    Known("vllm.platforms.cpu", "Triton is not installed", _NO_TRITON),
    Known("vllm.config.vllm", "Model Runner V2 requires Triton", _NO_TRITON),
    Known("vllm.platforms.cpu", "Reset SSM cache type to float32", "of models with Mamba layers"),
    Known("vllm.engine.arg_utils", "This model does not officially support disabling", _CHOSEN),
    Known("vllm.config.vllm", "Enforce eager set, disabling torch.compile", _CHOSEN),
    Known("vllm.config.vllm", "Inductor compilation was disabled by user", _CHOSEN),
    Known("vllm.v1.worker.cpu_worker", r"lib\w+ is not found in LD_PRELOAD", _SPEED),
    Known(
        "vllm.v1.worker.cpu_worker",
        "CPU backend doesn't allow to use `torch.set_num_threads`",
        "the engine puts training's number of threads back itself",
    ),
)
LOGGED = (
    Known(
        "vllm.engine.arg_utils",
        "The global random seed is set to",
        "ours is set after it, and every response brings its own seed",
    ),
    Known(
        "vllm.model_executor.model_loader.reload.layerwise",
        "RotaryEmbedding: Failed to load weights",
        "it has none, only a table that is computed; the sync checks that nothing else is missing",
    ),
    Known(
        "vllm.model_executor.model_loader.weight_tying",
        "The config for .* says the word embeddings are tied",
        "`eval` says the same, and what follows from it: convert.stored",
    ),
    Known(
        "vllm.triton_utils.dispatcher",
        r"Kernel [\w.]+ is already registered",
        "the second engine of a process registers what the first one did",
    ),
    Known(
        "vllm.platforms.interface",
        "Unknown vLLM environment variable detected: VLLM_DIST_IDENT",
        "vLLM has set it itself, for the first engine of the process",
    ),
)
# torchrun's own report, where `torchrun` of ours makes one.
AGENT = (
    Known("torch.distributed.elastic.multiprocessing.api", "failed \\(exitcode", "told at the end"),
    Known("torch.distributed.elastic.multiprocessing.api", "Sending process", "a consequence"),
    Known("torch.distributed.elastic.agent.server.api", "Received .* death signal", "told as well"),
)

TOKENIZERS = "transformers.tokenization_utils_tokenizers"
_REGEX_ALARM = re.compile(r"The tokenizer you are loading from '(.*)' with an incorrect regex")


@functools.cache
def hush(*, on_gpu: bool) -> None:
    """Drop what the tables list, from now on; before the packages are imported."""
    for known in WARNINGS if on_gpu else (*WARNINGS, *WARNINGS_WITHOUT_GPU):
        warnings.filterwarnings("ignore", known.begins, module=known.source)
    for known in LOGGED if on_gpu else (*LOGGED, *LOGGED_WITHOUT_GPU):
        logging.getLogger(known.source).addFilter(_passes_unless(known))
    logging.getLogger(TOKENIZERS).addFilter(is_no_false_regex_alarm)


def silence_agent() -> None:
    """Drop torchrun's own words about ranks that failed: our report replaces them."""
    for known in AGENT:
        logging.getLogger(known.source).addFilter(_passes_unless(known))


def _passes_unless(known: Known) -> Callable[[logging.LogRecord], bool]:
    begins = re.compile(known.begins)

    def passes(record: logging.LogRecord) -> bool:
        return begins.match(record.getMessage()) is None

    return passes


def is_no_false_regex_alarm(record: logging.LogRecord) -> bool:
    """Whether a message passes: the alarm about Mistral's pattern, for another family's model, not.

    transformers takes every local model for a Mistral one whose config.json does not name the
    version of transformers that wrote it, and warns that its tokenizer splits words wrongly.
    """
    alarm = _REGEX_ALARM.match(record.getMessage())
    if alarm is None:
        return True
    try:
        text = Path(alarm.group(1), "config.json").read_text(encoding="utf-8")
        model_type = str(json.loads(text)["model_type"])
    except (OSError, ValueError, KeyError):
        return True  # unknown: let it pass
    return "tral" in model_type  # mistral, ministral, mixtral, pixtral, voxtral
