"""How a cache is chosen: one SPEC, a kind and its settings, written the same way on every command line.

    full
    minicache,merge_from=0.5,merge=optimal,coef=projection,retention=topk,retain=0.02,sinks=4,window=16,group=2,granularity=head
    minicache,preset=paper
"""
import math
import re
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from cache.merge import RULES

if TYPE_CHECKING:
    from cache.base import KVCache

BITS = (16, 8, 4, 3, 2)


@dataclass(frozen=True)
class CacheConfig:
    """A layout and its settings; `parse` reads a SPEC. Sizes follow from it and the model's integers alone."""

    kind: str = "full"
    merge_from: float | int = 0.5       # float: share of layers that stay unmerged, rounded up until `group` divides the rest; int: a layer
    group: int = 2                      # layers that share a direction (n)
    pairs: str = ""                     # instead of both: the layers that share, by name, as 6-9:7-8; all others stay unmerged
    merge: str = "optimal"
    t: float = 0.6                      # slerp only: 0 is the earlier layer, 1 the later one
    coef: str = "projection"
    granularity: str = "head"
    merge_k: bool = True                # False: every layer of the group keeps its own direction for K
    merge_v: bool = True
    retention: str = "topk"
    retain: float = 0.02                # slots for retained tokens, as a share of the capacity
    gamma: float = 0.05                 # intended and literal only
    sinks: int = 4                      # first tokens, always retained
    window: int = 16                    # newest tokens, exact
    k_bits: int = 16
    v_bits: int = 16
    attend_form: str = "auto"           # how one new token attends: the fastest there is, or one by name

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"cache setting {name} is {getattr(self, name)}; choose one of: {', '.join(map(str, choices))}")
        for name, (least, most) in RANGES.items():
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"cache setting {name}={getattr(self, name)} is outside {least} .. {most}; choose a value inside")
        if isinstance(self.merge_from, float) and self.merge_from > 1:
            raise ValueError(f"cache setting merge_from={self.merge_from} is a share above 1; write a share up to 1.0 or a layer index")
        if self.merge == "slerp" and self.group != 2:
            raise ValueError(f"cache setting merge=slerp joins two layers, group={self.group}; use group=2, or merge=optimal")
        if self.pairs and not re.fullmatch(r"\d+-\d+(-\d+)*(:\d+-\d+(-\d+)*)*", self.pairs):
            raise ValueError(f"cache setting pairs={self.pairs} names no groups of layers; write for example pairs=6-9:7-8")
        if any(list(group) != sorted(set(group)) for group in self._named_groups()):
            raise ValueError(f"cache setting pairs={self.pairs} has a group whose layers do not rise; write the lower one first, as 6-9")
        if self.merge == "slerp" and any(len(group) > 2 for group in self._named_groups()):
            raise ValueError(f"cache setting merge=slerp joins two layers, pairs={self.pairs} has more; use merge=optimal")
        if self.kind == "minicache" and not (self.merge_k or self.merge_v):
            raise ValueError("cache settings merge_k=0,merge_v=0 merge nothing; merge one of them, or use the kind quant")

    @classmethod
    def parse(cls, spec: str) -> "CacheConfig":
        """SPEC text -> CacheConfig. ValueError names the unknown kind, key or value and those that exist."""
        kind, *settings = (part.strip() for part in spec.split(","))
        if kind not in KEYS:
            raise ValueError(f"cache kind {kind!r} does not exist; choose one of: {', '.join(KEYS)}")
        given: dict[str, str] = {}
        for setting in settings:
            key, equals, value = setting.partition("=")
            if key not in KEYS[kind] or not equals:
                raise ValueError(f"cache setting {setting!r} is not one of {kind}'s key=value settings; choose from: "
                                 f"{', '.join(KEYS[kind])}")
            if key in given:
                raise ValueError(f"cache setting {key} is given twice ({given[key]} and {value}); give it once")
            given[key] = value
        if "pairs" in given and (other := given.keys() & {"merge_from", "group"}):
            raise ValueError(f"cache settings pairs and {min(other)} both say which layers share; give one of them")
        preset = given.pop("preset", None)
        if preset is not None and preset not in PRESETS:
            raise ValueError(f"cache preset {preset!r} does not exist; choose one of: {', '.join(PRESETS)}")
        if "bits" in given:
            if (bits := given.pop("bits")) not in map(str, BITS):
                raise ValueError(f"cache setting bits is {bits}; choose one of: {', '.join(map(str, BITS))}")
            given = {"k_bits": bits, "v_bits": bits} | given
        return replace(cls(kind=kind), **(PRESETS[preset] if preset else {}) | {key: convert(key, value) for key, value in given.items()})

    def build(self, **shape) -> "KVCache":
        """The cache itself: see `build_cache`. Anything with `build` and `nbytes` can be given to an Engine as its cache."""
        from cache.build import build_cache
        return build_cache(self, **shape)

    def nbytes(self, **shape) -> dict[str, int]:
        """Its bytes by kind, from integers alone: see `cache_bytes`."""
        from cache.build import cache_bytes
        return cache_bytes(self, **shape)

    def __str__(self) -> str:
        """A SPEC that parses back to this config: the kind and what differs from the defaults."""
        changed = [f.name for f in fields(self) if f.name != "kind" and getattr(self, f.name) != f.default]
        return ",".join([self.kind] + [f"{name}={format_value(getattr(self, name))}" for name in changed])

    def layer_groups(self, n_layer: int) -> list[tuple[int, ...]]:
        """Layer indices by group, in order: singles below merge_from, groups of n above. ValueError if n does not divide what is left."""
        if self.kind != "minicache":
            return [(layer,) for layer in range(n_layer)]
        if self.pairs:
            named = [layer for group in self._named_groups() for layer in group]
            if max(named) >= n_layer or len(set(named)) < len(named):
                raise ValueError(f"cache setting pairs={self.pairs} must name each of the layers 0 to {n_layer - 1} at most once")
            return sorted([*self._named_groups(), *((layer,) for layer in range(n_layer) if layer not in named)])
        n, start = self.group, self.merge_from
        if isinstance(start, float):
            start = share_of(start, n_layer)
            start += (n_layer - start) % n
        if start > n_layer or (n_layer - start) % n:
            fits = [layer for layer in range(n_layer) if (n_layer - layer) % n == 0]
            why = (f"leaves {n_layer - start} of {n_layer} layers, which groups of {n} do not divide" if start <= n_layer else
                   f"lies beyond the model's {n_layer} layers")
            raise ValueError(f"merge_from={start} {why}; choose one of: {', '.join(map(str, fits))}")
        return [(layer,) for layer in range(start)] + [tuple(range(layer, layer + n)) for layer in range(start, n_layer, n)]

    def _named_groups(self) -> list[tuple[int, ...]]:
        return [tuple(map(int, group.split("-"))) for group in self.pairs.split(":")] if self.pairs else []

    def is_full(self, group: tuple[int, ...]) -> bool:
        """Whether a group of layers is stored as it is: nothing merged, nothing quantised."""
        return self.kind == "full" or self.kind == "minicache" and len(group) == 1 and self.k_bits == self.v_bits == 16

    def code_widths(self, n_layer: int) -> set[int]:
        """The bits below 16 that some group stores codes in."""
        return {self.k_bits, self.v_bits} - {16} if any(not self.is_full(group) for group in self.layer_groups(n_layer)) else set()

    def retained_slots(self, group_size: int, max_seq_len: int) -> int:
        """R: room for the share `retain` of the capacity where layers are merged, for the sinks where they are not."""
        share = share_of(self.retain, max_seq_len) if group_size > 1 else 0
        return min(max(share, self.sinks), max_seq_len)


CHOICES = {"merge": tuple(RULES), "coef": ("projection", "norm"), "granularity": ("head", "token"),
           "retention": ("topk", "intended", "literal"),
           "attend_form": ("auto", "reference", "triton", "cpp"), "k_bits": BITS, "v_bits": BITS}
RANGES = {"group": (2, 8), "t": (0, 1), "retain": (0, 1), "gamma": (0, 1), "sinks": (0, 1024), "window": (0, 1 << 20),
          "merge_from": (0, 1 << 20)}
_STORED = ("bits", "k_bits", "v_bits", "sinks", "window", "attend_form")
KEYS = {"full": ("attend_form",), "quant": _STORED,
        "minicache": ("preset", "merge_from", "group", "pairs", "merge", "t", "coef", "granularity", "merge_k", "merge_v", "retention",
                      "retain", "gamma", *_STORED)}
# The paper's setting (arXiv 2405.14366, sections 4 and 5) as it stands, retention with the sign that its text means.
PRESETS = {"paper": dict(merge="slerp", t=0.6, coef="norm", retention="intended", gamma=0.05, merge_from=0.5, window=0, sinks=0)}


def share_of(share: float, size: int) -> int:
    """ceil(share * size), the share as it is written: in floating point .55 * 40 lies above 22."""
    return math.ceil(Fraction(str(share)) * size)


def convert(key: str, value: str) -> float | int | bool | str:
    """A setting's text to its type; ValueError says which type it wants."""
    if key == "pairs" or key in CHOICES and not key.endswith("_bits"):
        return value
    try:
        if key in ("merge_k", "merge_v"):
            return {"0": False, "1": True}[value]
        return float(value) if key in ("t", "retain", "gamma") or key == "merge_from" and not value.isdecimal() else int(value)
    except (ValueError, KeyError):
        number = "a number" if key in ("t", "retain", "gamma", "merge_from") else "a whole number"
        wants = "0 or 1" if key in ("merge_k", "merge_v") else number
        example = format_value(getattr(CacheConfig(), key))
        raise ValueError(f"cache setting {key}={value!r} is not {wants}; write for example {key}={example}") from None


def format_value(value: float | int | bool | str) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)
