"""The full cache: attention against the long way, what may be written, bytes, prefill through the engine; and the expert forms.

"The long way" is softmax attention in fp64 over what `read` returns, row by row, with the mask written out.
"""
import pytest
import torch
from test_engine import PROMPTS, read, tiny

import cache.base
import cache.prefill
import engine.engine
from cache import CacheConfig, KVCache, build_cache
from cache.base import LayerGroup
from engine import Engine
from model import ModelConfig
from model.transformer import MixtureOfExperts
from weights import random_model

B, S, D = 4, 13, 8


def full(n_kv_head: int = 2, *, n_layer: int = 1, window: int | None = None, dtype: torch.dtype = torch.float32,
         device: str = "cpu") -> KVCache:
    return build_cache(CacheConfig("full"), n_layer=n_layer, n_kv_head=n_kv_head, head_dim=D, batch=B, max_seq_len=S, dtype=dtype,
                       device=device, sliding_window=window)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def the_long_way(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: int, window: int | None) -> torch.Tensor:
    """One query q [H, D] at `position` over k, v [G, S, D] -> [H, D]."""
    first, per_head = 0 if window is None else max(0, position - window + 1), q.shape[0] // k.shape[0]
    k, v = (x[:, first:position + 1].double().repeat_interleave(per_head, 0) for x in (k, v))
    p = torch.einsum("hd,hsd->hs", q.double(), k).div(D ** 0.5).softmax(-1)
    return torch.einsum("hs,hsd->hd", p, v).float()


@pytest.mark.parametrize("form", ["full", "base"])
@pytest.mark.parametrize("rows", [None, [2, 0]])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("H, G", [(4, 4), (4, 2), (4, 1)])
def test_attend_equals_the_long_way(H: int, G: int, window: int | None, rows: list[int] | None, form: str) -> None:
    """Guards: ragged rows, shared kv heads, named slots, padding; "base" is the form that a new layout inherits."""
    cache = full(G, window=window)
    layer, which = cache.groups[0], list(range(B)) if rows is None else rows
    attend = layer.attend if form == "full" else lambda *a: LayerGroup.attend(layer, *a)
    length, slots = torch.tensor([0, 3, 5, 9])[which], None if rows is None else torch.tensor(rows)
    for step, n_new in enumerate(([4, 2, 3, 4], [1, 1, 0, 0], [1, 0, 1, 0])):
        n_new, T = torch.tensor(n_new)[which], max(n_new)
        q, k, v = (random(len(which), heads, T, D, seed=9 * step + i) for i, heads in enumerate((H, G, G)))
        i = torch.arange(T)
        y = attend(0, q, k, v, length[:, None] + i, i < n_new[:, None], slots)
        assert y.shape == q.shape and y.isfinite().all()
        length = length + n_new
        stored = torch.zeros(B, dtype=torch.int64)
        stored[which] = length
        keys, values = layer.read(0, stored)
        for b, row in enumerate(which):
            for t in range(n_new[b]):
                position = int(length[b] - n_new[b]) + t
                torch.testing.assert_close(keys[row, :, position], k[b, :, t], rtol=0, atol=0)
                expected = the_long_way(q[b, :, t], keys[row], values[row], position, window)
                torch.testing.assert_close(y[b, :, t], expected, rtol=0, atol=1e-5)


def test_invalid_lanes_write_nothing() -> None:
    """Guards: padding or a finished row that writes: at its position, at column 0 when the row is full, or into another row."""
    cache = full()
    layer = cache.groups[0]
    for buffer in layer.buffers():
        buffer.copy_(random(*buffer.shape))
    before = [buffer.clone() for buffer in layer.buffers()]
    length, n_new = torch.tensor([2, S, S - 1, 0]), torch.tensor([2, 0, 1, 0])
    i = torch.arange(5)
    args = random(B, 2, 5, D, seed=1), random(B, 2, 5, D, seed=2)
    layer.attend(0, args[0], *args, length[:, None] + i, i < n_new[:, None], None)
    for old, new in zip(before, layer.buffers(), strict=True):
        changed = (old != new).any(-1).any(1)           # [B, S]
        assert [row.nonzero().flatten().tolist() for row in changed] == [[2, 3], [], [S - 1], []]


@pytest.mark.parametrize("cuts", [[7], [1] * 7, [3, 4], [0, 5, 0, 2]])
def test_commit_is_associative(cuts: list[int]) -> None:
    """Guards: a state that depends on how the same tokens were cut; padded lanes between the pieces."""
    k, v = random(1, B, 2, 7, D), random(1, B, 2, 7, D, seed=1)
    whole, cut, start = full().groups[0], full().groups[0], torch.tensor([0, 1, 2, 6])
    whole.commit(k, v, start, torch.full((B,), 7))
    done = 0
    for n in cuts:
        piece = [torch.nn.functional.pad(x[:, :, :, done:done + n], (0, 0, 0, 2), value=99.0) for x in (k, v)]
        cut.commit(*piece, start + done, torch.full((B,), n))
        done += n
    assert all(torch.equal(a, b) for a, b in zip(whole.buffers(), cut.buffers(), strict=True))


def test_reset_forgets_its_rows_only() -> None:
    """Guards: a reused slot that still sees its last tenant; a reset that clears the neighbours."""
    used, fresh = full(n_layer=2), full(n_layer=2)
    i, old = torch.arange(6), [random(B, 2, 6, D, seed=s) for s in range(3)]
    for layer in used.layers:
        layer.attend(*old, i.expand(B, -1), torch.ones(B, 6, dtype=torch.bool))
    kept = used.groups[1].read(0, torch.tensor([0, 6, 0, 6]))
    rows = torch.tensor([2, 0])
    used.reset(rows)
    new = [random(2, 2, 4, D, seed=s) for s in range(3, 6)]
    for layer_used, layer_fresh in zip(used.layers, fresh.layers, strict=True):
        y = [x.attend(*new, i[:4].expand(2, -1), torch.ones(2, 4, dtype=torch.bool), rows) for x in (layer_used, layer_fresh)]
        torch.testing.assert_close(*y, rtol=0, atol=0)
    after = used.groups[1].read(0, torch.tensor([0, 6, 0, 6]))
    assert all(torch.equal(a, b) for a, b in zip(kept, after, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_the_formula_the_buffers_and_the_forecast(dtype: torch.dtype) -> None:
    """Guards: a buffer that no report counts; a forecast on "meta" that is not what is then allocated."""
    cache, L, G = full(3, n_layer=5, dtype=dtype), 5, 3
    assert cache.nbytes() == full(3, n_layer=5, dtype=dtype, device="meta").nbytes() == {"full": 2 * L * B * G * S * D * dtype.itemsize}
    assert sum(cache.nbytes().values()) == sum(buffer.nbytes for buffer in cache.buffers())


def test_buffers_never_move() -> None:
    """Guards: a buffer that is rebound or grown: a CUDA graph would go on writing the old one."""
    cache, one = full(), torch.ones(B, 1, dtype=torch.bool)
    before = [buffer.data_ptr() for buffer in cache.buffers()]
    for position in range(S):
        cache.layers[0].attend(random(B, 4, 1, D), random(B, 2, 1, D), random(B, 2, 1, D), torch.full((B, 1), position), one)
    cache.reset()
    assert before == [buffer.data_ptr() for buffer in cache.buffers()]


# ---- prefill, through the engine


def prefill(e: Engine, prompt: list[int], *, past: int = 0) -> torch.Tensor:
    """Logits [n, V] of prompt[past:], stored after `past` tokens."""
    ids, tensor = torch.tensor([prompt[past:]]), torch.tensor
    with torch.inference_mode():
        x = e.prefill(ids, tensor([past]), tensor([ids.shape[1]]), tensor([0]), past=past)
        return e.model.logits(x[0])


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("chunk", [1, 3, 7, 19, 512])
def test_prefill_in_chunks_of_any_size(chunk: int, window: int | None) -> None:
    """Guards: a chunk that misses the chunks before it, or a sliding window (shorter than prompt and chunk) cut at a border."""
    prompt, (a, b) = PROMPTS[1], (tiny(window=window), tiny(window=window, prefill_chunk=chunk))
    torch.testing.assert_close(prefill(b, prompt), prefill(a, prompt), rtol=0, atol=1e-5)
    torch.testing.assert_close(read(b, 0, 20), read(a, 0, 20), rtol=0, atol=1e-5)


def test_a_long_prompt_passes_in_shorter_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a chunk's mask over its whole prompt, which would grow with the prompt."""
    monkeypatch.setattr(engine.engine, "PREFILL_MASK", 70 * 150)
    model = random_model(ModelConfig("llama", 97, 48, 2, 4, 2, 12, 64, 160, dtype=torch.float32))
    run_layers, widths = model.run_layers, []
    monkeypatch.setattr(model, "run_layers", lambda x, *rest: widths.append(x.shape[1]) or run_layers(x, *rest))
    prefill(Engine(model, max_seq_len=150), list(range(75)) * 2)
    assert widths == [70, 70, 10] * 2       # for each layer


@pytest.mark.parametrize("window", [None, 5])
def test_prefill_equals_one_token_at_a_time(window: int | None) -> None:
    """Guards: exact attention of the scratch and attention over the cache being two different things."""
    prompt, (a, b) = PROMPTS[1], (tiny(window=window), tiny(window=window))
    steps = []
    for i, token in enumerate(prompt):
        one = torch.tensor([[i]])
        with torch.inference_mode():
            steps.append(b.model(torch.tensor([[token]]), one, torch.ones_like(one, dtype=torch.bool), b.cache, b.rope)[0])
    torch.testing.assert_close(torch.cat(steps), prefill(a, prompt), rtol=0, atol=1e-5)
    torch.testing.assert_close(read(b, 0, 20), read(a, 0, 20), rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("past", [1, 8, 19])
def test_prefill_after_a_stored_past(past: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: the online softmax over blocks of a past, and a commit in pieces; small blocks, so that there are several."""
    for module in (cache.base, cache.prefill):
        monkeypatch.setattr(module, "BLOCK", 4)
    prompt, (a, b) = PROMPTS[1], (tiny(window=window), tiny(window=window, prefill_chunk=5))
    whole = prefill(a, prompt)
    prefill(b, prompt[:past])
    torch.testing.assert_close(prefill(b, prompt, past=past), whole[past:], rtol=0, atol=1e-5)
    torch.testing.assert_close(read(b, 0, 20), read(a, 0, 20), rtol=0, atol=1e-5)


# ---- experts: one result, three forms


@pytest.mark.parametrize("n_active", [1, 2, 4])
def test_expert_forms_agree(n_active: int) -> None:
    """Guards: the form for a prompt, for few rows and for many rows giving different texts; weights not renormalised."""
    config = ModelConfig("mixtral", 97, 12, 1, 2, 2, 6, 20, 64, n_expert=4, n_expert_per_token=n_active)
    moe, x = MixtureOfExperts(config).requires_grad_(False), random(9, 12)
    for seed, parameter in enumerate(moe.parameters()):
        parameter.copy_(random(*parameter.shape, seed=seed) * 0.5)
    expected = torch.zeros_like(x)
    for n, token in enumerate(x):
        probability = (moe.router.weight @ token).softmax(-1)
        chosen = probability.argsort(descending=True)[:n_active]
        for e in chosen:
            gate, up = (moe.w13[e] @ token).chunk(2)
            expected[n] += moe.w2[e] @ (gate * gate.sigmoid() * up) * probability[e] / probability[chosen].sum()
    few = torch.cat([moe(token[None, None]) for token in x])[:, 0]      # 1 row x n_active <= 4 experts
    for form, y in {"prompt": moe(x[None])[0], "few": few, "many": moe(x[:, None])[:, 0]}.items():
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-5, msg=form)
