import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_zero.observability import metrics as metrics_module
from megatron_zero.observability.metrics import Metric, MetricAccumulator, reduce_metrics

numbers = st.floats(-1e6, 1e6)
CLOSE = {"rel": 1e-9, "abs": 1e-9}


def plain(parts: list[dict[str, tuple]]) -> dict[str, float]:
    """The same reduction, with Python numbers: name -> (reduction, values...)."""
    grouped: dict[str, list[tuple]] = {}
    for part in parts:
        for name, item in part.items():
            grouped.setdefault(name, []).append(item)
    found = {}
    for name, items in grouped.items():
        values = [item[1] for item in items]
        if items[0][0] == "mean":
            total = math.fsum(item[2] for item in items)
            found[name] = math.fsum(values) / total if total else math.nan
        else:
            found[name] = {"sum": math.fsum, "max": max, "min": min}[items[0][0]](values)
    return found


@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "a/sum": st.tuples(st.just("sum"), numbers),
                "b/mean": st.tuples(st.just("mean"), numbers, st.floats(0.5, 100)),
                "c/max": st.tuples(st.just("max"), numbers),
                "d/min": st.tuples(st.just("min"), numbers),
            }
        ),
        min_size=1,
        max_size=5,
    ),
    st.booleans(),
)
@settings(deadline=None, max_examples=25)
def test_microbatches_merge_as_plain_numbers_do(parts, as_tensors):
    accumulator = MetricAccumulator()
    for i, part in enumerate(parts):
        for name, (reduction, *values) in part.items():
            # tensors and numbers mix
            kept = [torch.tensor(v, dtype=torch.float64) for v in values]
            use = kept if as_tensors or i % 2 else values
            accumulator.add(name, getattr(Metric, reduction)(*use))
    found = accumulator.reduce()
    expected = plain(parts)
    assert list(found) == sorted(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, **CLOSE)
        assert type(found[name]) is float
    assert accumulator.reduce() == {}


def test_a_mean_of_parts_is_not_the_mean_of_their_means():
    accumulator = MetricAccumulator()
    accumulator.add("policy/loss", Metric.mean(torch.tensor(10.0), 1))
    accumulator.add("policy/loss", Metric.mean(torch.tensor(0.0), torch.tensor(99)))
    assert accumulator.reduce() == {"policy/loss": pytest.approx(0.1)}


def test_nothing_counted_is_nan_not_zero():
    assert math.isnan(reduce_metrics({"a/b": Metric.mean(0.0, 0)})["a/b"])
    assert reduce_metrics({}) == {}


def test_gradients_and_shapes_do_not_stay():
    loss = (torch.ones(1, requires_grad=True) * 3).sum(dim=0, keepdim=True)
    metric = Metric.sum(loss)
    assert not metric.value.requires_grad and metric.value.shape == ()
    with pytest.raises(AssertionError):
        Metric.sum(torch.ones(2))


def test_merging_does_not_touch_the_host(monkeypatch):
    def refuse(*_):
        raise AssertionError("transfer to the host")

    accumulator = MetricAccumulator()
    for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    for _ in range(2):
        accumulator.update({"a/b": Metric.mean(torch.tensor(1.0), torch.tensor(2.0))})
        accumulator.update({"a/c": Metric.max(torch.tensor(1.0)), "a/d": Metric.min(2.0)})


def test_one_name_has_one_reduction():
    accumulator = MetricAccumulator()
    accumulator.add("a/b", Metric.sum(1.0))
    with pytest.raises(ValueError, match="metric a/b: reduced by sum and by max"):
        accumulator.add("a/b", Metric.max(1.0))


def test_large_counts_stay_exact_in_float64():
    half = 2**24 + 1  # not a float32
    found = reduce_metrics({"a/b": Metric.max(half)})
    assert found == {"a/b": float(half)}
    accumulator = MetricAccumulator()
    accumulator.add("a/tokens", Metric.sum(torch.tensor(half)))
    accumulator.add("a/tokens", Metric.sum(half))
    assert accumulator.reduce() == {"a/tokens": 2.0 * half}


@pytest.fixture
def group_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_at_most_one_all_reduce_per_kind(group_of_one, monkeypatch):
    sizes = []
    real = dist.all_reduce

    def counted(tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        return real(tensor, *args, **kwargs)

    monkeypatch.setattr(metrics_module.dist, "all_reduce", counted)
    metrics = {f"a/{i}": Metric.mean(float(i), 2.0) for i in range(5)}
    metrics |= {f"b/{i}": Metric.sum(torch.tensor(i)) for i in range(3)}
    metrics |= {"c/max": Metric.max(4.0), "c/min": Metric.min(-4.0)}
    found = reduce_metrics(metrics, group_of_one)
    assert sizes == [2, 13, 2]  # agreement, sums, extremes
    assert found["a/3"] == 1.5 and found["b/2"] == 2.0
    assert found["c/max"] == 4.0 and found["c/min"] == -4.0
    sizes.clear()
    assert reduce_metrics({"a/b": Metric.sum(1.0)}, group_of_one) == {"a/b": 1.0}
    assert sizes == [2, 1]


def _parts(rank: int) -> dict[str, tuple]:
    common = {
        "a/sum": ("sum", 1.5 + rank),
        "b/mean": ("mean", 10.0 * rank, 1.0 + 2 * rank),
        "c/max": ("max", -5.0 + rank),
        "d/min": ("min", 5.0 - rank),
    }
    only = {0: {"e/mean": ("mean", 3.0, 4.0)}, 1: {"f/max": ("max", -7.0), "g/min": ("min", 7.0)}}
    return common | only[rank]


def _worker(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    parts = [_parts(0), _parts(1)]
    for names in (set(parts[0]) & set(parts[1]), set(parts[0]) | set(parts[1])):
        mine = {n: item for n, item in parts[rank].items() if n in names}
        metrics = {n: getattr(Metric, kind)(*values) for n, (kind, *values) in mine.items()}
        found = reduce_metrics(metrics, dist.group.WORLD)
        expected = plain([{n: i for n, i in part.items() if n in names} for part in parts])
        assert found == pytest.approx(expected), (rank, found, expected)
    kind = "sum" if rank else "max"
    with pytest.raises(ValueError, match="metric a/b: one rank reduces by max, another by sum"):
        reduce_metrics({"a/b": Metric(kind, 1.0)}, dist.group.WORLD)
    dist.destroy_process_group()


@pytest.mark.processes
def test_two_ranks_agree_with_plain_numbers(tmp_path):
    torch.multiprocessing.spawn(_worker, (str(tmp_path / "store"),), nprocs=2)
