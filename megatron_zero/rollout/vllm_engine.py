"""vLLM in the training process: this module and `upstream` alone import it.

Every rank of the torchrun job creates its `LLM` with the `external_launcher` executor, so the
engine uses the job's own process group and takes weights as tensors, without files or copies
between processes. The same mode runs on GPUs and on CPUs.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

import torch

from megatron_zero.checks import UserError
from megatron_zero.config import RolloutConfig
from megatron_zero.convert.finite import check_finite
from megatron_zero.convert.safetensors_io import file_of
from megatron_zero.rollout import upstream
from megatron_zero.rollout.engine import Request, SamplingSettings
from megatron_zero.types import Response

GIB = 1024**3
CHECKED_FORMAT = "checked"  # how weights are loaded from a disk
# vLLM reads its settings when it is imported.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engine in this process: weights are handed over
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else every rank binds to the same cores
    "VLLM_LOGGING_LEVEL": "WARNING",  # but for what `quiet` lists
    "VLLM_NO_USAGE_STATS": "1",
}
_ALWAYS: dict[str, Any] = {
    "distributed_executor_backend": "external_launcher",
    # The logprob of what was drawn from: after temperature, as the policy computes it.
    "logprobs_mode": "processed_logprobs",
    "disable_log_stats": True,
    "use_tqdm_on_load": False,  # a bar of files, in the middle of our lines
}


class VllmEngine:
    """This rank's part of a vLLM engine; see `engine.RolloutEngine`."""

    def __init__(
        self,
        model_dir: str,
        config: RolloutConfig,
        *,
        tokenizer: str,
        stop_token_ids: Sequence[int],
        dtype: str,
        max_model_len: int,
        rank: int,
        world_size: int,
        from_disk: bool = False,
    ) -> None:
        """Start the engine with empty weights: nothing can be generated before `load_weights`.

        Args:
            model_dir: HF directory; its config is read, its weights only with `from_disk`.
            config: engine size, memory and caching.
            tokenizer: directory or hub id.
            stop_token_ids: what alone ends a response, from `data.stop_tokens`.
            dtype: "bf16" or "fp32", the policy's.
            max_model_len: longest prompt plus longest response, in tokens.
            rank, world_size: of the torchrun job.
            from_disk: start with the directory's weights, as version 0: to evaluate them.

        Raises:
            UserError: with `from_disk`, a tensor holds what is no number; names it and its file.
        """
        tp_size = config.tensor_model_parallel_size
        self.engine_index, self.num_engines = rank // tp_size, world_size // tp_size
        self.is_engine_leader = rank % tp_size == 0
        self._stop_ids = list(stop_token_ids)
        self.weights_version: Optional[int] = 0 if from_disk else None
        self._on_gpu = torch.cuda.is_available()
        self._sleeps = config.sleep and self._on_gpu
        num_threads = torch.get_num_threads()
        os.environ.update(_ENVIRONMENT)
        hf_config = json.loads((Path(model_dir) / "config.json").read_text())
        from vllm import LLM

        if not self._on_gpu:
            upstream.prepare_cpu_engine(tp_size)
        self._unties = not from_disk and not self._on_gpu and hf_config["tie_word_embeddings"]
        self._llm = LLM(
            model_dir,
            tokenizer=tokenizer,
            dtype={"bf16": "bfloat16", "fp32": "float32"}[dtype],
            load_format=_checked_load_format() if from_disk else "dummy",
            tensor_parallel_size=tp_size,
            seed=self.engine_index,  # alike within an engine; requests bring their own seeds
            max_model_len=max_model_len,
            max_num_seqs=config.max_num_sequences,
            enable_prefix_caching=config.enable_prefix_caching,
            enforce_eager=config.enforce_eager or not self._on_gpu,
            **_ALWAYS,
            hf_overrides=_overrides(hf_config, unties=self._unties),
            **_placement(config, hf_config, on_gpu=self._on_gpu),
        )
        torch.set_num_threads(num_threads)  # vLLM's CPU worker sets its own

    def generate(self, requests: Sequence[Request], settings: SamplingSettings) -> list[Response]:
        """One response per request, in order.

        Raises:
            RuntimeError: before the first `load_weights`.
        """
        if self.weights_version is None:
            raise RuntimeError("the rollout engine has no weights yet")
        from vllm import SamplingParams

        params = [
            SamplingParams(
                n=1,
                seed=request.seed,
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k,
                max_tokens=settings.max_tokens,
                stop=list(settings.stop) or None,
                stop_token_ids=self._stop_ids,
                ignore_eos=True,  # what vLLM itself would take from the model's files
                include_stop_str_in_output=True,
                logprobs=0,  # of the drawn token only
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": list(request.prompt_token_ids)} for request in requests]
        self._llm.reset_prefix_cache()  # nothing depends on earlier calls, or on older weights
        outputs = self._llm.generate(prompts, params, use_tqdm=False) if prompts else []
        return [self._response(output.outputs[0]) for output in outputs]

    def _response(self, output: Any) -> Response:
        token_ids = tuple(output.token_ids)
        drawn = zip(output.logprobs, token_ids, strict=True)
        assert self.weights_version is not None
        return Response(
            token_ids=token_ids,
            rollout_logprobs=tuple(row[token].logprob for row, token in drawn),
            text=output.text,
            truncated=output.finish_reason == "length",
            policy_version=self.weights_version,
            engine_index=self.engine_index,
        )

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace all weights through vLLM's own reload, in place.

        The engine has no version while this runs: if it fails, nothing more is generated.
        """
        self.weights_version = None
        if self._sleeps and self._llm.llm_engine.is_sleeping():
            self._llm.wake_up(tags=["weights"])
        tensors = _with_output_layer(named_tensors) if self._unties else iter(named_tensors)
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
        for name, _ in tensors:  # also runs the source's own check at its end
            raise RuntimeError(f"weight sync: the engine took no {name}")
        if self._sleeps and self._llm.llm_engine.is_sleeping():
            self._llm.wake_up(tags=["kv_cache"])
        self.weights_version = version

    def sleep(self) -> None:
        """GPU: drop weights and cache (level 2); the next sync brings new ones. CPU: nothing."""
        if self._sleeps:
            self.weights_version = None
            self._llm.sleep(level=2)


def _overrides(hf_config: dict[str, Any], *, unties: bool) -> dict[str, Any]:
    """Fields of the model's config for vLLM.

    On a CPU vLLM repacks the output layer when it is loaded. A tied one is not loaded, so after a
    sync it would go on with the embedding it was packed from: `unties` gives it its own.
    """
    overrides = upstream.config_overrides(hf_config)
    if unties:
        overrides["tie_word_embeddings"] = False
    return overrides


def _placement(config: RolloutConfig, hf_config: dict[str, Any], *, on_gpu: bool) -> dict[str, Any]:
    """Where the engine's memory is, and what goes with it."""
    if on_gpu:
        return {
            "gpu_memory_utilization": config.gpu_memory_utilization,
            "enable_sleep_mode": config.sleep,
        }
    # Prompts are read whole: after a part of one vLLM rewinds the request's generator, which
    # torch's CPU generator cannot do.
    kv_cache_bytes = int(config.kv_cache_gib * GIB)
    options = {"kv_cache_memory_bytes": kv_cache_bytes, "enable_chunked_prefill": False}
    if upstream.is_latent(hf_config):
        # The same kernels on every CPU: those for AMX have no float32.
        options["attention_backend"] = "CPU_MLA"
    return options


def _checked_load_format() -> str:
    """vLLM's own loading from a disk, which refuses what is no number, by tensor and file."""
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    class CheckedLoader(DefaultModelLoader):
        def __init__(self, load_config: LoadConfig) -> None:
            super().__init__(dataclasses.replace(load_config, load_format="auto"))

        def get_all_weights(
            self, model_config: Any, model: torch.nn.Module
        ) -> Iterator[tuple[str, torch.Tensor]]:
            folder = Path(model_config.model)
            for name, tensor in super().get_all_weights(model_config, model):
                try:
                    check_finite(tensor, f"HF tensor {name}")
                except UserError as error:
                    raise UserError(f"{file_of(folder, name)}: {error}") from error
                yield name, tensor

    register_model_loader(CHECKED_FORMAT)(CheckedLoader)
    return CHECKED_FORMAT


def _with_output_layer(
    named_tensors: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors, and the embedding once more under the output layer's name."""
    for name, tensor in named_tensors:
        yield name, tensor
        if name == "model.embed_tokens.weight":
            yield "lm_head.weight", tensor
