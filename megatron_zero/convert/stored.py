"""What a checkpoint holds where its `config.json` says something else: one rule for every program.

transformers and vLLM look at the tensors: an output layer that is stored, and is not the embedding,
is used, although the config says that the two are tied; a prediction layer that is not stored is
not there. Training, conversion in both directions and their verification ask here, so that they all
have that same model, and what they write has a config that says so.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_zero.checks import UserError
from megatron_zero.convert.dist_checkpoint import METADATA_NAME, CheckpointReader
from megatron_zero.convert.families import FAMILIES, family_for
from megatron_zero.convert.families.blocks import EMBEDDING, LM_HEAD
from megatron_zero.convert.hf_config import HfConfig, size_of
from megatron_zero.convert.hf_dir import open_source
from megatron_zero.convert.mapping import Mapping
from megatron_zero.convert.safetensors_io import INDEX_NAME, SINGLE_NAME
from megatron_zero.convert.sources import TensorSource

TIED, NUM_MTP = "tie_word_embeddings", "num_nextn_predict_layers"
OUTPUT_LAYER, MTP_KEYS = "output_layer.weight", "mtp."  # in Megatron's checkpoints
_BLOCK_ELEMENTS = 16 * 2**20


@dataclass(kw_only=True, slots=True)
class Corrections:
    """The config fields of a model that its tensors contradict, and a sentence about each.

    Example: Corrections(fields={"tie_word_embeddings": False}, notes=["hf: lm_head.weight ..."])
    """

    fields: dict[str, object] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def untie(self, where: Path, tensor: str) -> None:
        self.fields[TIED] = False
        what = f"{tensor} is stored and is not the embedding, although {TIED} is true"
        self.notes.append(f"{where}: {what}: it is kept, the model is untied")

    def drop_mtp(self, where: Path, count: object) -> None:
        self.fields[NUM_MTP] = 0
        what = f"no multi-token-prediction layer is stored, although {NUM_MTP}={count}"
        self.notes.append(f"{where}: {what}: the model has none")


def hf_corrections(hf_config: HfConfig, source: TensorSource, where: Path) -> Corrections:
    """What the tensors of an HF checkpoint say against its config.

    Reads the embedding and the output layer where both are stored of a tied model, else names only.

    Args:
        hf_config: the `config.json`.
        source: its tensors.
        where: the folder, for the sentences.

    Raises:
        ValueError: the model's family is unknown, or a file is damaged.
    """
    corrections, names = Corrections(), set(source.names())
    both = {EMBEDDING, LM_HEAD} <= names
    if both and _is_tied(hf_config) and not same_values(source, EMBEDDING, LM_HEAD):
        corrections.untie(where, LM_HEAD)
    count = _num_mtp(hf_config)
    if count:
        first = size_of(hf_config, "num_hidden_layers")
        places = tuple(f"model.layers.{first + i}." for i in range(count))
        if not any(name.startswith(places) for name in names):
            corrections.drop_mtp(where, count)
    return corrections


def megatron_corrections(hf_config: HfConfig, keys: Collection[str], where: Path) -> Corrections:
    """The same of a Megatron checkpoint, by its keys: a tied model has no output layer there."""
    corrections = Corrections()
    if _is_tied(hf_config) and OUTPUT_LAYER in keys:
        corrections.untie(where, OUTPUT_LAYER)
    count = _num_mtp(hf_config)
    if count and not any(key.startswith(MTP_KEYS) for key in keys):
        corrections.drop_mtp(where, count)
    return corrections


def folder_corrections(hf_config: HfConfig, directory: Path) -> Corrections:
    """The same of a folder in either format; none for a family that has no table.

    And none where there are no such files, which whoever needs them will say; vLLM reads others.

    Raises:
        ValueError: the files are damaged.
    """
    if hf_config.get("model_type") not in FAMILIES:
        return Corrections()
    if (directory / METADATA_NAME).is_file():
        return megatron_corrections(hf_config, CheckpointReader(directory).keys, directory)
    if not any((directory / name).is_file() for name in (SINGLE_NAME, INDEX_NAME)):
        return Corrections()
    return hf_corrections(hf_config, open_source(directory, dict(hf_config), "keep"), directory)


def check_copies(mapping: Mapping, source: TensorSource) -> None:
    """Refuse copies of a tensor that are none: Megatron has the original in their place.

    Raises:
        ValueError: naming the first that differs from its original.
    """
    for copy, original in mapping.copies().items():
        if not same_values(source, copy, original):
            shared = f"is not {original}, which Megatron's prediction layers share"
            raise UserError(f"HF tensor {copy} {shared}: --drop-mtp leaves these layers out")


def same_values(source: TensorSource, name: str, other: str) -> bool:
    """Whether two tensors have the same numbers, whatever their types; reads a block at a time."""
    shape = source.shape(name)
    if source.shape(other) != shape:
        return False
    wide = torch.promote_types(source.dtype(name), source.dtype(other))
    rows = max(_BLOCK_ELEMENTS // max(torch.Size(shape[1:]).numel(), 1), 1)
    for start in range(0, shape[0], rows):
        part = slice(start, start + rows)
        if not torch.equal(source.read(name, part).to(wide), source.read(other, part).to(wide)):
            return False
    return True


def _is_tied(hf_config: HfConfig) -> bool:
    family = family_for(hf_config)
    return bool({**family.defaults, **hf_config}[TIED])


def _num_mtp(hf_config: HfConfig) -> int:
    """Prediction layers that the config counts; 0 for a family without any."""
    if "mtp" not in family_for(hf_config).counts:
        return 0
    count = hf_config.get(NUM_MTP)
    return count if isinstance(count, int) else 0  # what is no number, the table refuses
