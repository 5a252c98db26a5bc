"""Small models and a second, slow account of the Megatron layout, head by head and row by row.

Nothing here calls the code under test: the reference builds each rank's tensors from the HF
tensors with Python loops over single rows.
"""

import torch


def qwen2_config(**changes: object) -> dict[str, object]:
    """config.json of a Qwen2 with 4 heads of 8, 2 key-value heads and an odd vocabulary."""
    config: dict[str, object] = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 24,
        "head_dim": 8,  # 4 heads of 8 are not 24: no size is hidden behind another
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 53,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": 131072,
    }
    return config | changes


def hf_tensors(config: dict, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """An HF state dict in which every element differs from every other one of its tensor."""
    hidden, ffn, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    q_rows = config["num_attention_heads"] * config["head_dim"]
    kv_rows = config["num_key_value_heads"] * config["head_dim"]
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        for x, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
            shapes[f"{at}self_attn.{x}_proj.weight"] = (rows, hidden)
            shapes[f"{at}self_attn.{x}_proj.bias"] = (rows,)
        shapes[at + "self_attn.o_proj.weight"] = (hidden, q_rows)
        shapes[at + "mlp.gate_proj.weight"] = shapes[at + "mlp.up_proj.weight"] = (ffn, hidden)
        shapes[at + "mlp.down_proj.weight"] = (hidden, ffn)
        shapes[at + "input_layernorm.weight"] = (hidden,)
        shapes[at + "post_attention_layernorm.weight"] = (hidden,)
    generator = torch.Generator().manual_seed(7)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}


def reference_shards(
    hf: dict[str, torch.Tensor], config: dict, padded_vocab_size: int, tp_rank: int, tp_size: int
) -> dict[str, torch.Tensor]:
    """What rank `tp_rank` holds, parameter by parameter, output layer included."""

    def part(items: list) -> list:
        count = len(items) // tp_size
        return items[tp_rank * count : (tp_rank + 1) * count]

    def vocab(weight: torch.Tensor) -> torch.Tensor:
        empty = torch.zeros(weight.shape[1], dtype=weight.dtype)
        rows = list(weight) + [empty] * (padded_vocab_size - len(weight))
        return torch.stack(part(rows))

    def columns(weight: torch.Tensor) -> torch.Tensor:
        return torch.stack(part(list(weight.T))).T

    def qkv(at: str, name: str) -> torch.Tensor:
        q, k, v = (hf[f"{at}self_attn.{x}_proj.{name}"] for x in "qkv")
        d, groups = config["head_dim"], config["num_key_value_heads"]
        per_group = config["num_attention_heads"] // groups
        rows = []
        for group in range(groups):
            for head in range(per_group):
                rows += [q[(group * per_group + head) * d + j] for j in range(d)]
            rows += [k[group * d + j] for j in range(d)]
            rows += [v[group * d + j] for j in range(d)]
        return torch.stack(part(rows))

    out = {
        "embedding.word_embeddings.weight": vocab(hf["model.embed_tokens.weight"]),
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
        "output_layer.weight": vocab(hf.get("lm_head.weight", hf["model.embed_tokens.weight"])),
    }
    for i in range(config["num_hidden_layers"]):
        at, to = f"model.layers.{i}.", f"decoder.layers.{i}."
        out[to + "input_layernorm.weight"] = hf[at + "input_layernorm.weight"]
        out[to + "pre_mlp_layernorm.weight"] = hf[at + "post_attention_layernorm.weight"]
        out[to + "self_attention.linear_qkv.weight"] = qkv(at, "weight")
        out[to + "self_attention.linear_qkv.bias"] = qkv(at, "bias")
        out[to + "self_attention.linear_proj.weight"] = columns(hf[at + "self_attn.o_proj.weight"])
        gate, up = (part(list(hf[f"{at}mlp.{x}_proj.weight"])) for x in ("gate", "up"))
        out[to + "mlp.linear_fc1.weight"] = torch.stack(gate + up)
        out[to + "mlp.linear_fc2.weight"] = columns(hf[at + "mlp.down_proj.weight"])
    return out


class DictSource:
    """Tensors in memory."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = dict(tensors)

    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._get(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._get(name).dtype

    def origin(self, name: str) -> str:
        return ""

    def read(self, name: str, *part: slice) -> torch.Tensor:
        return self._get(name)[part]

    def _get(self, name: str) -> torch.Tensor:
        if name not in self.tensors:
            raise ValueError(f"there is no tensor {name!r} among the {len(self.tensors)} given")
        return self.tensors[name]


class CountingSource(DictSource):
    """One that counts the elements handed out, by tensor."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.elements: dict[str, int] = {}

    def read(self, name: str, *part: slice) -> torch.Tensor:
        tensor = super().read(name, *part)
        self.elements[name] = self.elements.get(name, 0) + tensor.numel()
        return tensor
