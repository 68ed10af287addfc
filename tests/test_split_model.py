"""The split cache in time and in a whole model: rows, reuse, capacity, prefill in chunks, chats, and the settings that lose nothing.

What a second turn must equal: its queries see the past as it is stored and their own turn exactly, so it is not what feeding it token
by token would give; but the state is what one commit of the whole stream of K and V leaves, and a cache that loses nothing gives
the full cache's logits. Trap: with a lossy cache near ties may flip between runs, so tokens are compared only where arithmetic is the same.
"""
import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_split import B, S, assert_same, configs, feed, make, members, offline, quick, reference, setting, state, stream
from torch import Tensor

import cache.base
import cache.prefill
import engine.engine
from cache import CacheConfig, GroupPrefill
from cache.full import FullLayer
from engine import Engine, SamplingParams
from weights import load_model

LOSSY = ["window=5,retain=0.1,sinks=2", "preset=paper,retain=0.1", "merge=slerp,window=3,retention=intended,gamma=0.3,retain=0.2",
         "granularity=token,window=0,merge_k=0,retain=0.1"]


# -- groups: rows and time ---------------------------------------------------------------------------------------------------------------
@quick(10)
@given(config=configs(), seed=st.integers(0, 99))
def test_a_row_does_not_depend_on_its_neighbours(config: CacheConfig, seed: int) -> None:
    """Guards: a length, a threshold or a slot shared between rows, `rows` that touch others: prefilled out of order, stepped together."""
    n, length = members(config), torch.tensor([36, 14, 25])
    k, v = stream(n, 40, seed=seed, total=None)
    together = make(config)
    feed(together, k[:, [2, 0]], v[:, [2, 0]], [12, 1, 20, 7], total=length[[2, 0]], rows=torch.tensor([2, 0]))
    feed(together, k[:, [1]], v[:, [1]], [40], total=length[[1]], rows=torch.tensor([1]))
    step = torch.stack([x[:, torch.arange(B), :, length].transpose(0, 1) for x in (k, v)])[:, :, :, :, None]
    q = torch.randn(n, B, 4, 1, 8, generator=torch.Generator().manual_seed(seed))
    y = [together.attend(i, q[i], step[0, i], step[1, i], length[:, None], torch.ones(B, 1, dtype=torch.bool), None) for i in range(n)]
    for b in range(B):
        alone, one = make(config, batch=1), slice(b, b + 1)
        feed(alone, k[:, one], v[:, one], [int(length[b])], total=length[one])
        for i in range(n):
            mine = alone.attend(i, q[i, one], step[0, i, one], step[1, i, one], length[one, None], torch.ones(1, 1, dtype=torch.bool), None)
            torch.testing.assert_close(y[i][one], mine, rtol=1e-5, atol=1e-5)
        assert_same(state(together, length + 1), state(alone, length[one] + 1), rows=[b], other=[0])


@quick(15)
@given(config=configs())
def test_reset_leaves_no_trace(config: CacheConfig) -> None:
    """Guards: a slot that keeps a former sequence's retained tokens, flags, range or overflow; a reset that reaches other rows."""
    n, total = members(config), torch.tensor([40, 22, 30])
    old, new = stream(n, 40, seed=1, total=total), stream(n, 40, seed=2, total=total)
    used, fresh = make(config), make(config)
    feed(used, *old, [40], total=total)
    before = {name: buffer.clone() for name, buffer in used.named_buffers()}
    rows = torch.tensor([2, 0])
    used.reset(rows)
    for name in before.keys() - {"code_rotation", "k_levels", "v_levels"}:
        at = 1 if name[1] == "_" else 0
        assert torch.equal(getattr(used, name).select(at, 1), before[name].select(at, 1)), f"reset touched another row's {name}"
    assert not used.overflow[rows].any()
    feed(used, *(x[:, rows] for x in new), [9] * 5, total=total[rows], rows=rows)
    feed(fresh, *new, [9] * 5, total=total)
    assert_same(state(used, total), state(fresh, total), rows=[0, 2])
    assert torch.equal(used.overflow[rows], fresh.overflow[rows])


@quick(15)
@given(config=configs(), T=st.sampled_from([1, 4]))
def test_a_done_row_stores_nothing(config: CacheConfig, T: int) -> None:
    """Guards: a finished row (valid False) that goes on writing; also one that stands at the capacity, where its position has no column."""
    n, length = members(config), torch.tensor([S, 17, 30])
    k, v = stream(n, S + T, total=None)
    group = make(config)
    feed(group, k, v, [20, 23], total=length)
    before = {name: tensor.clone() for name, tensor in state(group, length).items()}
    overflow = group.overflow.clone()
    for _ in range(3):
        group.commit(100 * k[..., :T, :], -v[..., :T, :], length, torch.zeros(B, dtype=torch.int64))
    after = state(group, length)
    assert all(torch.equal(before[name], after[name]) for name in before) and torch.equal(group.overflow, overflow)


def test_two_thousand_steps_stay_inside_the_buffers() -> None:
    """Guards: ring and column arithmetic over many windows: after 2,000 decode commits the state is that of an offline choice, and columns
    that no token has reached still hold the poison."""
    config, n, end = setting("window=7,retain=0.01,sinks=3,retention=intended,gamma=0.3"), 2, torch.tensor([2000, 1500])
    group = make(config, batch=2, S=2048, D=4)
    for buffer in (group.k_direction, group.v_direction, group.k_magnitude, group.v_magnitude):
        buffer.fill_(777)
    k, v = stream(n, 2000, batch=2, D=4, total=end)
    feed(group, k, v, [1] * 2000, total=end)
    K, V, kept = offline(config, k, v, end, capacity=2048)
    for i in range(n):
        for got, x in zip(group.read(i, end), (K, V), strict=True):
            for b, stop in enumerate(end):
                torch.testing.assert_close(got[b, :, :stop], x[i, b, :, :stop], rtol=1e-5, atol=1e-5)
    assert kept[:, :, 3:1400].any(), "nothing but sinks and the window is exact: the comparison has not seen retention"
    for b, stop in enumerate(end):
        assert (group.k_direction[:, b, :, stop - 7:-1] == 777).all() and (group.v_magnitude[:, b, :, stop - 7:-1] == 777).all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 1e-3)])
@pytest.mark.parametrize("spec", ["merge=slerp", "merge=mean,coef=norm", "merge=max-norm", "merge=optimal", "granularity=token", "group=3"])
def test_identical_layers_are_the_full_cache(spec: str, dtype: torch.dtype, tolerance: float) -> None:
    """Guards: anything but precision that is lost where layers agree: the merged columns alone must give the full cache's attention."""
    config = setting(f"{spec},window=3,retain=0,sinks=0")
    n, length = members(config), torch.tensor([40, 17, 30])
    k, v = (x[:1].expand(n, -1, -1, -1, -1) for x in stream(1, 41, total=None, dtype=dtype))
    group = make(config, dtype=dtype)
    full = FullLayer(0, batch=B, n_kv_head=2, max_seq_len=S, head_dim=8, dtype=dtype, device="cpu", sliding_window=None)
    feed(group, k, v, [23, 17], total=length)
    full.commit(k[:1, ..., :40, :], v[:1, ..., :40, :], torch.zeros(B, dtype=torch.int64), length)
    q = torch.randn(B, 4, 1, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    step = (q, k[0, ..., 40:, :], v[0, ..., 40:, :], length[:, None], torch.ones(B, 1, dtype=torch.bool), None)
    expected = full.attend(0, *step)
    for i in range(n):
        torch.testing.assert_close(group.attend(i, *step), expected, rtol=tolerance, atol=tolerance)


@quick(25)
@given(config=configs(), chunk=st.sampled_from([1, 3, 8]), sliding_window=st.sampled_from([None, 5]))
def test_a_turn_over_a_stored_past(config: CacheConfig, chunk: int, sliding_window: int | None) -> None:
    """Guards: the online softmax of a chat's next turn, in blocks of 8 columns here and in chunks, over ragged pasts, one of them empty."""
    n, P, rows, length = members(config), 8, torch.tensor([2, 0, 1]), torch.tensor([31, 0, 20])
    k, v = stream(n, 40, total=None)
    group = make(config, sliding_window=sliding_window)
    feed(group, k, v, [31], total=length)
    new_k, new_v = (torch.stack([x[:, b, :, length[b]:length[b] + P] for b in rows.tolist()], 1) for x in (k, v))
    n_new = torch.tensor([8, 3, 5])
    input_pos, valid = length[rows, None] + torch.arange(P), torch.arange(P) < n_new[:, None]
    q = torch.randn(n, B, 4, P, 8, generator=torch.Generator().manual_seed(1))
    expected = [reference(group, i, q[i], new_k[i], new_v[i], input_pos, valid, rows, length) for i in range(n)]
    prefill, got = GroupPrefill(group, P, past=31), [[] for _ in range(n)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache.base, "BLOCK", 8)
        for start in range(0, P, chunk):
            at = slice(start, start + chunk)
            for i in range(n):
                step = (x[i, :, :, at] for x in (q, new_k, new_v))
                got[i].append(prefill.layers[i].attend(*step, input_pos[:, at], valid[:, at], rows))
    for i in range(n):
        y = torch.cat(got[i], 2)
        torch.testing.assert_close(y.masked_fill(~valid[:, None, :, None], 0), expected[i].masked_fill(~valid[:, None, :, None], 0),
                                   rtol=1e-5, atol=1e-5)
    prefill.commit(length[rows], n_new, rows)
    after = length.index_add(0, rows, n_new)
    whole = make(config)
    feed(whole, k, v, [40], total=after)
    assert_same(state(group, after), state(whole, after))


# -- whole models ------------------------------------------------------------------------------------------------------------------------
def build(model, spec: str, *, rows: int = 2, capacity: int = 64, chunk: int = 512) -> Engine:
    return Engine(model, max_batch_size=rows, max_seq_len=capacity, cache=CacheConfig.parse(spec), prefill_chunk=chunk)


@torch.inference_mode()
def logits(e: Engine, ids: Tensor, lengths: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Teacher-forced on ids [B, P + steps]: prompt logits [B, P, V] (zero past a row's length) and those of the steps [B, steps, V]."""
    e.cache.reset()
    P, rows = int(lengths.max()), torch.arange(len(ids))
    x = e.prefill(ids[:, :P], torch.zeros_like(lengths), lengths, rows, past=0)
    prompt = e.model.logits(x) * (torch.arange(P) < lengths[:, None])[..., None]
    alive = torch.ones(len(ids), dtype=torch.bool)
    return prompt, torch.stack([e.step.logits(ids[rows, lengths + s], lengths + s, alive) for s in range(steps)], 1)


def generate(e: Engine, prompts: list[list[int]], new: int, *, reuse: bool = False) -> list[list[int]]:
    out: list[list[int]] = [[] for _ in prompts]
    for step in e.generate(prompts, SamplingParams(max_new_tokens=new), reuse=reuse):
        for index, token in step.tokens:
            out[index].append(token)
    return out


def random_ids(model, *shape: int) -> Tensor:
    return torch.randint(3, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["llama", "llama-mha", "mistral-window", "phi3-window", "mixtral"])
@pytest.mark.parametrize("spec", ["merge_from=1,retain=1.0,window=0", "merge_from=0,group=3,retain=1.0,window=7", "merge_from=1,window=64"])
def test_a_cache_that_loses_nothing_is_the_full_cache(name: str, spec: str, tiny_checkpoint) -> None:
    """Guards: every path of every family but the loss itself, GQA, MHA, head_dim 96 and windows shorter than the prompt among them."""
    model = load_model(tiny_checkpoint(name), dtype=torch.float32)
    ids, lengths = random_ids(model, 2, 64), torch.tensor([40, 13])
    expected = logits(build(model, "full"), ids, lengths, 23)
    got = logits(build(model, f"minicache,{spec}", chunk=16), ids, lengths, 23)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
@pytest.mark.parametrize("spec", LOSSY)
def test_chunks_do_not_change_a_prompt(name: str, spec: str, tiny_checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: attention of a prompt is exact, a group commits once: at any chunk size logits are the full cache's, the state is one."""
    monkeypatch.setattr(cache.prefill, "BLOCK", 8)          # the commit of a prompt comes in pieces, too: 16, 16 and 5 tokens here
    model = load_model(tiny_checkpoint(name), dtype=torch.float32)
    ids, lengths, stored = random_ids(model, 2, 40), torch.tensor([37, 12]), []
    expected, _ = logits(build(model, "full"), ids, lengths, 1)
    for chunk in (1, 7, 512):
        e = build(model, f"minicache,merge_from=1,{spec}", chunk=chunk)
        prompt, _ = logits(e, ids, lengths, 1)
        torch.testing.assert_close(prompt, expected, rtol=0, atol=1e-4)
        stored.append(torch.stack([x for i in range(2) for x in e.cache.groups[-1].read(i, lengths + 1)]))
    for other in stored[1:]:
        torch.testing.assert_close(other, stored[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("spec", LOSSY)
def test_refilled_rows_and_neighbours_do_not_matter(spec: str, tiny_checkpoint) -> None:
    """Guards: five prompts through two rows, refilled while the other runs, against each alone; to the last column of the capacity."""
    model = load_model(tiny_checkpoint("llama"), dtype=torch.float32)
    prompts = [random_ids(model, 40)[:n].tolist() for n in (40, 3, 22, 9, 31)]
    e, alone = (build(model, f"minicache,merge_from=1,{spec}", rows=rows, capacity=53) for rows in (2, 1))
    got = generate(e, prompts, 30)
    assert got == [generate(alone, [p], 30)[0] for p in prompts]
    assert [len(tokens) for tokens in got] == [14, 30, 30, 30, 23]


@pytest.mark.parametrize("spec", LOSSY)
def test_a_chat_leaves_the_state_of_one_commit(spec: str, tiny_checkpoint) -> None:
    """Guards: tokens lost, doubled or reordered between prefill, steps and a next turn.

    All K and V that were committed, in one piece into a fresh group, leave the same state; as many as the ids that the engine calls stored.
    """
    e = build(load_model(tiny_checkpoint("llama"), dtype=torch.float32), f"minicache,merge_from=1,{spec}", rows=1)
    group, pieces = e.cache.groups[-1], []
    plain = group.commit

    def record(k: Tensor, v: Tensor, length: Tensor, n_new: Tensor, rows: Tensor | None = None) -> None:
        n = int(n_new[0])
        assert int(length[0]) == sum(p[0].shape[3] for p in pieces), "a hole or an overlap in the stream"
        pieces.append((k[:, :1, :, :n].clone(), v[:, :1, :, :n].clone()))
        plain(k, v, length, n_new, rows)

    group.commit = record
    history = random_ids(e.model, 25).tolist()
    for turn in ([], [7, 8, 9], [5] * 11):
        history += turn
        history += generate(e, [history], 6, reuse=True)[0]
    assert e.stored[0] == history[:-1]
    k, v = (torch.cat(x, 3) for x in zip(*pieces, strict=True))
    length = torch.tensor([k.shape[3]])
    assert int(length) == len(history) - 1
    again = build(e.model, f"minicache,merge_from=1,{spec}", rows=1).cache.groups[-1]
    again.commit(k, v, torch.zeros(1, dtype=torch.int64), length)
    assert_same(state(group, length), state(again, length))


def test_a_chat_that_loses_nothing_is_one_prompt(tiny_checkpoint) -> None:
    """Guards: positions and masks of a second turn in a model: with all tokens retained, reuse gives the full cache's fresh answer."""
    model = load_model(tiny_checkpoint("llama"), dtype=torch.float32)
    chat, full = build(model, "minicache,merge_from=1,retain=1.0,window=5", rows=1, chunk=4), build(model, "full", rows=1)
    history = random_ids(model, 25).tolist()
    for turn in ([], [7, 8, 9], [5] * 11):
        history += turn
        reply = generate(chat, [history], 6, reuse=True)[0]
        assert reply == generate(full, [history], 6)[0]
        history += reply


def test_one_group_of_exact_keys_at_a_time(tiny_checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: the peak of a long prompt. With the garbage collector off, a group's exact K and V are gone before the next group commits."""
    model, alive, refs = load_model(tiny_checkpoint("llama"), dtype=torch.float32), [], []

    class Watched(GroupPrefill):
        def commit(self, length: Tensor, n_new: Tensor, rows: Tensor | None) -> None:
            refs.extend(weakref.ref(x) for x in (self.k, self.v))
            alive.append(sum(ref() is not None for ref in refs))
            super().commit(length, n_new, rows)

    monkeypatch.setattr(engine.engine, "GroupPrefill", Watched)
    gc.collect()
    gc.disable()
    try:
        ids = random_ids(model, 2, 40)
        logits(build(model, "minicache,merge_from=1", chunk=8), ids, torch.tensor([37, 12]), 1)
        alive.append(sum(ref() is not None for ref in refs))
    finally:
        gc.enable()
    assert alive == [2, 2, 0], "K and V by group, then after the prompt"


def test_decode_does_not_grow(tiny_checkpoint) -> None:
    """Guards: anything kept per step (a list of chunks, a rebound buffer): bytes of all live tensors after 4 steps and 60 later."""
    e = build(load_model(tiny_checkpoint("llama"), dtype=torch.float32), "minicache,merge_from=1,window=5,retain=0.1", capacity=80)
    addresses, sizes = {name: b.data_ptr() for name, b in e.step.named_buffers()}, []
    for i, _ in enumerate(e.generate(random_ids(e.model, 2, 9).tolist(), SamplingParams(max_new_tokens=68))):
        if i in (4, 64):
            gc.collect()
            storages = [t.untyped_storage() for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter)]    # no fake ones
            sizes.append(sum({s.data_ptr(): s.nbytes() for s in storages}.values()))
            del storages
    assert len(sizes) == 2 and sizes[0] == sizes[1]
    assert addresses == {name: b.data_ptr() for name, b in e.step.named_buffers()}
