"""HF checkpoints <-> Megatron parameters: tables of data over tested tensor functions.

Reading order: `tensors` (what a packed tensor looks like), `kinds` (the same for shards and
files), `rules` (the vocabulary of a table), `mapping` (a table applied to one model), `families`
(the tables).
Nothing here knows about process groups: ranks and sizes are plain integers.
"""
