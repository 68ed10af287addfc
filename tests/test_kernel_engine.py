"""The decode step that people run: compiled, on the fast forms, full and merged layers in one graph. On a GPU it is a CUDA graph.

Trap: an operator's write that the compiler cannot do in place gives the right tokens and copies the whole cache at every step.
"""
import math
import re
import shutil
from contextlib import nullcontext

import pytest
import torch
from test_compile import addresses
from test_split_compile import CONFIG, B, S, tokens

from cache import CacheConfig
from engine import Engine
from model import ModelConfig
from weights import random_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]
DEEP = ModelConfig(**{**vars(CONFIG), "n_layer": 4})


@pytest.mark.parametrize("device", DEVICES)
def test_the_compiled_step_on_fast_forms_is_one_graph_in_place(device: str) -> None:
    """Guards: a graph break or recompile at an operator, a clone of a buffer that it writes, other tokens than the reference's."""
    from torch._dynamo.utils import counters
    from torch._inductor.utils import run_and_get_code
    if device == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        pytest.skip("the C++ form and inductor need a compiler")
    model, spec = random_model(DEEP, device=device), "minicache,window=4,sinks=1,retain=0.1"
    plain = Engine(model, max_batch_size=B, max_seq_len=S, cache=CacheConfig.parse(spec + ",attend_form=reference"), compile=False)
    fast = Engine(model, max_batch_size=B, max_seq_len=S, cache=CacheConfig.parse(spec), compile=True)
    assert {group.form for group in fast.cache.groups} == {"cpp" if device == "cpu" else "triton"} and len(fast.cache.groups) == 3
    torch._dynamo.reset()
    counters.clear()
    before = addresses(fast)
    found, code = run_and_get_code(tokens, fast, [20, 7, 13], 0)
    assert found == tokens(plain, [20, 7, 13], 0)
    assert counters["stats"]["unique_graphs"] == len(code) == 1 and not counters.get("graph_break")
    assert device == "cpu" or all(fast.decode_one_token.graphs.values())
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, lengths in ((1, [36, 1, 6]), (3, [5, 24, 9, 2, 11])):
            assert tokens(fast, lengths, seed) == tokens(plain, lengths, seed)
    assert addresses(fast) == before
    shapes = [tuple(map(int, re.findall(r"\d+", shape))) for shape in re.findall(r"empty_strided_\w+\(\(([\d, ]*)\)", code[0])]
    assert shapes and max(map(math.prod, shapes)) < fast.cache.groups[-1].k_direction.numel()
    assert "torch.ops.minicache.commit" in code[0] and code[0].count("torch.ops.minicache.attend") >= 4
    torch._dynamo.reset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("spec", ["full", "quant,bits=4", "minicache,merge_from=0,bits=4", "minicache,merge_from=0,preset=paper"])
def test_a_cache_takes_no_value_from_the_host(spec: str) -> None:
    """Guards: x[at] = 0 with a tensor `at` fetches the 0 from the host: a GPU waits for it, and the capture of a graph ends."""
    config = CacheConfig.parse(spec)
    n = 2 if config.kind == "minicache" else 1
    group = config.build(n_layer=n, n_kv_head=2, head_dim=16, batch=3, max_seq_len=64, dtype=torch.bfloat16, device="cuda").groups[0]
    group.form = "reference"
    k, rows = torch.randn(n, 3, 2, 20, 16, device="cuda").bfloat16(), torch.arange(3, device="cuda")
    length, one = torch.full((3,), 20, device="cuda"), torch.ones(3, dtype=torch.int64, device="cuda")
    for capture in (False, True):       # the first round lets libraries set themselves up
        torch.cuda.synchronize()
        with torch.cuda.graph(torch.cuda.CUDAGraph()) if capture else nullcontext():
            group.reset(rows)
            group.commit(k, k, torch.zeros_like(length), length, rows)
            group.commit(k[..., :1, :], k[..., :1, :], length, one)
