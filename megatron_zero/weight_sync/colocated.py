"""Weight sync inside one process: the policy's tensors are handed to the engine beside it."""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist

from megatron_zero.rollout.engine import RolloutEngine


class ColocatedWeightSync:
    """See `base.WeightSync`."""

    def __init__(
        self, engine: RolloutEngine, expected_names: Iterable[str], host_group: dist.ProcessGroup
    ) -> None:
        """
        Args:
            engine: this rank's part.
            expected_names: every HF tensor of the model; a push must bring exactly these.
            host_group: all ranks of the job.
        """
        self.engine = engine
        self.expected_names = frozenset(expected_names)
        self.host_group = host_group

    def push(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Load all weights into every engine of the job and check that all are on `version`."""
        self.engine.load_weights(self._complete(named_tensors), version)
        versions: list[object] = [self.engine.weights_version]
        if self.host_group.size() > 1:
            versions = [None] * self.host_group.size()
            dist.all_gather_object(versions, self.engine.weights_version, group=self.host_group)
        if any(v != version for v in versions):
            raise RuntimeError(f"after a sync to version {version} the engines are on {versions}")

    def _complete(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors as they come; fails at the end if any was missing, unknown or repeated."""
        seen: set[str] = set()
        for name, tensor in named_tensors:
            if name in seen or name not in self.expected_names:
                raise RuntimeError(f"weight sync: {name} came twice or belongs to no layer")
            seen.add(name)
            yield name, tensor
        missing = sorted(self.expected_names - seen)
        if missing:
            raise RuntimeError(f"weight sync: {len(missing)} tensors missing, first {missing[0]}")
