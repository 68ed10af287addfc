"""Alignment: other coordinates for K and V, chosen so that merged layers look alike, folded into the weights. The model stays the same.

In each layer of a group, slot g takes the checkpoint's kv head `order[g]` with its query heads, and in its coordinates
    k' = c k,  q' = q / conj(c)     c: a complex number for each pair (i, i + D / 2) that RoPE turns, so the two commute; q' . k' = q . k
    v' = M v,  W_O' = W_O M^-1      M: any invertible [D, D]
Only what a cache merges is folded: layers that it stores one by one keep their own coordinates, which suit their codes.
Trap: files are untrusted, and a map that is near singular would drown the model in rounding: see `read_alignment`.
"""
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load, save_file
from torch import Tensor

from model import ModelConfig, Transformer
from weights.checkpoint import ALIGNMENT

if TYPE_CHECKING:
    from cache import CacheConfig

FORMAT = "minicache-alignment-1"
MAX_CONDITION = 64.0                # of a map, largest over smallest stretch, and how far from 1 either may be: bf16 has 256 steps
MAX_BYTES = 1 << 30                 # of a file: larger than any model's alignment


@dataclass(frozen=True)
class LayerMap:
    """One layer's coordinates, by slot: order [G] int64, k complex64 [G, D / 2], v [G, D, D] fp32."""

    order: Tensor
    k: Tensor
    v: Tensor

    def apply(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """K and V [B, G, T, D] of a layer that was not folded, as if it were."""
        m = LayerMap(*(x.to(k.device) for x in (self.order, self.k, self.v)))
        return change(k[:, m.order].float(), m.k).to(k.dtype), change(v[:, m.order].float(), m.v).to(v.dtype)


@dataclass(frozen=True)
class Alignment:
    """Maps for the layers of `groups`; source: where they come from, for messages."""

    groups: tuple[tuple[int, ...], ...]
    layers: Mapping[int, LayerMap]
    source: str = "the alignment"

    def wanted(self, cache: "CacheConfig", n_layer: int) -> dict[int, LayerMap]:
        """The maps for the layers that `cache` merges, for what it merges of them. ValueError where a group is not among ours."""
        merged = [group for group in cache.layer_groups(n_layer) if len(group) > 1]
        strange = [group for group in merged if group not in self.groups]
        if strange:
            ours = ", ".join("-".join(map(str, group)) for group in self.groups)
            raise ValueError(f"{self.source} aligns layers {ours}, the cache merges {'-'.join(map(str, strange[0]))}: make one for this "
                             "cache with bench.py align --cache SPEC, or use --alignment none")
        maps = {layer: self.layers[layer] for group in merged for layer in group}
        return {layer: LayerMap(m.order, m.k if cache.merge_k else torch.ones_like(m.k),
                                m.v if cache.merge_v else torch.eye(m.v.shape[-1]).expand_as(m.v)) for layer, m in maps.items()}


def fold(model: Transformer, maps: Mapping[int, LayerMap]) -> None:
    """Write maps into the layers' wqkv and wo, in place: computed in fp64, rounded once to the weights' dtype."""
    c = model.config
    H, G, D = c.n_head, c.n_kv_head, c.head_dim
    for layer, m in maps.items():
        attention = model.layers[layer].attention
        m = LayerMap(*(x.to(attention.wo.weight.device) for x in (m.order, m.k.to(torch.complex128), m.v.double())))
        wq, wk, wv = attention.wqkv.weight.double().unflatten(0, (-1, D)).split((H, G, G))          # [heads, D, C]
        wq, wk, wv = wq.unflatten(0, (G, -1))[m.order], wk[m.order], wv[m.order]
        wo = attention.wo.weight.double().unflatten(1, (G, -1, D))[:, m.order]                      # [C, G, H / G, D]
        wk, wq = change(wk.mT, m.k).mT, change(wq.mT, 1 / m.k.conj()[:, None]).mT
        wv, wo = m.v @ wv, torch.einsum("cghd,gde->cghe", wo, torch.linalg.inv(m.v))
        attention.wqkv.weight.copy_(torch.cat((wq.flatten(0, 1), wk, wv)).flatten(0, 1))
        attention.wo.weight.copy_(wo.flatten(1))


def as_complex(x: Tensor) -> Tensor:
    """Coordinates i and i + D / 2, which RoPE turns together, as one number: [..., D] -> [..., D / 2]."""
    return torch.complex(*(part.contiguous() for part in x.chunk(2, -1)))


def change(x: Tensor, maps: Tensor) -> Tensor:
    """x [..., G, T, D] in the coordinates of maps: complex [..., G, D / 2], or real [..., G, D, D]."""
    if not maps.is_complex():
        return x @ maps.mT
    y = as_complex(x) * maps[..., None, :]
    return torch.cat((y.real, y.imag), -1)


@contextmanager
def aligned(model: Transformer, alignment: Alignment | None, cache: "CacheConfig") -> Iterator[dict[int, LayerMap]]:
    """Inside, `model` is aligned for what `cache` merges, by the maps given; afterwards its weights are bit for bit what they were."""
    maps = alignment.wanted(cache, model.config.n_layer) if alignment else {}
    kept = {p: p.clone() for layer in maps for p in model.layers[layer].attention.parameters()}
    try:
        fold(model, maps)
        yield maps
    finally:
        for parameter, before in kept.items():
            parameter.copy_(before)


def align(model: Transformer, alignment: Alignment | None, cache: "CacheConfig") -> None:
    """Fold what `cache` merges, for good. None: nothing happens. ValueError where its groups are not those of the alignment."""
    if alignment:
        fold(model, alignment.wanted(cache, model.config.n_layer))


def find_alignment(option: str | None, checkpoint: Path, config: ModelConfig, cache: "CacheConfig | None" = None) -> Alignment | None:
    """What --alignment names, or where it names nothing the checkpoint's own file, if that fits. None for "none", and for a `cache` that
    merges nothing (None: any cache). ValueError for a bad file, and for one that was named and does not fit."""
    path = checkpoint / ALIGNMENT if option is None else Path(option)
    merges = cache is None or any(len(group) > 1 for group in cache.layer_groups(config.n_layer))
    if option == "none" or option is None and not (merges and path.is_file()):
        return None
    alignment = read_alignment(path, config)
    if not merges:
        return None
    try:
        if cache and cache.granularity == "token":
            raise ValueError(f"{alignment.source} is fitted head by head, granularity=token merges over all heads: use --alignment none")
        if cache:
            alignment.wanted(cache, config.n_layer)
    except ValueError:
        if option is not None:
            raise
        return None
    return alignment


def read_alignment(path: str | Path, config: ModelConfig) -> Alignment:
    """ValueError, one line, for a file that is no alignment of a model of these shapes."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, at most {MAX_BYTES:,} are read")
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        meta, tensors = json.loads(data[8:8 + size]).get("__metadata__", {}), load(data)
        groups = json.loads(meta.get("groups", "null"))
    except OSError as error:
        raise ValueError(f"alignment {path} cannot be read ({error.strerror}); make one with bench.py align") from None
    except Exception as error:      # whatever a broken header makes of the parsers
        why = str(error)[:80]
        raise ValueError(f"{path} is truncated or no safetensors file ({why!r}); make it again with bench.py align, or use --alignment none"
                         ) from None
    wrong = _why_not(groups, meta, tensors, config)
    if wrong:
        raise ValueError(f"{path} is no alignment of this model: {wrong}; make one with bench.py align, or use --alignment none")
    groups = tuple(map(tuple, groups))
    layers = {layer: LayerMap(tensors[f"{layer}.order"], torch.view_as_complex(tensors[f"{layer}.k"]), tensors[f"{layer}.v"])
              for group in groups for layer in group}
    return Alignment(groups, layers, str(path))


def _why_not(groups: object, meta: Mapping[str, str], tensors: Mapping[str, Tensor], c: ModelConfig) -> str | None:
    """What is wrong with a file's contents, or None."""
    kind = meta.get("map")
    if meta.get("format") != FORMAT or kind not in ("orthogonal", "invertible"):
        return f"its header does not say {FORMAT} and which kind of map"
    if not groups or not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
        return f"its groups {str(groups)[:80]} are not lists of layers"
    flat = [layer for group in groups for layer in group]
    if not all(type(layer) is int and 0 <= layer < c.n_layer for layer in flat):
        return f"it has groups {str(groups)[:80]}, the model layers 0 to {c.n_layer - 1}"
    if len(set(flat)) < len(flat) or any(len(group) < 2 or group != sorted(group) for group in groups):
        return f"its groups {str(groups)[:80]} are not disjoint groups of rising layers"
    G, D = c.n_kv_head, c.head_dim
    shapes = {"order": ((G,), torch.int64), "k": ((G, D // 2, 2), torch.float32), "v": ((G, D, D), torch.float32)}
    expected = {f"{layer}.{name}": want for layer in flat for name, want in shapes.items()}
    if tensors.keys() != expected.keys():
        return f"its tensors are not those of its groups (first {min(tensors.keys() ^ expected.keys())!r})"
    for name, (shape, dtype) in expected.items():
        x = tensors[name]
        if tuple(x.shape) != shape or x.dtype != dtype:
            return f"tensor {name!r} is {x.dtype} {list(x.shape)}, the model wants {dtype} {list(shape)}"
        if name.endswith("order"):
            if x.sort().values.tolist() != list(range(G)):
                return f"{name!r} is {x.tolist()}, not an order of {G} kv heads"
            continue
        if not x.abs().max() <= MAX_CONDITION:          # nan too; and singular values of 1e38 need not converge
            return f"map {name!r} stretches by more than {MAX_CONDITION:g}, or holds numbers that are not finite"
        stretch = torch.linalg.svdvals(x) if name.endswith("v") else x.norm(dim=-1)         # [G, D or D / 2]
        if kind == "orthogonal" and (stretch - 1).abs().max() > 1e-3:
            return f"map {name!r} is not orthogonal (it stretches by up to {stretch.max():.4g}), as its header says"
        least, condition = stretch.min(), (stretch.amax(-1) / stretch.amin(-1).clamp_min(1e-30)).max()
        if not (least >= 1 / MAX_CONDITION and condition <= MAX_CONDITION):
            return f"map {name!r} shrinks to {least:.3g}, condition number {condition:.3g}: beyond {MAX_CONDITION:g} rounding shows"
    return None


def write_alignment(path: str | Path, alignment: Alignment, *, kind: str) -> None:
    """kind: orthogonal or invertible, which a reader holds the maps to."""
    tensors = {f"{layer}.{name}": x.clone() for layer, m in alignment.layers.items()
               for name, x in (("order", m.order), ("k", torch.view_as_real(m.k)), ("v", m.v))}
    save_file(tensors, path, metadata={"format": FORMAT, "map": kind, "groups": json.dumps(alignment.groups)})
