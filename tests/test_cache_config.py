"""SPECs and bytes: what a user writes is what is built, what does not exist is refused by name, and bytes are known before allocation.

Trap: a setting that parses but has the wrong type (window=1.5) would fail deep inside torch with a traceback.
"""
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache import CacheConfig, build_cache
from cache.build import cache_bytes
from cache.config import KEYS

PAPER = CacheConfig("minicache", merge="slerp", t=0.6, coef="norm", retention="intended", gamma=0.05, merge_from=0.5, window=0, sinks=0)
EVERY_KEY = {
    "merge_from": [("0.25", 0.25), ("3", 3), ("0", 0), ("1.0", 1.0)], "group": [("3", 3)], "pairs": [("1-2:3-5", "1-2:3-5")],
    "t": [("0.25", 0.25), ("1", 1.0)],
    "merge": [(m, m) for m in ("slerp", "mean", "max-norm", "optimal")], "coef": [("norm", "norm"), ("projection", "projection")],
    "granularity": [("token", "token"), ("head", "head")], "merge_k": [("0", False), ("1", True)], "merge_v": [("0", False)],
    "retention": [(r, r) for r in ("topk", "intended", "literal")], "retain": [("0.5", 0.5), ("1", 1.0), ("0", 0.0)],
    "gamma": [("0.3", 0.3)], "sinks": [("0", 0), ("7", 7)], "window": [("0", 0), ("128", 128)], "k_bits": [("16", 16), ("3", 3)],
    "v_bits": [("2", 2)], "attend_form": [("reference", "reference")]}

configs = st.builds(
    CacheConfig, kind=st.just("minicache"), merge_from=st.sampled_from([0, 2, 0.0, 0.3, 0.5, 1.0]), group=st.just(2),
    merge=st.sampled_from(["slerp", "mean", "max-norm", "optimal"]), t=st.sampled_from([0.0, 0.25, 0.6, 1e-5]),
    coef=st.sampled_from(["norm", "projection"]), granularity=st.sampled_from(["head", "token"]), merge_v=st.booleans(),
    retention=st.sampled_from(["topk", "intended", "literal"]), retain=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    gamma=st.sampled_from([0.05, 1.0]), sinks=st.integers(0, 6), window=st.integers(0, 40), k_bits=st.sampled_from([16, 16, 8, 4, 3, 2]),
    v_bits=st.sampled_from([16, 16, 8, 4, 3, 2]))


def test_every_key_reaches_its_field() -> None:
    """Guards: a key in the list that does nothing, or a value that lands as text."""
    assert set(EVERY_KEY) | {"preset", "bits"} == set(KEYS["minicache"])
    for key, cases in EVERY_KEY.items():
        for text, value in cases:
            got = getattr(CacheConfig.parse(f"minicache,{key}={text}"), key)
            assert got == value and type(got) is type(value), (key, text, got)


def test_kinds_presets_and_bits() -> None:
    """Guards: defaults, spaces, `bits` as both widths, and settings after a preset winning over it."""
    assert CacheConfig.parse("full") == CacheConfig() and CacheConfig.parse(" minicache ") == CacheConfig("minicache")
    assert CacheConfig.parse("minicache,preset=paper") == PAPER
    assert CacheConfig.parse("minicache,window=8,preset=paper , t=0.5") == CacheConfig.parse("minicache,preset=paper,t=0.5,window=8")
    assert CacheConfig.parse("minicache,preset=paper,window=8").window == 8
    assert CacheConfig.parse("quant,bits=4,window=3") == CacheConfig("quant", window=3, k_bits=4, v_bits=4)
    assert CacheConfig.parse("quant,v_bits=2,bits=4") == CacheConfig("quant", k_bits=4, v_bits=2)


@pytest.mark.parametrize("spec, words", [
    ("paged", ["paged", "full", "quant", "minicache"]), ("", ["full", "quant", "minicache"]),
    ("minicache,foo=1", ["foo", "window", "merge_from", "preset"]), ("minicache,window", ["window", "key=value"]),
    ("full,window=3", ["window", "attend_form"]), ("quant,merge=slerp", ["merge", "bits", "sinks"]),
    ("minicache,merge=median", ["median", "slerp", "mean", "max-norm", "optimal"]), ("minicache,coef=both", ["both", "norm", "projection"]),
    ("minicache,retention=all", ["all", "topk", "intended", "literal"]), ("minicache,granularity=layer", ["layer", "head", "token"]),
    ("minicache,preset=ours", ["ours", "paper"]), ("minicache,window=3,window=3", ["window", "twice"]),
    ("minicache,k_bits=5", ["k_bits is 5", "16, 8, 4, 3, 2"]), ("quant,bits=5", ["setting bits is 5", "16, 8, 4, 3, 2"]),
    ("quant,bits=four", ["setting bits is four", "16, 8, 4, 3, 2"]),
    ("minicache,merge_k=2", ["merge_k", "2", "0 or 1"]), ("minicache,window=many", ["window", "many"]),
    ("minicache,window=-1", ["window", "-1"]), ("minicache,t=1.5", ["t=1.5", "1"]), ("minicache,t=nan", ["nan"]),
    ("minicache,retain=inf", ["inf"]), ("minicache,gamma=-0.1", ["-0.1"]),
    ("minicache,group=1", ["group", "1"]), ("minicache,merge=slerp,group=3", ["slerp", "group=3"]),
    ("minicache,merge_k=0,merge_v=0", ["merge_k=0", "quant"]),
    ("minicache,window=1.5", ["window", "1.5"]), ("minicache,sinks=2.0", ["sinks", "2.0"]), ("minicache,group=2.0", ["group", "2.0"]),
    ("minicache,k_bits=16.0", ["k_bits", "16.0"]), ("minicache,merge_from=1.5", ["merge_from", "1.5"])])
def test_what_does_not_exist_is_refused_with_what_does(spec: str, words: list[str]) -> None:
    """Guards: silent typos, tracebacks from inside torch (window=1.5), and messages that do not help."""
    with pytest.raises(ValueError) as error:
        CacheConfig.parse(spec).layer_groups(12)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


@settings(deadline=None, max_examples=60, derandomize=True)
@given(configs)
def test_a_config_prints_as_the_spec_that_makes_it(config: CacheConfig) -> None:
    """Guards: reports that name a cache which cannot be asked for again."""
    parsed = CacheConfig.parse(str(config))
    assert parsed == config and type(parsed.merge_from) is type(config.merge_from)      # 1.0 is all layers, 1 is layer 1


@pytest.mark.parametrize("spec, n_layer, start", [
    ("merge_from=0.5", 12, 6), ("merge_from=0.5", 10, 6), ("merge_from=0.5,group=3,merge=mean", 12, 6), ("merge_from=0.3", 12, 4),
    ("merge_from=0.5,group=4", 10, 6), ("merge_from=0.0", 3, 1), ("merge_from=1.0", 4, 4), ("merge_from=0", 4, 0), ("merge_from=1", 3, 1)])
def test_layer_groups(spec: str, n_layer: int, start: int) -> None:
    """Guards: a fraction rounds up until n divides the rest, an index is taken as it is, every layer is in one group, in order."""
    config = CacheConfig.parse(f"minicache,{spec}")
    groups = config.layer_groups(n_layer)
    assert [layer for group in groups for layer in group] == list(range(n_layer))
    assert [len(group) for group in groups] == [1] * start + [config.group] * ((n_layer - start) // config.group)


@pytest.mark.parametrize("spec, n_layer", [("merge_from=1", 4), ("merge_from=5", 4), ("merge_from=20", 4), ("merge_from=0,group=3", 4)])
def test_a_layer_index_that_does_not_divide_is_refused(spec: str, n_layer: int) -> None:
    """Guards: an index silently moved; the message names those that fit."""
    config = CacheConfig.parse(f"minicache,{spec}")
    with pytest.raises(ValueError, match="choose one of: ") as error:
        config.layer_groups(n_layer)
    assert " -" not in str(error.value)
    for start in map(int, str(error.value).split("choose one of: ")[1].split(",")):
        assert (n_layer - start) % config.group == 0


def test_shares_are_counted_exactly() -> None:
    """Guards: 0.55 * 40 = 22.000000000000004 in floating point, whose ceiling is one layer or slot too many."""
    for percent in range(0, 101):
        for size in (12, 25, 28, 32, 40, 80, 100, 500):
            exact = math.ceil(Fraction(percent, 100) * size)
            config = CacheConfig.parse(f"minicache,merge_from={percent / 100:.2f},retain={percent / 100:.2f},sinks=0")
            assert config.retained_slots(2, size) == exact, (percent, size)
            singles = sum(len(group) == 1 for group in config.layer_groups(size))
            assert singles == exact + (size - exact) % 2, (percent, size)


def test_retained_slots() -> None:
    """Guards: sinks without room, more slots than tokens, retention by distance in layers that are not merged."""
    config = CacheConfig("minicache", retain=0.1, sinks=4)
    assert [config.retained_slots(2, S) for S in (3, 20, 100, 101)] == [3, 4, 10, 11]
    assert config.retained_slots(1, 100) == 4
    assert CacheConfig("minicache", retain=0.0, sinks=0).retained_slots(2, 100) == 0


sizes = st.fixed_dictionaries({
    "n_layer": st.sampled_from([2, 4, 6]), "n_kv_head": st.integers(1, 3), "head_dim": st.sampled_from([16, 64, 96]),
    "batch": st.integers(1, 3), "max_seq_len": st.integers(1, 70),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16])})
others = st.one_of(st.just(CacheConfig("full")),
                   st.builds(CacheConfig, kind=st.just("quant"), window=st.integers(0, 20), k_bits=st.sampled_from([16, 4])))


@settings(deadline=None, max_examples=80, derandomize=True)
@given(config=st.one_of(configs, others), size=sizes)
def test_bytes_are_those_of_the_buffers_and_known_before(config: CacheConfig, size: dict) -> None:
    """Guards: a buffer that no report counts, a kind with a wrong sum, a forecast that differs from what is allocated."""
    cache, planned = build_cache(config, **size, device="cpu"), build_cache(config, **size, device="meta")
    kinds = cache.nbytes()
    assert kinds == planned.nbytes() == cache_bytes(config, **size)
    assert sum(kinds.values()) == sum(b.untyped_storage().nbytes() for b in cache.buffers())
    assert all(b.device.type == "meta" for b in planned.buffers())
    assert set(kinds) <= {"full", "direction", "magnitude", "retained", "window", "bookkeeping"}


def test_full_cache_bytes() -> None:
    """Guards: the yardstick itself, 2 x L x B x G x S x D x bytes an element."""
    size = dict(n_layer=3, n_kv_head=2, head_dim=8, batch=5, max_seq_len=7, dtype=torch.bfloat16)
    assert cache_bytes(CacheConfig(), **size) == {"full": 2 * 3 * 5 * 2 * 7 * 8 * 2}


def test_a_merged_pair_stores_one_direction() -> None:
    """Guards: the arithmetic that the method is about, by hand: S - W columns, one direction where merged, two where not."""
    size = dict(n_layer=2, n_kv_head=1, head_dim=8, batch=1, max_seq_len=20, dtype=torch.bfloat16)
    config = CacheConfig("minicache", merge_from=0, window=4, sinks=3, retain=0.1)
    assert cache_bytes(config, **size) == {"direction": 2 * 16 * 8 * 2, "magnitude": 2 * 2 * 16 * 2, "retained": 2 * 2 * 3 * 8 * 2,
                                           "window": 2 * 2 * 4 * 8 * 2, "bookkeeping": 16 + 3 * (4 + 4) + 2 * 4 + 4}
    apart = CacheConfig("minicache", merge_from=0, merge_k=False, window=4, sinks=3, retain=0.1)
    assert cache_bytes(apart, **size)["direction"] == 3 * 16 * 8 * 2


def test_pairs_by_name() -> None:
    """Guards the layers that a SPEC names: groups in order of their first layer, the others alone, a SPEC that comes back."""
    cache = CacheConfig.parse("minicache,pairs=4-7:5-6,bits=4")
    assert cache.layer_groups(9) == [(0,), (1,), (2,), (3,), (4, 7), (5, 6), (8,)]
    assert CacheConfig.parse(str(cache)) == cache and CacheConfig.parse("minicache,preset=paper,pairs=0-2").merge == "slerp"


@pytest.mark.parametrize(("setting", "why"), [
    ("pairs=4", "names no groups"), ("pairs=4-x", "names no groups"), ("pairs=7-4", "do not rise"), ("pairs=4-4", "do not rise"),
    ("pairs=1-2,group=2", "pairs and group"), ("pairs=1-2,merge_from=0", "pairs and merge_from"), ("pairs=1-2-3,merge=slerp", "joins two")])
def test_bad_pairs_are_refused(setting: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        CacheConfig.parse(f"minicache,{setting}")


def test_pairs_beyond_the_model_are_refused() -> None:
    for setting in ("1-9", "1-2:2-3"):
        with pytest.raises(ValueError, match="layers 0 to 8 at most once"):
            CacheConfig.parse(f"minicache,pairs={setting}").layer_groups(9)
