"""The name table: which slice of which parameter each stored tensor fills.

Contract: the slices of one table tile every parameter of the Transformer exactly, so a checkpoint that holds each name
once fills each slice once. Families differ only here: projections separate or fused, experts one by one or stacked.
Trap: w13 is gate rows, then up rows; Mixtral's files call gate w1, down w2 and up w3.
"""
from collections.abc import Collection

from model.config import ModelConfig

Slot = tuple[str, tuple[int | slice, ...]]      # parameter name, index into it; () is all of it


def tensor_slots(config: ModelConfig, stored: Collection[str]) -> dict[str, Slot]:
    """Stored tensor name -> Slot. `stored` decides between Mixtral's two layouts, and a tied table's name."""
    q, k, gate = config.n_head * config.head_dim, config.n_kv_head * config.head_dim, config.intermediate_size
    layer: dict[str, Slot] = {
        "input_layernorm.weight": ("attention_norm.weight", ()),
        "post_attention_layernorm.weight": ("mlp_norm.weight", ()),
        "self_attn.o_proj.weight": ("attention.wo.weight", ()),
    }
    if config.family == "phi3":
        layer["self_attn.qkv_proj.weight"] = ("attention.wqkv.weight", ())
    else:
        rows = {"q": slice(0, q), "k": slice(q, q + k), "v": slice(q + k, q + 2 * k)}
        layer |= {f"self_attn.{x}_proj.weight": ("attention.wqkv.weight", (rows[x],)) for x in rows}

    if config.family == "mixtral" and any(".mlp.experts." in name for name in stored):      # stacked by transformers 5
        layer |= {"mlp.gate.weight": ("mlp.router.weight", ()),
                  "mlp.experts.gate_up_proj": ("mlp.w13", ()), "mlp.experts.down_proj": ("mlp.w2", ())}
    elif config.family == "mixtral":
        layer["block_sparse_moe.gate.weight"] = ("mlp.router.weight", ())
        for e in range(config.n_expert):
            expert = f"block_sparse_moe.experts.{e}"
            layer |= {f"{expert}.w1.weight": ("mlp.w13", (e, slice(0, gate))),
                      f"{expert}.w3.weight": ("mlp.w13", (e, slice(gate, 2 * gate))),
                      f"{expert}.w2.weight": ("mlp.w2", (e,))}
    else:
        layer["mlp.down_proj.weight"] = ("mlp.w2.weight", ())
        if config.family == "phi3":
            layer["mlp.gate_up_proj.weight"] = ("mlp.w13.weight", ())
        else:
            layer |= {"mlp.gate_proj.weight": ("mlp.w13.weight", (slice(0, gate),)),
                      "mlp.up_proj.weight": ("mlp.w13.weight", (slice(gate, 2 * gate),))}

    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    slots: dict[str, Slot] = {"model.norm.weight": ("norm.weight", ())}
    if not config.tie_word_embeddings:
        slots |= {embed: ("embed.weight", ()), head: ("head.weight", ())}
    else:
        slots[head if head in stored and embed not in stored else embed] = ("embed.weight", ())
    for i in range(config.n_layer):
        slots |= {f"model.layers.{i}.{name}": (f"layers.{i}.{to}", index) for name, (to, index) in layer.items()}
    return slots
