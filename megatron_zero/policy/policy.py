"""The policy: one rank's part of the trained model and what the training loop asks of it."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads

from megatron_zero.config import OptimizerConfig, ParallelConfig
from megatron_zero.convert.mapping import Mapping
from megatron_zero.convert.sources import TensorSource
from megatron_zero.policy import converted, forward, hf_weights
from megatron_zero.policy.balance import SequenceBalance
from megatron_zero.policy.model import PolicyModel, build_chunks, layer_implementation
from megatron_zero.policy.model_config import DTYPES, transformer_config
from megatron_zero.policy.optimizer import (
    adam_implementation,
    build_optimizer,
    current_lr,
    wrap_model,
)
from megatron_zero.policy.parallel import Topology
from megatron_zero.types import GlobalBatch, Microbatch, Minibatch, StepMetrics


class Policy:
    """A Megatron model, its optimizer and the passes over packed batches.

    Every method is collective: all ranks call it, in the same order, each with its own share.
    """

    def __init__(
        self,
        mapping: Mapping,
        source: "TensorSource | Path",
        topology: Topology,
        *,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        dtype: str,
        objective: forward.Objective,
        num_optimizer_steps: int,
        temperature: float = 1.0,
        with_ref_policy: bool = False,
        balance_coef: float = 0.0,
    ) -> None:
        """Build this rank's stage and read its shards of the weights.

        Args:
            mapping: of the model, padded for this layout's TP, without multi-token prediction.
            source: the HF weights, or the folder of a converted Megatron checkpoint; only this
                rank's shards are read.
            topology: from `parallel.initialize`.
            dtype: "bf16" or "fp32" ("fp64" in tests).
            objective: what `forward_backward` minimises.
            num_optimizer_steps: of the whole run, for the learning-rate schedule.
            temperature: divides the logits, as when sampling.
            with_ref_policy: keep a frozen copy of the starting weights.
            balance_coef: of the experts' load, see `policy.balance`; 0: no such term.
        """
        self.topology = topology
        self.objective = objective
        self.mapping = mapping
        with_te = layer_implementation() == "transformer_engine"
        config = transformer_config(mapping, parallel, DTYPES[dtype], with_te=with_te)
        self.chunks = build_chunks(config, mapping, topology, temperature=temperature)
        if isinstance(source, Path):
            converted.load(source, self.chunks, topology)
            hf_weights.check_loaded(self.chunks, source, mapping, topology)
        else:
            hf_weights.load(self.chunks, self.mapping, source, topology)
        self.ref_chunks: Optional[list[PolicyModel]] = None
        if with_ref_policy:
            self.ref_chunks = build_chunks(config, mapping, topology, temperature=temperature)
            for ref, chunk in zip(self.ref_chunks, self.chunks, strict=True):
                ref.load_state_dict(chunk.state_dict())
                ref.requires_grad_(False)
        self.balance: Optional[SequenceBalance] = None
        if balance_coef:
            self.balance = SequenceBalance(self.chunks, topology, coef=balance_coef)
        self.ddp_chunks = [wrap_model(config, c, parallel, optimizer) for c in self.chunks]
        self.optimizer, self.scheduler = build_optimizer(
            optimizer,
            parallel,
            self.ddp_chunks,
            dtype=DTYPES[dtype],
            num_optimizer_steps=num_optimizer_steps,
        )
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss

    def kernels(self) -> dict[str, str]:
        """What runs underneath, for the start-up report and `environment.json`."""
        return {
            "layers": layer_implementation(),
            "optimizer": adam_implementation(self.optimizer),
            "backend": dist.get_backend(self.topology.dp_cp_group),
            "device": str(self.topology.device),
        }

    def with_old_logprobs(self, batch: GlobalBatch) -> GlobalBatch:
        """The batch with the present policy's logprobs as `old_logprobs`."""
        return self._with_logprobs(batch, self.ddp_chunks, "old_logprobs")

    def with_ref_logprobs(self, batch: GlobalBatch) -> GlobalBatch:
        """The batch with the reference policy's logprobs."""
        assert self.ref_chunks is not None
        return self._with_logprobs(batch, self.ref_chunks, "ref_logprobs")

    def _with_logprobs(
        self, batch: GlobalBatch, chunks: Sequence[torch.nn.Module], field: str
    ) -> GlobalBatch:
        minibatches = []
        for minibatch in batch.minibatches:
            on_device = self._to_device(minibatch.microbatches)
            logprobs = forward.forward_logprobs(chunks, on_device, self.topology)
            # Stages before the last compute no loss: zeros keep their microbatches alike.
            if not self.topology.is_last_stage:
                logprobs = [torch.zeros_like(m.advantages) for m in minibatch.microbatches]
            microbatches = tuple(
                dataclasses.replace(microbatch, **{field: values})
                for microbatch, values in zip(minibatch.microbatches, logprobs, strict=True)
            )
            minibatches.append(dataclasses.replace(minibatch, microbatches=microbatches))
        return GlobalBatch(minibatches=tuple(minibatches))

    def kl_to_ref(self, batch: GlobalBatch, *, num_samples: int) -> torch.Tensor:
        """[num_samples] sum over each response of old_logprobs - ref_logprobs, on every rank.

        What KL-in-reward subtracts (reference A4); needs both kinds of logprobs in the batch.
        """
        sums = torch.zeros(num_samples, dtype=torch.float64)
        if self.topology.is_last_stage:
            for microbatch in (m for mini in batch.minibatches for m in mini.microbatches):
                assert microbatch.old_logprobs is not None and microbatch.ref_logprobs is not None
                difference = (microbatch.old_logprobs - microbatch.ref_logprobs).double().cpu()
                for i, tokens in microbatch.by_sample(difference):
                    sums[i] = tokens.sum()
        on_device = sums.to(self.topology.device)
        dist.all_reduce(on_device, group=self.topology.dp_cp_group)
        on_device /= self.topology.cp_size  # whose ranks all hold whole responses
        if self.topology.pp_size > 1:
            last = self.topology.pp_size - 1
            dist.broadcast(on_device, group_src=last, group=self.topology.pp_group)
        return on_device.float().cpu()

    def _to_device(self, microbatches: Sequence[Microbatch]) -> list[Microbatch]:
        device = self.topology.device
        return [m.with_tensors(lambda x: x.to(device, non_blocking=True)) for m in microbatches]

    def forward_backward(self, minibatch: Minibatch) -> StepMetrics:
        """Gradients of one optimizer step, left in the buffers; nothing is updated yet.

        Returns:
            `policy/loss`, `policy/entropy` and the objective's own values, the same on all ranks;
            `policy/loss` is without the balance term, which is `policy/balance_loss`.
        """
        for chunk in self.ddp_chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        if self.balance is not None:
            self.balance.num_samples = minibatch.num_samples
        reports = forward.forward_backward(
            self.ddp_chunks,
            self._to_device(minibatch.microbatches),
            self.objective,
            self.topology,
            denominator=minibatch.denominator,
        )
        values = self._reduce(reports)
        if self.balance is not None:
            values["policy/balance_loss"] = self.balance.take()
        return StepMetrics(values=values)

    def _reduce(
        self, reports: list[tuple[torch.Tensor, forward.Sums, forward.Sums]]
    ) -> dict[str, float]:
        """Sums and maxima over microbatches, data-parallel ranks and stages -> named means."""
        box: list[Any] = [None]
        if self.topology.is_last_stage:
            sums = _stacked([{"loss": loss, **sums} for loss, sums, _ in reports]).sum(0)
            dist.all_reduce(sums, group=self.topology.dp_cp_group)
            values = dict(zip(["loss", *reports[0][1]], sums.tolist(), strict=True))
            if reports[0][2]:
                maxima = _stacked([maxima for _, _, maxima in reports]).amax(0)
                dist.all_reduce(maxima, dist.ReduceOp.MAX, group=self.topology.dp_cp_group)
                values |= zip(reports[0][2], maxima.tolist(), strict=True)
            box = [values]
        if self.topology.pp_size > 1:
            last = self.topology.pp_size - 1
            dist.broadcast_object_list(box, group_src=last, group=self.topology.pp_group)
        return _means(box[0])

    def optimizer_step(self) -> StepMetrics:
        """Clip, update the weights, advance the schedule.

        Raises:
            FloatingPointError: the gradient is not finite; nothing was updated.
        """
        lr = current_lr(self.optimizer)
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"gradient norm is {norm}: the weights were not updated; look at mismatch/kl and "
                f"policy/loss of the last steps, and at the rollouts of this one"
            )
        self.optimizer.step()
        self.scheduler.step(increment=1)
        return StepMetrics(values={"policy/grad_norm": norm, "policy/lr": lr})

    def offload(self) -> None:
        """Move the optimizer's state to the host and give up the gradients; weights stay."""
        on_gpu = self.topology.device.type == "cuda"
        if on_gpu:
            self.optimizer.offload_to_cpu()
        for chunk in self.ddp_chunks:
            chunk.offload_grad_buffers(synchronize=on_gpu, empty_cache=on_gpu)

    def onload(self) -> None:
        """Undo `offload`; gradients are zero. Nothing changes where nothing was offloaded."""
        on_gpu = self.topology.device.type == "cuda"
        for chunk in self.ddp_chunks:
            chunk.restore_grad_buffers(synchronize=on_gpu)
        if on_gpu:
            self.optimizer.restore_from_cpu()

    def hf_weights(self, *, bucket_bytes: int) -> Iterator[tuple[str, torch.Tensor]]:
        """All weights by HF name, whole, on every rank; a bounded bucket at a time."""
        return hf_weights.export(
            self.chunks, self.mapping, self.topology, bucket_bytes=bucket_bytes
        )


_METRIC_NAMES = {
    "entropy": "policy/entropy",
    "clipped": "policy/clip_frac",
    "kl_ref": "policy/kl_ref",
    "mismatch_kl": "mismatch/kl",
    "mismatch_abs": "mismatch/mean_abs",
    "masked": "mismatch/masked_frac",
}


def _stacked(rows: list[forward.Sums]) -> torch.Tensor:
    """[microbatches, values] float64; all have the same values, in the same order."""
    return torch.stack([torch.stack([v.double() for v in row.values()]) for row in rows])


def _means(values: dict[str, float]) -> dict[str, float]:
    """Summed values -> metrics: means are over the tokens that the loss saw."""
    tokens = values["tokens"]
    metrics = {"policy/loss": values["loss"], "policy/tokens": tokens}
    for name, metric in _METRIC_NAMES.items():
        if name in values:
            metrics[metric] = values[name] / max(tokens, 1.0)
    if "mismatch_max" in values:
        metrics["mismatch/max_abs"] = values["mismatch_max"]
    return metrics
