"""The static card: its integers against real parameters and real buffers, its ratios against the arithmetic of the method.

Trap: a card is believed because nobody sees it computed; each number here is checked against something that exists.
"""
import json
import resource
import time
from dataclasses import replace

import pytest
import torch

import bench
from cache import CacheConfig, build_cache
from engine.measure import card
from model import Transformer
from model.config import NAMED_CONFIGS, ModelConfig, named_config

TINY = ModelConfig("llama", 256, 64, 4, 4, 2, 16, 96, 512)
SPECS = ["full", "minicache", "minicache,bits=4,window=5", "minicache,preset=paper",
         "minicache,k_bits=4,v_bits=3,merge_k=0,group=4,merge_from=0", "quant,bits=3", "quant,bits=8,window=0,sinks=0"]
RATES = {"read_bytes_per_s": 1e9, "matmul_flop_per_s": 1e12}


def make(c: ModelConfig, spec: str, capacity: int = 40, **changes) -> dict:
    given = dict(prompt_tokens=capacity // 3, length=capacity // 2, batches=[1, 8], dtype=torch.bfloat16, memory=None) | changes
    return card.make_card(c, spec, capacity=capacity, **given)


@pytest.mark.parametrize("c", [*NAMED_CONFIGS.values(), TINY, replace(TINY, tie_word_embeddings=True)], ids=lambda c: f"{c.family}-{c.dim}")
def test_weight_bytes_are_those_of_the_parameters(c: ModelConfig) -> None:
    """Guards: a forgotten norm or router, a tied head counted twice."""
    with torch.device("meta"):
        n = sum(p.numel() for p in Transformer(c).parameters())
    assert card.weight_bytes(c, torch.bfloat16) == 2 * n


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_card_equals_the_allocated_buffers(spec: str, dtype: torch.dtype) -> None:
    """Guards: a card that promises other bytes than are then taken, in total, by kind, or per element."""
    cache = build_cache(CacheConfig.parse(spec), n_layer=4, n_kv_head=2, head_dim=16, batch=1, max_seq_len=40, dtype=dtype, device="cpu")
    buffers = {id(b): b.nbytes for b in cache.buffers()}
    made = make(TINY, spec, dtype=dtype)
    assert made["kv_bytes_by_kind"] == cache.nbytes() and made["kv_bytes_per_row"] == sum(buffers.values())
    assert made["kv_bytes_per_token"] * 40 == made["kv_bytes_per_row"]
    assert made["bits_per_element"] == 8 * sum(buffers.values()) / (2 * 4 * 2 * 40 * 16)
    assert made["ratio_to_full"] == pytest.approx(16 / made["bits_per_element"])


@pytest.mark.parametrize("spec", SPECS)
def test_a_step_on_a_full_row_reads_each_buffer_once_a_layer(spec: str) -> None:
    """Guards: a shared direction counted once for all its layers, which would promise speed that merging cannot give."""
    config = CacheConfig.parse(spec)
    cache = build_cache(config, n_layer=4, n_kv_head=2, head_dim=16, batch=1, max_seq_len=40, dtype=torch.bfloat16, device="cpu")
    read = 0
    for group in cache.groups:
        for name, buffer in group.named_buffers(recurse=False):
            if not name.endswith(("score_range", "overflow", "rotation", "levels")):
                per_layer = buffer.shape[0] == len(group.layers) and name[:2] in ("k_", "v_")
                read += buffer.nbytes * (1 if per_layer else len(group.layers))
    assert card.kv_read_bytes(TINY, config, length=40, capacity=40, dtype=torch.bfloat16) == read
    assert card.kv_read_bytes(TINY, config, length=10, capacity=40, dtype=torch.bfloat16) < read


def test_a_sliding_window_bounds_what_is_read() -> None:
    shape = dict(capacity=40, dtype=torch.bfloat16)
    windowed = card.kv_read_bytes(replace(TINY, sliding_window=7), CacheConfig(), length=30, **shape)
    assert windowed == card.kv_read_bytes(TINY, CacheConfig(), length=7, **shape)


def test_ceiling_by_hand() -> None:
    """Guards: the embedding counted as read, experts all counted as read for one row, FLOPs forgotten at large batches."""
    c = named_config("mixtral-8x7b")
    for batch, experts in ((1, 2), (3, 6), (500, 8)):
        weights, kv, flops = card.step_cost(c, CacheConfig(), batch=batch, length=100, capacity=200, dtype=torch.bfloat16)
        attention = 4096 * 2 * (4096 + 1024) + 8 * 4096 + 2 * 4096
        shared = 32 * attention + 4096 + 32000 * 4096
        expert = 32 * 3 * 14336 * 4096
        assert weights == 2 * (shared + experts * expert) and kv == batch * 100 * 2 * 32 * 8 * 128 * 2
        assert flops == 2 * batch * (shared + 2 * expert)
        seconds = max(weights / 1e9, flops / 1e12) + kv / 1e9
        assert card.ceiling_tokens_per_s((weights, kv, flops), batch, RATES) == pytest.approx(batch / seconds)


@pytest.mark.parametrize("spec", ["full", "minicache,bits=4"])
def test_rows_that_fit_is_the_largest_such_number(spec: str) -> None:
    """Guards: one row too many, which a GPU answers with an error after minutes of work; and 0 where not even one fits."""
    config, shape = CacheConfig.parse(spec), dict(capacity=40, dtype=torch.bfloat16)

    def need(rows: int) -> int:
        return (card.weight_bytes(TINY, torch.bfloat16) + sum(card.kv_bytes(TINY, config, batch=rows, **shape).values())
                + card.scratch_bytes(TINY, config, batch=rows, prompt_tokens=13, dtype=torch.bfloat16))
    for rows in (1, 7, 3000):
        assert card.rows_that_fit(TINY, config, memory=need(rows), prompt_tokens=13, **shape) == rows
        assert card.rows_that_fit(TINY, config, memory=need(rows) - 1, prompt_tokens=13, **shape) == rows - 1


@pytest.mark.parametrize("spec, ratio", [
    ("full", 1.0), ("minicache,bits=4,merge_from=0.5,window=0,sinks=0,retain=0", 5.11),
    ("minicache,bits=4,merge_from=0.5,window=0,sinks=0,retain=0.02", 4.85), ("minicache,bits=4,window=16,sinks=0,retain=0.02", 4.31),
    ("quant,bits=3,window=0,sinks=0", 5.11), ("minicache,bits=4,merge_from=4", 5.11)])
def test_ratios_on_the_load_of_161_and_338_tokens(spec: str, ratio: float) -> None:
    """Guards the published table: everything counted, llama-2-7b, capacity 499."""
    assert make(named_config("llama-2-7b"), spec, 499)["ratio_to_full"] == pytest.approx(ratio, abs=0.006)


def test_card_only_allocates_nothing_and_answers_at_once(capsys, tmp_path) -> None:
    """Guards: a model of 93 GB built, or a cache, to print a table of integers."""
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    argv = ["throughput", "--model", "mixtral-8x7b", "--cache", "full", "minicache,bits=4", "--card-only", "--device", "cpu",
            "--fill-memory", "141", "--out", str(tmp_path / "card.json")]
    assert bench.main(argv) == 0
    assert time.monotonic() - begin < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000       # KiB; bytes on a Mac, where it is vacuous
    result, out = json.loads((tmp_path / "card.json").read_text()), capsys.readouterr().out
    full, small = result["cards"]
    assert full["kv_bytes_per_row"] == 499 * 2 * 32 * 8 * 128 * 2 and f"{full['kv_bytes_per_row']:,}" in out
    assert small["rows_that_fit"] > 4 * full["rows_that_fit"] > 0 and result["rows"] == []
    assert full["steps"][0]["batch"] == full["rows_that_fit"] and full["steps"][0]["ceiling_tokens_per_s"] is None
