"""Metrics: values that know how they are reduced, and stay on their device until they are logged.

A mean of means is not a mean when ranks or microbatches hold different numbers of tokens, so a
mean is carried as numerator and denominator to the very end. Microbatches merge into one metric
per name without a transfer to the host; `reduce_metrics` makes one packed transfer per step, after
at most one all-reduce of the sums (means are two sums) and one of the maxima (minima are negated).

    metrics = MetricAccumulator()
    metrics.add("policy/loss", Metric.mean(loss.sum(), num_tokens))       # every microbatch
    values = metrics.reduce(group)                                        # {"policy/loss": 0.31}
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

Scalar = torch.Tensor | float

_REDUCTIONS = ("sum", "mean", "max", "min")


@dataclass(frozen=True, slots=True)
class Metric:
    """One value on its way to the log. Tensors are scalars on any device, kept as float64."""

    reduction: str
    value: Scalar  # numerator of a mean
    denominator: Scalar = 1.0  # of a mean; unused otherwise

    def __post_init__(self) -> None:
        assert self.reduction in _REDUCTIONS, self.reduction
        for name in ("value", "denominator"):
            number = getattr(self, name)
            if isinstance(number, torch.Tensor):
                assert number.numel() == 1, f"{name} of shape {tuple(number.shape)}"
                object.__setattr__(self, name, number.detach().reshape(()).double())

    @classmethod
    def sum(cls, value: Scalar) -> "Metric":
        return cls("sum", value)

    @classmethod
    def mean(cls, numerator: Scalar, denominator: Scalar) -> "Metric":
        """Sum of numerators over sum of denominators; nan where nothing was counted."""
        return cls("mean", numerator, denominator)

    @classmethod
    def max(cls, value: Scalar) -> "Metric":
        return cls("max", value)

    @classmethod
    def min(cls, value: Scalar) -> "Metric":
        return cls("min", value)

    def merge(self, other: "Metric") -> "Metric":
        """Both values as one metric; still no transfer to the host."""
        if self.reduction != other.reduction:
            raise ValueError(f"reduced by {self.reduction} and by {other.reduction}")
        if self.reduction == "sum":
            return Metric.sum(self.value + other.value)
        if self.reduction == "mean":
            return Metric.mean(self.value + other.value, self.denominator + other.denominator)
        pick = torch.maximum if self.reduction == "max" else torch.minimum
        device = next((v.device for v in (self.value, other.value) if _is_tensor(v)), None)
        a, b = (
            torch.as_tensor(v, dtype=torch.float64, device=device)
            for v in (self.value, other.value)
        )
        return Metric(self.reduction, pick(a, b))


class MetricAccumulator:
    """Collects metrics of one step; the same name merges."""

    def __init__(self) -> None:
        self._metrics: dict[str, Metric] = {}

    def add(self, name: str, metric: Metric) -> None:
        """Add one value of `name`, which is `group/metric`.

        Raises:
            ValueError: `name` was added before with another reduction.
        """
        if name not in self._metrics:
            self._metrics[name] = metric
            return
        try:
            self._metrics[name] = self._metrics[name].merge(metric)
        except ValueError as error:
            raise ValueError(f"metric {name}: {error}") from None

    def update(self, metrics: Mapping[str, Metric]) -> None:
        for name, metric in metrics.items():
            self.add(name, metric)

    def reduce(
        self, group: "dist.ProcessGroup | None" = None, device: torch.device | None = None
    ) -> dict[str, float]:
        """`reduce_metrics` of what was collected; empties the accumulator."""
        metrics, self._metrics = self._metrics, {}
        return reduce_metrics(metrics, group, device)


def reduce_metrics(
    metrics: Mapping[str, Metric],
    group: "dist.ProcessGroup | None" = None,
    device: torch.device | None = None,
) -> dict[str, float]:
    """Reduce over a process group and bring everything to the host in one transfer.

    A collective: every rank of `group` calls it and gets the same values. Ranks may hold different
    names (a rank without a sample of some kind): a small fixed-size all-reduce compares them
    first, and only where they differ are the names exchanged.

    Args:
        metrics: name -> metric of this rank.
        group: None: no reduction over ranks, only the transfer.
        device: where the packed values are reduced; None: the current CUDA device for an NCCL
            group, else where the first tensor is.

    Returns:
        name -> value, sorted by name. A mean over nothing is nan.

    Raises:
        ValueError: ranks reduce one name differently (on every rank).
    """
    device = device or _reduction_device(metrics, group)
    schema = {name: metrics[name].reduction for name in sorted(metrics)}
    if group is not None:
        schema = _agreed_schema(schema, group, device)
    complete = {name: metrics.get(name) for name in schema}
    sums, maxima = _pack(complete, schema, device)
    if group is not None:
        if sums.numel():
            dist.all_reduce(sums, dist.ReduceOp.SUM, group=group)
        if maxima.numel():
            dist.all_reduce(maxima, dist.ReduceOp.MAX, group=group)
    numbers = torch.cat([sums, maxima]).tolist()
    return _unpack(schema, numbers[: sums.numel()], numbers[sums.numel() :])


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _reduction_device(
    metrics: Mapping[str, Metric], group: "dist.ProcessGroup | None"
) -> torch.device:
    if group is not None and "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    tensors = (v for m in metrics.values() for v in (m.value, m.denominator) if _is_tensor(v))
    first = next(tensors, None)
    return torch.device("cpu") if first is None or group is not None else first.device


def _agreed_schema(
    schema: dict[str, str], group: dist.ProcessGroup, device: torch.device
) -> dict[str, str]:
    """Name -> reduction over all ranks of the group; the same on each."""
    digest = hashlib.sha256(repr(list(schema.items())).encode()).digest()
    number = int.from_bytes(digest[:6], "big")  # 48 bits: exact in float64
    extremes = torch.tensor([number, -number], dtype=torch.float64, device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
    highest, minus_lowest = extremes.tolist()
    if highest == -minus_lowest:
        return schema
    schemas: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(schemas, schema, group=group)
    union: dict[str, str] = {}
    for other in schemas:
        for name, reduction in other.items():
            if union.setdefault(name, reduction) != reduction:
                raise ValueError(
                    f"metric {name}: one rank reduces by {union[name]}, another by {reduction}"
                )
    return dict(sorted(union.items()))


def _pack(
    metrics: Mapping[str, "Metric | None"], schema: Mapping[str, str], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """([sums, numerators and denominators], [maxima and negated minima]), float64.

    A name this rank does not have is packed as what changes nothing: 0, or minus infinity.
    """
    sums: list[Scalar] = []
    maxima: list[Scalar] = []
    for name, reduction in schema.items():
        metric = metrics[name]
        if reduction in ("sum", "mean"):
            sums.append(0.0 if metric is None else metric.value)
            if reduction == "mean":
                sums.append(0.0 if metric is None else metric.denominator)
        elif metric is None:
            maxima.append(-torch.inf)
        else:
            maxima.append(metric.value if reduction == "max" else -metric.value)
    return _stack(sums, device), _stack(maxima, device)


def _stack(values: list[Scalar], device: torch.device) -> torch.Tensor:
    if not values:
        return torch.empty(0, dtype=torch.float64, device=device)
    floats = [0.0 if _is_tensor(v) else float(v) for v in values]
    packed = torch.tensor(floats, dtype=torch.float64, device=device)
    places = [i for i, v in enumerate(values) if _is_tensor(v)]
    if places:
        tensors = [values[i].to(device) for i in places]
        packed[torch.tensor(places, device=device)] = torch.stack(tensors)
    return packed


def _unpack(schema: Mapping[str, str], sums: list[float], maxima: list[float]) -> dict[str, float]:
    next_sum, next_maximum = iter(sums), iter(maxima)
    values = {}
    for name, reduction in schema.items():
        if reduction == "sum":
            values[name] = next(next_sum)
        elif reduction == "mean":
            numerator, denominator = next(next_sum), next(next_sum)
            values[name] = numerator / denominator if denominator else float("nan")
        else:
            extreme = next(next_maximum)
            values[name] = extreme if reduction == "max" else -extreme
    return values
