"""ModelConfig: the numbers that define a model, read from the checkpoint's own config.json.

Contract: `from_dict` accepts both generations of Hugging Face keys (`rope_theta` + `rope_scaling` or `rope_parameters`;
`torch_dtype` or `dtype`) and either returns a config that the Transformer computes exactly, or raises a one-line
ValueError naming the key, the value and what is supported. The file is untrusted: every value is checked before use.
Trap: absent keys take the family's published default (no `sliding_window` in a Mistral config means 4096, null none).
"""
import json
import math
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM",
                 "phi3": "Phi3ForCausalLM"}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ROPE_KINDS = {"default": "default", "linear": "linear", "llama3": "llama3", "longrope": "longrope", "su": "longrope"}
# Ceilings far above any published model: they keep products of sizes within 64 bits and a hostile file from hanging us.
SIZE_LIMITS = {"vocab_size": 2**24, "hidden_size": 2**20, "num_hidden_layers": 2**10, "num_attention_heads": 2**10,
               "num_key_value_heads": 2**10, "head_dim": 2**12, "intermediate_size": 2**22, "num_local_experts": 2**10,
               "num_experts_per_tok": 2**10, "max_position_embeddings": 2**30, "sliding_window": 2**30,
               "original_max_position_embeddings": 2**30}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions: `theta` and the numbers of one kind.

    linear uses factor; llama3 factor, the two frequency factors and the original length; longrope the two lists of D/2
    factors, the original length and attention_scaling.
    """
    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    attention_scaling: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """One model's architecture. `dtype` is what the checkpoint was saved in (bfloat16 where it does not say)."""
    family: str
    vocab_size: int                         # V
    dim: int                                # C
    n_layer: int                            # L
    n_head: int                             # H
    n_kv_head: int                          # G
    head_dim: int                           # D
    intermediate_size: int
    max_position_embeddings: int
    norm_eps: float = 1e-5
    rope: RopeConfig = RopeConfig()
    sliding_window: int | None = None       # a query sees this many newest tokens, itself included
    tie_word_embeddings: bool = False
    n_expert: int = 0                       # E, 0: a plain MLP
    n_expert_per_token: int = 0
    dtype: torch.dtype = torch.bfloat16

    @classmethod
    def from_checkpoint(cls, checkpoint_dir: str | Path) -> "ModelConfig":
        """Read checkpoint_dir/config.json. FileNotFoundError if absent, ValueError if wrong or not supported."""
        path = Path(checkpoint_dir) / "config.json"
        if not path.parent.is_dir():
            raise FileNotFoundError(f"checkpoint {path.parent} is no directory: pass a folder with config.json in it")
        if not path.is_file():
            raise FileNotFoundError(f"{path.parent} holds no config.json: pass a checkpoint in the Hugging Face layout")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError, OSError) as error:
            raise ValueError(f"{path} is not readable as JSON ({type(error).__name__}): download it again") from None
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ModelConfig":
        """The content of a config.json -> ModelConfig. ValueError names the first key that is not supported."""
        if not isinstance(data, dict):
            raise ValueError(f"config.json holds a {type(data).__name__} where an object is needed: download it again")
        family = data.get("model_type")
        if family not in tuple(ARCHITECTURES):
            raise _refusal("model_type", family, ", ".join(ARCHITECTURES))
        _refuse_unsupported(data, ARCHITECTURES[family])

        dim, n_head = _size(data, "hidden_size"), _size(data, "num_attention_heads")
        n_kv_head, head_dim = _size(data, "num_key_value_heads", n_head), _size(data, "head_dim", 0)
        if n_head % n_kv_head:
            raise _refusal("num_key_value_heads", n_kv_head, f"divisors of num_attention_heads = {n_head}")
        if not head_dim and dim % n_head:
            raise _refusal("hidden_size", dim, f"multiples of num_attention_heads = {n_head} where head_dim is missing")
        head_dim = head_dim or dim // n_head
        if head_dim % 2 or head_dim > SIZE_LIMITS["head_dim"]:
            raise _refusal("head_dim", head_dim, f"even numbers up to {SIZE_LIMITS['head_dim']}")
        max_position_embeddings, vocab_size = _size(data, "max_position_embeddings"), _size(data, "vocab_size")
        experts = _size(data, "num_local_experts") if family == "mixtral" else 0
        experts_per_token = _size(data, "num_experts_per_tok") if family == "mixtral" else 0
        if experts_per_token > experts:
            raise _refusal("num_experts_per_tok", experts_per_token, f"1 to num_local_experts = {experts}")
        # Llama has no window even where the key stands; a Mistral config without the key means its class default.
        window = None if family == "llama" else data.get("sliding_window", 4096 if family == "mistral" else None)
        dtype = data.get("dtype") or data.get("torch_dtype") or "bfloat16"
        if dtype not in tuple(DTYPES):
            raise _refusal("torch_dtype", dtype, ", ".join(DTYPES))
        tied = data.get("tie_word_embeddings") or False
        if not isinstance(tied, bool):
            raise _refusal("tie_word_embeddings", tied, "true, false")
        return cls(
            family=family, vocab_size=vocab_size, dim=dim, n_layer=_size(data, "num_hidden_layers"), n_head=n_head,
            n_kv_head=n_kv_head, head_dim=head_dim, intermediate_size=_size(data, "intermediate_size"),
            max_position_embeddings=max_position_embeddings, norm_eps=_number(data, "rms_norm_eps", high=1.0),
            rope=_rope(data, head_dim, max_position_embeddings, 1e6 if family == "mixtral" else 1e4),
            sliding_window=None if window is None else _size({"sliding_window": window}, "sliding_window"),
            tie_word_embeddings=tied, n_expert=experts, n_expert_per_token=experts_per_token, dtype=DTYPES[dtype])


def named_config(name: str) -> ModelConfig:
    """A published architecture by name, for measurements with random weights. ValueError lists the names."""
    if name not in NAMED_CONFIGS:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(NAMED_CONFIGS)}")
    return NAMED_CONFIGS[name]


# family, V, C, L, H, G, D, MLP width, positions; phi-3-mini is the 4k one, mistral-7b is v0.3
NAMED_CONFIGS = {
    "llama-2-7b": ModelConfig("llama", 32000, 4096, 32, 32, 32, 128, 11008, 4096),
    "llama-3-8b": ModelConfig("llama", 128256, 4096, 32, 32, 8, 128, 14336, 8192, rope=RopeConfig(theta=5e5)),
    "phi-3-mini": ModelConfig("phi3", 32064, 3072, 32, 32, 32, 96, 8192, 4096, sliding_window=2047),
    "mistral-7b": ModelConfig("mistral", 32768, 4096, 32, 32, 8, 128, 14336, 32768, rope=RopeConfig(theta=1e6)),
    "mixtral-8x7b": ModelConfig("mixtral", 32000, 4096, 32, 32, 8, 128, 14336, 32768, rope=RopeConfig(theta=1e6),
        n_expert=8, n_expert_per_token=2),
}


def _refusal(key: str, value: Any, supported: str) -> ValueError:
    short = reprlib.Repr()      # bounded in depth, too: repr of a deeply nested list would overflow the stack
    short.maxstring = 60
    text = "missing" if value is None else short.repr(value)
    if len(text) > 120:
        text = text[:120] + "..."
    return ValueError(f"config.json: {key} is {text}; supported: {supported}")


def _refuse_unsupported(data: dict[str, Any], architecture: str) -> None:
    """Everything that would change the computation and that this Transformer does not have."""
    architectures = data.get("architectures")
    if architectures is not None and (not isinstance(architectures, list) or architecture not in architectures):
        raise _refusal("architectures", architectures, architecture)
    if data.get("quantization_config") is not None:
        raise _refusal("quantization_config", data["quantization_config"], "unquantised weights")
    if data.get("hidden_act", "silu") != "silu":
        raise _refusal("hidden_act", data["hidden_act"], "silu")
    for key in ("attention_bias", "mlp_bias"):
        if data.get(key):
            raise _refusal(key, data[key], "false")
    layer_types = data.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != layer_types[0] for kind in layer_types):
        raise _refusal("layer_types", layer_types, "one kind of attention for all layers")


def _size(data: dict[str, Any], key: str, default: int | None = None) -> int:
    value = data.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= SIZE_LIMITS[key]:
        raise _refusal(key, value, f"integers from 1 to {SIZE_LIMITS[key]}")
    return value


def _number(data: dict[str, Any], key: str, default: float | None = None, *, high: float = 1e12) -> float:
    value = default if data.get(key) is None else data[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not 1e-12 <= value <= high:
        raise _refusal(key, value, f"numbers from 1e-12 to {high:g}")
    return float(value)


def _rope(data: dict[str, Any], head_dim: int, max_position_embeddings: int, default_theta: float) -> RopeConfig:
    """Both generations: `rope_scaling` beside `rope_theta`, or one `rope_parameters` that holds all."""
    rope = data.get("rope_scaling") or data.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise _refusal("rope_parameters", rope, "one flat object for all layers")
    rope = {"rope_theta": data.get("rope_theta"), **rope}
    for key in ("original_max_position_embeddings", "partial_rotary_factor"):
        if data.get(key) is not None:       # Phi-3 keeps these beside the object, and there they win
            rope[key] = data[key]
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise _refusal("partial_rotary_factor", rope["partial_rotary_factor"], "1 (all of a head is rotated)")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in tuple(ROPE_KINDS):
        raise _refusal("rope_type", kind, "default, linear, llama3, longrope")
    kind, theta = ROPE_KINDS[kind], _number(rope, "rope_theta", default_theta)
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(kind, theta, _number(rope, "factor"))
    original = _size(rope, "original_max_position_embeddings")
    if kind == "llama3":
        low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
        if low >= high:
            raise _refusal("low_freq_factor", low, f"numbers below high_freq_factor = {high:g}")
        return RopeConfig(kind, theta, _number(rope, "factor"), low, high, original)
    factor = _number(rope, "factor", max_position_embeddings / original)
    # LongRoPE's rule, overridden by a saved attention_factor. An original length of 1 has no logarithm to divide by.
    scaling = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    return RopeConfig(
        kind, theta, original_max_position_embeddings=original, short_factor=_factors(rope, "short_factor", head_dim),
        long_factor=_factors(rope, "long_factor", head_dim),
        attention_scaling=_number(rope, "attention_factor", scaling))


def _factors(rope: dict[str, Any], key: str, head_dim: int) -> tuple[float, ...]:
    values = rope.get(key)
    if not isinstance(values, list) or len(values) != head_dim // 2:
        raise _refusal(key, values, f"a list of head_dim / 2 = {head_dim // 2} numbers")
    return tuple(_number({key: value}, key) for value in values)
