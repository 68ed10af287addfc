"""A larger model that computes what a smaller checkpoint computes: the start of a short run.

Contract: `grow` fills a model of `new_model` (what writes to the residual stream is zero there) from a folder of the same width, head_dim
and kv heads. Each kv head gets further query heads, the MLP further units, the stack further layers: they add nothing until trained.
"""
from pathlib import Path

import torch
from safetensors.torch import load_file

from model import ModelConfig, Transformer
from weights.names import tensor_slots


@torch.no_grad()
def grow(model: Transformer, directory: Path) -> None:
    """The small checkpoint's weights, in place; its layers stand evenly spread. ValueError where sizes do not allow it."""
    large, small = model.config, ModelConfig.from_checkpoint(directory)
    for field in ("dim", "n_kv_head", "head_dim"):
        if getattr(small, field) != getattr(large, field):
            raise ValueError(f"{directory} has {field} {getattr(small, field)}, this shape {getattr(large, field)}; they must be equal")
    for field in ("n_layer", "n_head", "intermediate_size", "vocab_size"):
        if getattr(small, field) > getattr(large, field):
            raise ValueError(f"{directory} has {field} {getattr(small, field)}, this shape only {getattr(large, field)}")
    tensors, parameters = load_file(directory / "model.safetensors"), dict(model.named_parameters())
    place = {i: i * large.n_layer // small.n_layer for i in range(small.n_layer)}
    slots, G, D, q = tensor_slots(large, ()), large.n_kv_head, large.head_dim, small.n_head // small.n_kv_head
    for name, x in tensors.items():
        parts = name.split(".")
        if name.startswith("model.layers."):
            parts[2] = str(place[int(parts[2])])
        parameter, index = slots[".".join(parts)]
        target = parameters[parameter][index]
        if "q_proj" in name:                                    # the first q query heads of each kv head
            target.view(G, -1, D, large.dim)[:, :q] = x.view(G, q, D, large.dim)
        elif "o_proj" in name:
            target.view(large.dim, G, -1, D)[:, :, :q] = x.view(large.dim, G, q, D)
        else:
            target[tuple(slice(n) for n in x.shape)] = x        # rows of gate and up, columns of down, of the table the first ones
