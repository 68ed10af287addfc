"""The compiled decode step on the split cache: one graph, made once for the module (most of a minute if nothing is cached), then watched.

The paper's threshold decides (retention=intended), rows are ragged and refilled. Trap: a write through a view, or a read that the compiler
moved behind a write, gives the right result at the same address and still copies the whole buffer each step; only the generated code shows
it. All sizes here are chosen so that the directions are larger than anything that a step must compute.
"""
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from test_compile import addresses, largest_loop_nest

from cache import CacheConfig
from engine import Engine, SamplingParams
from model import ModelConfig
from weights import random_model

S, W, B, H = 37, 4, 3, 4
CONFIG = ModelConfig(family="llama", vocab_size=97, dim=48, n_layer=2, n_head=H, n_kv_head=2, head_dim=16, intermediate_size=64,
                     max_position_embeddings=128, dtype=torch.float32)
CACHE = CacheConfig.parse(f"minicache,merge_from=0,window={W},sinks=1,retain=0.15,retention=intended,gamma=0.3,attend_form=reference")


@dataclass(frozen=True)
class Compiled:
    """A warm engine beside an eager one, what inductor generated and dynamo counted, and where the buffers lay before."""

    engine: Engine
    eager: Engine
    code: list[str]
    counters: dict[str, dict[str, int]]
    addresses: dict[str, int]


def tokens(engine: Engine, lengths: list[int], seed: int) -> list[list[int]]:
    """Greedy continuations of random prompts of these lengths."""
    g = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(0, CONFIG.vocab_size, (n,), generator=g).tolist() for n in lengths]
    out: list[list[int]] = [[] for _ in prompts]
    for step in engine.generate(prompts, SamplingParams(max_new_tokens=12)):
        for index, token in step.tokens:
            out[index].append(token)
    return out


@pytest.fixture(scope="module")
def compiled() -> Iterator[Compiled]:
    if not any(map(shutil.which, ("g++", "c++", "clang++"))):
        pytest.skip("inductor needs a C++ compiler on CPU")
    from torch._dynamo.utils import counters
    from torch._inductor.utils import run_and_get_code
    model = random_model(CONFIG)
    eager, engine = (Engine(model, max_batch_size=B, max_seq_len=S, cache=CACHE, compile=on) for on in (False, True))
    before = addresses(engine)
    torch._dynamo.reset()
    counters.clear()
    _, code = run_and_get_code(tokens, engine, [20, 7, 13], 0)
    yield Compiled(engine, eager, code, {key: dict(value) for key, value in counters.items()}, before)
    torch._dynamo.reset()


def test_one_graph_in_place_and_the_tokens_of_eager(compiled: Compiled) -> None:
    """Guards: a graph break, a recompile for other prompts of one capacity, a rebound buffer, another result than eager's."""
    assert compiled.counters["stats"]["unique_graphs"] == len(compiled.code) == 1 and not compiled.counters.get("graph_break")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, lengths in ((0, [20, 7, 13]), (1, [36, 1, 6]), (2, [3]), (3, [5, 24, 9, 2, 11])):
            assert tokens(compiled.engine, lengths, seed) == tokens(compiled.eager, lengths, seed)
    assert addresses(compiled.engine) == compiled.addresses
    group = compiled.engine.cache.groups[0]
    assert group.active().any() and not group.active().all(), "the threshold has decided nothing here"


def test_no_hidden_copy_of_a_buffer(compiled: Compiled) -> None:
    """Guards: index_put that was not done in place: the result is right, the traffic that of the whole cache, twice, at every step.

    Checked: what the wrapper allocates is smaller than the directions, with a column dimension (S - W) only scores; so are all loop nests.
    Before torch 2.13 a mask is stored, too.
    """
    code, size = compiled.code[0], compiled.engine.cache.groups[0].k_direction.numel()
    shapes = [tuple(map(int, re.findall(r"\d+", shape))) for shape in re.findall(r"empty_strided_cpu\(\(([\d, ]*)\)", code)]
    scores = B * H * (S - W)
    assert scores in map(math.prod, shapes), "the scores are the largest thing that must have been seen"
    if torch.__version__ < "2.13":
        shapes = [shape for shape in shapes if shape != (B, compiled.engine.config.n_kv_head, 1, 1, S - W)]
    assert not {shape for shape in shapes if math.prod(shape) >= size or S - W in shape and math.prod(shape) != scores}
    assert scores <= largest_loop_nest(code) < size
