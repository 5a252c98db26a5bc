"""What a training rank imports, in the program's order; imported once, by the tests' fork server.

Imports only: a thread or a process group that was started here would not survive the fork.
"""

import gc
import os
from importlib import import_module

from megatron_zero.policy import cpu
from megatron_zero.rollout import vllm_engine

cpu.install()
os.environ.update(vllm_engine._ENVIRONMENT)
for name in (
    "megatron_zero.session",
    "vllm.entrypoints.llm",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.models.qwen2",
    "transformers.models.qwen2.modeling_qwen2",
):
    import_module(name)
gc.freeze()  # vLLM collects garbage often: not among what is the same in every rank
assert len(os.listdir("/proc/self/task")) == 1
