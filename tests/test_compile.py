"""The compiled decode step on CPU: one graph, made once for the whole module (half a minute), then watched.

The batch mixes greedy and sampled rows, so that the graph is the one that serves every request. What the generated code may not
hold: a buffer as large as one of the cache's, or a loop over one. An address test cannot see such a copy.
"""
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from test_engine import PROMPTS, alone, model, run

from cache import CacheConfig
from engine import Engine, SamplingParams

CAPACITY, ROWS = 37, 3      # odd: no other size of this model has the factor 37
PARAMS = [SamplingParams(max_new_tokens=9), SamplingParams(max_new_tokens=12, temperature=0.9, top_k=20, top_p=0.9, seed=1),
          SamplingParams(max_new_tokens=4), SamplingParams(max_new_tokens=11, temperature=1.1, seed=2)]


@dataclass(frozen=True)
class Compiled:
    """A warm engine, the code that inductor generated for it, what dynamo counted, and where the buffers lay before."""

    engine: Engine
    code: list[str]
    counters: dict[str, dict[str, int]]
    addresses: dict[str, int]


def addresses(e: Engine) -> dict[str, int]:
    return {name: buffer.data_ptr() for name, buffer in e.step.named_buffers()}


@pytest.fixture(scope="module")
def compiled() -> Iterator[Compiled]:
    if not any(map(shutil.which, ("g++", "c++", "clang++"))):
        pytest.skip("inductor needs a C++ compiler on CPU")
    from torch._dynamo.utils import counters
    from torch._inductor.utils import run_and_get_code
    e = Engine(model(9), max_batch_size=ROWS, max_seq_len=CAPACITY, cache=CacheConfig(attend_form="reference"), compile=True)
    before = addresses(e)
    counters.clear()
    _, code = run_and_get_code(lambda: list(e.generate(PROMPTS[:4], PARAMS)))
    yield Compiled(e, code, {key: dict(value) for key, value in counters.items()}, before)
    torch._dynamo.reset()


def test_decode_is_one_graph(compiled: Compiled) -> None:
    """Guards: a graph break or a second graph: each costs a launch, or the CUDA graph."""
    assert not compiled.counters.get("graph_break") and compiled.counters["stats"]["unique_graphs"] == 1
    assert len(compiled.code) == 1


def test_no_recompile_and_the_tokens_of_eager(compiled: Compiled) -> None:
    """Guards: a shape, a length or a host number that the graph was specialised on; a compiled step that draws other tokens."""
    e = compiled.engine
    with torch._dynamo.config.patch(error_on_recompile=True):
        for prompts, params in ((PROMPTS[:4], PARAMS), ([PROMPTS[6], *PROMPTS[2:5]], PARAMS), (PROMPTS[4:5], PARAMS[1:2])):
            tokens, _ = run(e, prompts, params)
            assert tokens == [alone(p, s, 9) for p, s in zip(prompts, params, strict=True)]
        long = SamplingParams(max_new_tokens=99, temperature=0.5, top_k=50, seed=3, stop_ids=(96,))
        history = [PROMPTS[1], PROMPTS[3]]
        for reuse in (False, True):
            steps = list(e.generate(history, long, reuse=reuse))
            assert any(reason in ("capacity", "stop") for step in steps for _, reason in step.finished)
            history = [p + [1] for p in history]


def test_buffers_never_move(compiled: Compiled) -> None:
    """Guards: state that is rebound between steps: a CUDA graph would go on reading the old place."""
    run(compiled.engine, PROMPTS[:4], PARAMS)
    assert addresses(compiled.engine) == compiled.addresses


def test_no_hidden_copy_of_a_cache_buffer(compiled: Compiled) -> None:
    """Guards: a write through a view, scatter_, or copy_(where()): right, at the same address, and S times the traffic.

    Checked: every buffer that the wrapper allocates is smaller than a cache buffer; one with a capacity-sized dimension is an attention
    mask [B, 1, 1, S]; no loop nest runs over as many elements as a cache buffer; library operators are matmul, SDPA (which reads
    shared kv heads in place) and those of the vocabulary.
    """
    code, size = compiled.code[0], compiled.engine.cache.groups[0].k.numel()
    shapes = [tuple(map(int, re.findall(r"\d+", shape))) for shape in re.findall(r"empty_strided_cpu\(\(([\d, ]*)\)", code)]
    assert len(shapes) > 5 and max(map(math.prod, shapes)) < size
    assert {shape for shape in shapes if CAPACITY in shape} <= {(ROWS, 1, 1, CAPACITY)}
    assert not [shape for shape in shapes if any(n % CAPACITY == 0 and n != CAPACITY for n in shape)]
    loops = largest_loop_nest(code)
    assert ROWS * CAPACITY <= loops < size, "the mask is the smallest thing that must have been seen"
    operators = set(re.findall(r"(?:= torch\.ops\.\w+|extern_kernels)\.(\w+)[\w.]*\(", code))
    assert operators <= {"mm", "addmm", "bmm", "_scaled_dot_product_flash_attention_for_cpu", "sort", "cumsum"}


def test_one_row_passes_each_weight_once_and_says_what_eager_says() -> None:
    """Guards: the library's slow product of one row, an input computed anew for every output, and other tokens because of it."""
    if not any(map(shutil.which, ("g++", "c++", "clang++"))):
        pytest.skip("inductor needs a C++ compiler on CPU")
    from torch._inductor.utils import run_and_get_code
    e = Engine(model(9), max_seq_len=CAPACITY, cache=CacheConfig(attend_form="reference"), compile=True)
    steps, code = run_and_get_code(lambda: list(e.generate(PROMPTS[1:2], PARAMS[0])))
    assert [token for step in steps for _, token in step.tokens] == alone(PROMPTS[1], PARAMS[0], 9)
    assert len(code) == 1 and not re.findall(r"extern_kernels\.\w*mm", code[0])
    torch._dynamo.reset()


def test_on_a_gpu_a_step_runs_once_a_call_whether_it_compiles_is_captured_or_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a captured step that is not run in that call, or twice; a graph of another method. The device is played by a list."""
    from contextlib import contextmanager

    from engine.decode import Replayed
    ran, into = [], [None]

    class Graph:
        def __init__(self) -> None:
            self.held = []

        def replay(self) -> None:
            ran.extend(self.held)

    @contextmanager
    def capture(graph: Graph, *, stream: str, **_: object) -> Iterator[None]:
        assert stream == "on cuda:1", "another device's launches are not captured"
        into[0] = graph
        yield
        into[0] = None

    for name, part in {"CUDAGraph": Graph, "graph": capture, "graph_pool_handle": object, "empty_cache": lambda: None,
                       "Stream": lambda device: f"on {device}"}.items():
        monkeypatch.setattr(torch.cuda, name, part)
    calls = []
    step = Replayed(lambda method: (calls.append(method), (into[0].held if into[0] else ran).append(method)), torch.device("cuda:1"))
    order = ["greedy", "greedy", "top_p", "greedy", "top_p", "top_p", "greedy"]
    for i, method in enumerate(order):
        step(method)
        assert ran == order[:i + 1]
    assert calls == ["greedy", "greedy", "top_p", "top_p"]


def largest_loop_nest(code: str) -> int:
    """The most iterations of any nest of C++ loops, nesting read off the indentation."""
    largest, nest = 0, []
    for indent, bound in re.findall(r"^( *)for\(int64_t \w+=static_cast<int64_t>\(0L*\); \w+<static_cast<int64_t>\((\d+)L*\)", code, re.M):
        while nest and nest[-1][0] >= len(indent):
            nest.pop()
        nest.append((len(indent), int(bound)))
        largest = max(largest, math.prod(n for _, n in nest))
    return largest
