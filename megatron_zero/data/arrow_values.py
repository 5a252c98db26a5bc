"""Columns of Arrow tables to Python values that mean what the file says.

Arrow widens a float32 to Python's float64 and so shows digits that nobody wrote:
0.10000000149011612 for the float32 nearest to 0.1. Here it becomes 0.1, the shortest decimal that
is this float32 and no other. A map becomes a dictionary, so that paths lead into it. A class label
of the package `datasets`, which is stored as a number, becomes the label that it stands for.
"""

import json
from typing import Any

import numpy as np
import pyarrow as pa


class UndecodableError(ValueError):
    """A text of a column is not UTF-8. `row` counts from 0."""

    def __init__(self, row: int, error: UnicodeDecodeError) -> None:
        super().__init__(f"not UTF-8: byte 0x{error.object[error.start]:02x}")
        self.row = row


def column_values(table: pa.Table, name: str) -> list[Any]:
    """One value per row of a column.

    Raises:
        UndecodableError: a text that is not UTF-8.
    """
    values = python_values(table[name])
    labels = _class_labels(table.schema, name)
    if not labels:
        return values
    return [labels[value] if value in range(len(labels)) else None for value in values]


def _class_labels(schema: pa.Schema, name: str) -> list[str]:
    """The labels of a column, as `datasets` writes them beside its tables; [] of any other."""
    written = (schema.metadata or {}).get(b"huggingface")
    if written is None:
        return []
    try:
        feature = json.loads(written)["info"]["features"][name]
        return feature["names"] if feature["_type"] == "ClassLabel" else []
    except (ValueError, KeyError, TypeError):  # lists of features have no type; others' writing
        return []


def python_values(column: pa.ChunkedArray) -> list[Any]:
    """One value per row; a class label stays a number.

    Raises:
        UndecodableError: a text that is not UTF-8.
    """
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        values = []
        for row, scalar in enumerate(column):
            try:
                values.append(scalar.as_py())
            except UnicodeDecodeError as error:
                raise UndecodableError(row, error) from None
    if not _is_changed(column.type):
        return values
    return [_plain(value, column.type) for value in values]


def _is_changed(kind: pa.DataType) -> bool:
    """Whether `_plain` would change values of this type."""
    if pa.types.is_float16(kind) or pa.types.is_float32(kind) or pa.types.is_map(kind):
        return True
    if pa.types.is_dictionary(kind):
        return _is_changed(kind.value_type)
    return any(_is_changed(kind.field(i).type) for i in range(kind.num_fields))


def _plain(value: Any, kind: pa.DataType) -> Any:
    if value is None or not _is_changed(kind):
        return value
    if pa.types.is_float16(kind):
        return float(str(np.float16(value)))
    if pa.types.is_float32(kind):
        return float(str(np.float32(value)))
    if pa.types.is_dictionary(kind):
        return _plain(value, kind.value_type)
    if pa.types.is_map(kind):
        return {_plain(k, kind.key_type): _plain(v, kind.item_type) for k, v in value}
    if pa.types.is_struct(kind):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        return {field.name: _plain(value[field.name], field.type) for field in fields}
    return [_plain(item, kind.value_type) for item in value]  # all that is left are lists
