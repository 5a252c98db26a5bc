"""What is dropped of other packages' words, and that everything else passes."""

import logging
import warnings

import pytest

from megatron_zero import quiet

MEGATRON = "megatron.core.models.backends"
APEX = "Apex is not installed. Falling back to Torch Norm"
RENAMED = "`torch.distributed.reduce_op` is deprecated, please use `torch.distributed.ReduceOp`"
VLLM = "vllm.engine.arg_utils"
SEED = "The global random seed is set to 0. Since VLLM_ENABLE_V1_MULTIPROCESSING is set to False"


def warned(*given: tuple[str, type[Warning], str], on_gpu: bool = False) -> list[str]:
    """Which of (module, category, message) are shown."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.resetwarnings()
        quiet.hush.__wrapped__(on_gpu=on_gpu)
        for module, category, message in given:
            warnings.warn_explicit(message, category, "file.py", 1, module=module)
    return [str(warning.message) for warning in shown]


def passes(logger: str, message: str, *args: object) -> bool:
    quiet.hush(on_gpu=False)
    record = logging.LogRecord(logger, logging.WARNING, "file.py", 1, message, args, None)
    return bool(logging.getLogger(logger).filter(record))


def test_only_the_listed_words_of_the_listed_module_are_dropped():
    assert warned((MEGATRON, UserWarning, APEX), ("vllm.x", FutureWarning, RENAMED)) == []
    other = [
        (MEGATRON, UserWarning, "the loss is NaN"),
        ("mine", UserWarning, APEX),
        ("mine", FutureWarning, RENAMED),
        (MEGATRON, UserWarning, f"look: {APEX}"),
    ]
    assert warned(*other) == [message for _, _, message in other]


def test_missing_kernels_are_said_where_there_is_a_gpu():
    assert warned((MEGATRON, UserWarning, APEX), on_gpu=True) == [APEX]


def test_messages_of_loggers():
    assert not passes(VLLM, SEED)
    assert not passes("vllm.v1.worker.cpu_worker", "%s is not found in LD_PRELOAD. For", "libiomp")
    assert passes("vllm.v1.worker.cpu_worker", "Node %s is not in available memory nodes", 1)
    assert passes(VLLM, "max_model_len is larger than the model has positions")
    assert passes("vllm.engine.other", SEED)
    layerwise = "vllm.model_executor.model_loader.reload.layerwise"
    assert not passes(layerwise, "%s: Failed to load weights", "RotaryEmbedding")
    assert passes(layerwise, "%s: Failed to load weights", "FusedMoE")
    tying = "vllm.model_executor.model_loader.weight_tying"
    assert not passes(tying, "The config for %s says the word embeddings are tied, but", "model")
    assert passes(tying, "Re-tying %s", "lm_head")


@pytest.mark.parametrize(
    ("config", "shown"),
    [
        ('{"model_type": "qwen2"}', False),
        ('{"model_type": "mistral"}', True),
        ('{"model_type": "mixtral"}', True),
        ("{}", True),
        ("broken", True),
        (None, True),
    ],
)
def test_the_alarm_about_mistrals_pattern_passes_for_mistral(config, shown, tmp_path):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    message = f"The tokenizer you are loading from '{tmp_path}' with an incorrect regex pattern: x"
    assert passes(quiet.TOKENIZERS, message) == shown
    assert passes(quiet.TOKENIZERS, "another warning")


def test_torchruns_words_about_failed_ranks_are_dropped():
    quiet.silence_agent()
    name = "torch.distributed.elastic.multiprocessing.api"
    assert not passes(name, "Sending process %s closing signal %s", 1, "SIGTERM")
    assert not passes(name, "failed (exitcode: %s) local_rank: %s", 1, 0)
    assert passes(name, "Unable to shutdown process %s via %s", 1, "SIGTERM")
