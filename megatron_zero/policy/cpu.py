"""What differs without CUDA: the host stand-ins that let Megatron-Core run on a CPU.

Megatron-Core names CUDA in a few dozen places (`device="cuda"`, streams, RNG states, type
strings). `install()` gives every `megatron.core` module its own view of the name `torch`, in which
those resolve to the host; the real `torch` stays as it is for everybody else. A
`TorchFunctionMode` would be shorter, but is inactive inside `Tensor.backward()`, so recomputed
layers would ask for CUDA again.

With CUDA, `install()` does nothing. Each patch names the upstream symbol it replaces; checked with
Megatron-Core 0.16.1.
"""

import contextlib
import functools
import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

_HOST = torch.device("cpu")
_FACTORIES = [
    *("tensor", "zeros", "ones", "empty", "full", "arange", "linspace", "rand", "randn", "randint"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
]


class _View(types.ModuleType):
    """A module with some names replaced; every other name is the real module's."""

    def __init__(self, real: types.ModuleType, replaced: dict[str, Any]) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(replaced, _real=real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


class _Event:
    """torch.cuda.Event on the host, where everything has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "_Event") -> float:
        return 0.0


class _Stream:
    """torch.cuda.Stream on the host: one order of execution, nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, *args: Any) -> None: ...
    def wait_event(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, *args: Any) -> _Event:
        return _Event()

    def query(self) -> bool:
        return True

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *exc: object) -> None: ...


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _zero(*args: Any, **kwargs: Any) -> int:
    return 0


def _on_host(factory: Callable[..., Any]) -> Callable[..., Any]:
    """A tensor factory whose CUDA device is the host, without pinning."""

    @functools.wraps(factory)
    def made_on_host(*args: Any, **kwargs: Any) -> Any:
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = _HOST
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return made_on_host


def _autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
    return torch.autocast("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def _rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


def _host_torch() -> _View:
    stream = _Stream()
    nvtx = types.SimpleNamespace(
        range_push=_nothing,
        range_pop=_nothing,
        mark=_nothing,
        range=lambda *args: contextlib.nullcontext(),
    )
    cuda = _View(
        torch.cuda,
        {
            "Event": _Event,
            "Stream": _Stream,
            "nvtx": nvtx,
            "current_device": lambda: _HOST,
            "current_stream": lambda *args: stream,
            "default_stream": lambda *args: stream,
            "stream": lambda *args: contextlib.nullcontext(),
            "synchronize": _nothing,
            "set_device": _nothing,
            "empty_cache": _nothing,
            "device_count": lambda: 1,
            "memory_allocated": _zero,
            "max_memory_allocated": _zero,
            "is_current_stream_capturing": lambda: False,
            "manual_seed": torch.manual_seed,
            "get_rng_state": _rng_state,
            "set_rng_state": _set_rng_state,
        },
    )
    replaced = {name: _on_host(getattr(torch, name)) for name in _FACTORIES}
    return _View(torch, {"cuda": cuda, "autocast": _autocast, **replaced})


class _MegatronFinder(importlib.abc.MetaPathFinder):
    """Gives modules of megatron.core that are imported later the same view of torch."""

    def __init__(self, view: _View) -> None:
        self.view = view

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if not name.startswith("megatron.core"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_replace(module: types.ModuleType) -> None:
            execute(module)
            _use_view(module, self.view)

        spec.loader.exec_module = execute_and_replace  # type: ignore[method-assign]
        return spec


def _use_view(module: types.ModuleType, view: _View) -> None:
    if getattr(module, "torch", None) is torch:
        module.torch = view  # type: ignore[attr-defined]


@contextlib.contextmanager
def _cuda_type_names() -> Iterator[None]:
    """Tensor.type() says 'torch.cuda.FloatTensor': the optimizers compare that string."""
    real = torch.Tensor.type

    def named(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return real(self, dtype, *args, **kwargs)
        return "torch.cuda." + real(self).rsplit(".", 1)[-1]

    torch.Tensor.type = named  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.type = real  # type: ignore[method-assign]


def _with_cuda_type_names(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _cuda_type_names():
            return function(*args, **kwargs)

    return wrapped


def _patch_random() -> None:
    """tensor_parallel.random reads CUDA generators through torch._C."""
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = _rng_state
    random._set_cuda_rng_state = _set_rng_state


def _patch_reduce() -> None:
    """mappings._reduce loses the sum when its input is not contiguous (fixed upstream later)."""
    from megatron.core.tensor_parallel import mappings

    def reduce(input_: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
        if group.size() == 1:
            return input_
        summed = input_.contiguous()
        torch.distributed.all_reduce(summed, group=group)
        return summed

    mappings._reduce = reduce


def _patch_optimizer_types() -> None:
    """Float16Optimizer, DistributedOptimizer and clip_grads accept only torch.cuda tensor types."""
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer

    for cls in (
        optimizer.Float16OptimizerWithFloat16Params,
        distrib_optimizer.DistributedOptimizer,
    ):
        cls.__init__ = _with_cuda_type_names(cls.__init__)
    real = clip_grads.clip_grad_by_total_norm_fp32
    wrapped = _with_cuda_type_names(real)
    for module in list(sys.modules.values()):
        if vars(module).get("clip_grad_by_total_norm_fp32") is real:
            module.clip_grad_by_total_norm_fp32 = wrapped  # type: ignore[attr-defined]


def _patch_uneven_collectives() -> None:
    """Gathers and scatters of unequal parts, between the ranks of one expert: gloo has none."""
    from megatron.core.tensor_parallel import mappings

    gather_even = mappings._gather_along_first_dim
    scatter_even = mappings._reduce_scatter_along_first_dim

    def gather(x: torch.Tensor, group: Any, sizes: Any = None, *rest: Any) -> torch.Tensor:
        if group.size() == 1 or sizes is None:
            return gather_even(x, group, sizes, *rest)
        longest = max(int(size) for size in sizes)
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: len(x)] = x
        whole = gather_even(padded, group)
        parts = zip(whole.split(longest), sizes, strict=True)
        return torch.cat([part[: int(size)] for part, size in parts])

    def scatter(x: torch.Tensor, group: Any, sizes: Any = None, *rest: Any) -> torch.Tensor:
        if group.size() == 1 or sizes is None:
            return scatter_even(x, group, sizes, *rest)
        summed = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(summed, group=group)
        return summed.split([int(size) for size in sizes])[group.rank()].contiguous()

    mappings._gather_along_first_dim = gather
    mappings._reduce_scatter_along_first_dim = scatter


def _patch_missing_te() -> None:
    """Names that modules of experts and latent attention leave undefined, or mocked, without TE."""
    from megatron.core.transformer import multi_latent_attention as latent
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    if not isinstance(latent.TELinear, type):
        latent.HAVE_TE = False  # a mock counts as installed; __init__ asks isinstance of it

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        """Sizes of an all-to-all as a list: upstream converts only what is on a GPU."""
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = to_host


def _patch_distributed_optimizer_state() -> None:
    """DistributedOptimizer expects apex's or TE's Adam, whose `step` lives in the param group.

    torch's AdamW keeps a `step` tensor per parameter: none exists before the first step
    (`state_dict` asserts one), a load would share a single tensor between all parameters (each
    update then counts once per parameter), and `_set_main_param_and_optimizer_states` would look
    for `step` among the sharded tensors.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    state_dict, load_state_dict = (
        DistributedOptimizer.state_dict,
        DistributedOptimizer.load_state_dict,
    )

    def state_dict_with_steps(self: Any) -> Any:
        if self.optimizer is not None:
            for group in self.optimizer.param_groups:
                for param in group["params"]:
                    if not self.optimizer.state[param]:
                        self.optimizer.state[param] = {
                            "step": torch.tensor(0.0),
                            "exp_avg": torch.zeros_like(param.data),
                            "exp_avg_sq": torch.zeros_like(param.data),
                        }
        return state_dict(self)

    def load_with_own_steps(self: Any, state: Any) -> None:
        load_state_dict(self, state)
        for param_state in self.optimizer.state.values():
            param_state["step"] = param_state["step"].clone()

    def set_states(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        group_index, order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group_index]["params"][order]
        targets = {"param": main_param, **self.optimizer.state[main_param]}
        with torch.no_grad():
            for name in tensors.keys() & targets.keys() - {"step"}:
                targets[name].copy_(tensors[name])

    DistributedOptimizer.state_dict = state_dict_with_steps
    DistributedOptimizer.load_state_dict = load_with_own_steps
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states


@functools.cache
def install() -> None:
    """Let Megatron-Core run on the host. Call before importing anything else of it; once is enough.

    Nothing changes where CUDA is available.
    """
    if torch.cuda.is_available():
        return
    # Megatron's jit_fuser is torch.compile: seconds of compilation for nothing on a CPU.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    view = _host_torch()
    sys.meta_path.insert(0, _MegatronFinder(view))
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core"):
            _use_view(module, view)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.record_stream = _nothing  # type: ignore[method-assign]
    _patch_random()
    _patch_reduce()
    _patch_uneven_collectives()
    _patch_missing_te()
    _patch_optimizer_types()
    _patch_distributed_optimizer_state()
