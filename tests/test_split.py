"""The split layout against a plain offline model of it: what is stored, what attention sees, what time and neighbours may not change.

`offline` decides from the whole stream at once, with Python loops, what a token looks like after it was stored; `reference` is SDPA over
`read()`. Trap: padding after a row's end is poisoned (opposed layers, a hundred times longer), so counting it once would show everywhere.
"""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cache import CacheConfig, build_cache
from cache.base import LayerGroup
from cache.merge import distance, merge

INF = float("inf")
B, S = 3, 43
TOTAL = torch.tensor([40, 17, 30])      # tokens by row
CUTS = ([40], [8] * 5, [1] * 40, [3, 1, 1, 30, 5])


def setting(spec: str) -> CacheConfig:
    return CacheConfig.parse(spec if spec.startswith("quant") else f"minicache,merge_from=0,{spec}")


def members(config: CacheConfig) -> int:
    return config.group if config.kind == "minicache" else 1


def make(config: CacheConfig, *, batch: int = B, G: int = 2, S: int = S, D: int = 8, dtype: torch.dtype = torch.float32,
         sliding_window: int | None = None) -> LayerGroup:
    return build_cache(config, n_layer=members(config), n_kv_head=G, head_dim=D, batch=batch, max_seq_len=S, dtype=dtype, device="cpu",
                       sliding_window=sliding_window).groups[0]


def stream(n: int, T: int, *, seed: int = 0, batch: int = B, G: int = 2, D: int = 8, total: Tensor | None = TOTAL,
           dtype: torch.dtype = torch.float32, right_angles: bool = False) -> tuple[Tensor, Tensor]:
    """K, V [n, B, G, T, D]: layers from alike to independent, ties at distance 0 and (odd seeds) 1, poison after a row's `total` tokens.

    right_angles: every other token stands at distance 1/2, so that most choices are ties.
    """
    g = torch.Generator().manual_seed(seed)
    mix = torch.rand(2, 1, batch, G, T, 1, generator=g)
    x = mix * torch.randn(2, 1, batch, G, T, D, generator=g) + (1 - mix) * torch.randn(2, n, batch, G, T, D, generator=g)
    x[..., ::5, :] = x[:, :1, ..., ::5, :]                          # identical layers: distance 0, several times
    if right_angles:
        x[..., ::2, :] = torch.eye(D)[torch.arange(n) % 2][:, None, None, None]
    if seed % 2:
        x[:, 1:, ..., 3::6, :] = -x[:, :1, ..., 3::6, :]            # opposed layers: distance 1, several times
    if total is not None:
        sign = torch.tensor([1.0, -1.0] * n)[:n, None, None, None]
        for b, end in enumerate(total):
            x[:, :, b, :, end:] = 100 * sign
    return x[0].to(dtype), x[1].to(dtype)


def feed(group: LayerGroup, k: Tensor, v: Tensor, cuts: list[int], *, total: Tensor = TOTAL, rows: Tensor | None = None) -> None:
    """Commit the first total [B'] tokens of each row in pieces."""
    at = 0
    for t in cuts:
        group.commit(k[..., at:at + t, :], v[..., at:at + t, :], total.clamp_max(at), (total - at).clamp(0, t), rows)
        at += t


def state(group: LayerGroup, length: Tensor) -> dict[str, Tensor]:
    """What the rows hold, canonical: retained slots by position, zero where nothing is stored; without the spare column and `overflow`."""
    N, W = group.k_magnitude.shape[3], group.W
    stored = ((torch.arange(N) < (length - W)[:, None]) & (torch.arange(N) < N - 1))[:, None]
    ring = (group.ring_pos(length) >= 0)[:, None] if W else torch.zeros(len(length), 1, 0, dtype=torch.bool)
    filled = group.retained_score > -INF
    order = torch.where(filled, group.retained_pos, S + N).argsort(-1)
    filled = filled.gather(-1, order)
    out = {"range": group.score_range, "pos": group.retained_pos.gather(-1, order) * filled,
           "score": group.retained_score.gather(-1, order).masked_fill(~filled, 0)}
    if group.R:
        out["exact"] = group.exact & stored
    for x in "kv":
        out[f"{x}_direction"] = getattr(group, f"{x}_direction") * stored[..., None]
        out[f"{x}_magnitude"] = getattr(group, f"{x}_magnitude") * stored
        out[f"{x}_window"] = getattr(group, f"{x}_window") * ring[..., None]
        retained = getattr(group, f"{x}_retained")
        out[f"{x}_retained"] = retained.gather(3, order[None, ..., None].expand(retained.shape)) * filled[..., None]
    return {name: tensor.transpose(0, 1) if name[1] == "_" else tensor for name, tensor in out.items()}       # rows first, all of them


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], *, rows: list[int] | slice = slice(None),
                other: list[int] | None = None) -> None:
    """States `a` and `b` agree in these rows (`other`: those of b)."""
    for name in a:
        mine, yours = a[name][rows], b[name][rows if other is None else other]
        torch.testing.assert_close(mine, yours, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def offline(config: CacheConfig, k: Tensor, v: Tensor, length: Tensor, capacity: int = S) -> tuple[Tensor, Tensor, Tensor]:
    """The stored tokens as attention should see them: K, V [n, B, G, T, D] fp32 and which of them are retained and count [B, G, T]."""
    n, rows, G, T, D = k.shape
    restored, distances = [], []
    for x, merged in ((k.float(), config.merge_k), (v.float(), config.merge_v)):
        if n == 1 or not merged:
            restored.append(x)
            continue
        whole = x.transpose(2, 3).reshape(n, rows, 1, T, G * D) if config.granularity == "token" else x
        direction, coefficient = merge(whole, config.merge, t=config.t, coef=config.coef)
        y = coefficient[..., None] * direction
        restored.append(y if whole is x else y.reshape(n, rows, T, G, D).transpose(2, 3))
        distances.append(distance(whole).expand(rows, G, T))
    score = sum(distances) / len(distances) if distances else torch.zeros(rows, G, T)
    score = -score if config.retention == "literal" else score
    kept = torch.zeros(rows, G, T, dtype=torch.bool)
    for b in range(rows):
        merged_tokens = range(max(int(length[b]) - min(config.window, capacity), 0))
        for g in range(G):
            s = score[b, g]
            chosen = list(merged_tokens)[:config.sinks]
            others = list(merged_tokens)[config.sinks:]
            if n > 1 and others:
                most, least = s[others].amax(), s[others].amin()
                threshold = -INF if config.retention == "topk" else most - config.gamma * (most - least)
                ranked = sorted(others, key=lambda p, s=s: (-float(s[p]), p))[:config.retained_slots(n, capacity) - len(chosen)]
                chosen += [p for p in ranked if s[p] > threshold]
            kept[b, g, chosen] = True
    window = (torch.arange(T) >= (length - config.window)[:, None])[:, None].expand(rows, G, T)
    exact = (kept | window)[..., None]
    K, V = (torch.where(exact, x.float(), y) for x, y in zip((k, v), restored, strict=True))
    return K, V, kept


def reference(group: LayerGroup, index: int, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, valid: Tensor, rows: Tensor,
              length: Tensor) -> Tensor:
    """SDPA in fp32 over what `read` restores and the new tokens, masked by position alone."""
    K, V = (torch.cat((x[rows].float(), new.float()), 2) for x, new in zip(group.read(index, length), (k, v), strict=True))
    column = torch.arange(group.max_seq_len)
    pos = torch.cat((column.expand(len(rows), -1), input_pos), 1)[:, None]
    there = torch.cat((column < length[rows, None], valid), 1)[:, None]
    mask = there & (pos <= input_pos[..., None])
    if group.sliding_window:
        mask = mask & (pos > input_pos[..., None] - group.sliding_window)
    K, V = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (K, V))
    return F.scaled_dot_product_attention(q.float(), K, V, attn_mask=mask[:, None])


@st.composite
def configs(draw: st.DrawFn) -> CacheConfig:
    """Every setting that the split layout has, n = 1, 2, 3."""
    n = draw(st.sampled_from([1, 2, 2, 3]))
    stored = dict(window=draw(st.sampled_from([0, 1, 5, 16])), sinks=draw(st.sampled_from([0, 1, 4])),
                  attend_form=draw(st.sampled_from(["reference", "auto"])))
    if n == 1:
        return CacheConfig("quant", **stored)
    rule = draw(st.sampled_from(["slerp", "mean", "max-norm", "optimal"] if n == 2 else ["mean", "max-norm", "optimal"]))
    merge_k, merge_v = draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    retention = draw(st.sampled_from(["topk", "intended", "literal"]))
    return CacheConfig("minicache", merge_from=0, group=n, merge=rule, coef=draw(st.sampled_from(["norm", "projection"])), merge_k=merge_k,
                       merge_v=merge_v, granularity=draw(st.sampled_from(["head", "token"])), gamma=draw(st.sampled_from([0.05, 0.3])),
                       retention=retention, retain=draw(st.sampled_from([0.0, 0.1, 0.3])), **stored)


def quick(examples: int) -> settings:
    return settings(deadline=None, max_examples=examples, derandomize=True)


@quick(50)
@given(config=configs(), seed=st.integers(0, 99), T=st.sampled_from([1, 7]), heads=st.sampled_from([(4, 2), (2, 2), (3, 1)]),
       D=st.sampled_from([8, 64, 96, 128]), dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
       sliding_window=st.sampled_from([None, None, 9]), rows=st.sampled_from([None, [2, 0]]))
def test_attend_is_sdpa_over_read(config: CacheConfig, seed: int, T: int, heads: tuple[int, int], D: int, dtype: torch.dtype,
                                  sliding_window: int | None, rows: list[int] | None) -> None:
    """Guards: attention on the split form, for every setting; a decode step (T = 1) and a block over a stored past; and its commit.

    Ragged rows, one of them done; `rows` out of order. fp32 to 1e-5, bf16 to half a unit of its last place.
    """
    n, (H, G) = members(config), heads
    group = make(config, G=G, D=D, dtype=dtype, sliding_window=sliding_window)
    length, n_new = torch.tensor([30, 3, 20]), torch.tensor([T, 0 if T == 1 else 3, T])
    k, v = stream(n, 40, seed=seed, G=G, D=D, total=length + n_new, dtype=dtype)
    feed(group, k, v, [13, 1, 16], total=length)
    at = torch.arange(B) if rows is None else torch.tensor(rows)
    input_pos, valid = length[at, None] + torch.arange(T), torch.arange(T) < n_new[at, None]
    q = torch.randn(n, len(at), H, T, D, generator=torch.Generator().manual_seed(seed)).to(dtype)
    new_k, new_v = (torch.stack([x[:, b, :, length[b]:length[b] + T] for b in at.tolist()], 1) for x in (k, v))
    for i in range(n):
        expected = reference(group, i, q[i], new_k[i], new_v[i], input_pos, valid, at, length)
        y = group.attend(i, q[i], new_k[i], new_v[i], input_pos, valid, None if rows is None else at)
        assert y.dtype == dtype and y.isfinite().all()
        step = 1e-5 if dtype == torch.float32 else 1e-5 + 2 ** -8 * expected.abs()
        wrong = ((y.float() - expected).abs() > step).any(-1) & valid[:, None]
        assert not wrong.any(), f"member {i}: {(y.float() - expected)[wrong].abs().max()}"
    after = length.index_add(0, at, n_new[at])
    K, V, _ = offline(config, k, v, after)
    for i in range(n if dtype == torch.float32 else 0):
        for got, x in zip(group.read(i, after), (K, V), strict=True):
            seen = (torch.arange(40) < after[:, None])[:, None, :, None]
            torch.testing.assert_close(got[:, :, :40], x[i] * seen, rtol=1e-5, atol=1e-5)


@quick(15)
@given(config=configs(), seed=st.integers(0, 99), cuts=st.lists(st.integers(1, 9), min_size=1, max_size=30))
def test_commit_is_associative(config: CacheConfig, seed: int, cuts: list[int]) -> None:
    """Guards: a schedule that shows in the state. One piece, 5 x 8, 40 x 1, any other cut of ragged rows, ties included: one state."""
    k, v = stream(members(config), 40, seed=seed)
    states = []
    for pieces in (*CUTS, cuts + [1] * 40):
        group, left = make(config), 40
        feed(group, k, v, [left - (left := max(left - t, 0)) for t in pieces if left])
        states.append(state(group, TOTAL))
    for other in states[1:]:
        assert_same(states[0], other)


@pytest.mark.parametrize("retention", ["topk", "literal"])
@pytest.mark.parametrize("granularity", ["head", "token"])
def test_equally_far_tokens_are_kept_by_position(retention: str, granularity: str) -> None:
    """Guards: ties settled by slot, by sort or by the last bit of a distance (fp32 atan2 rounds by a token's place in its chunk).

    Of equally far tokens the earlier ones are kept, however they came.
    """
    config, states = setting(f"retention={retention},granularity={granularity},retain=0.3,sinks=1,window=0"), []
    k, v = stream(2, 40, right_angles=True)
    for cuts in (*CUTS, [1] * 20 + [17, 3], [17] + [1] * 10 + [13]):
        group = make(config)
        feed(group, k, v, cuts)
        states.append(state(group, TOTAL))
    for other in states[1:]:
        assert_same(states[0], other)


@quick(40)
@given(config=configs(), seed=st.integers(0, 99), cuts=st.sampled_from(CUTS))
def test_what_is_retained_is_what_an_offline_choice_keeps(config: CacheConfig, seed: int, cuts: list[int]) -> None:
    """Guards: the streaming choice, the paper's threshold on the running range, `literal` the other way round, sinks, padding.

    A retained token is bit-equal for K and V at every layer, and its merged column is masked: nothing counts twice.
    """
    n, group = members(config), make(config)
    k, v = stream(n, 40, seed=seed)
    feed(group, k, v, cuts)
    _, _, kept = offline(config, k, v, TOTAL)
    active = group.active()
    got = torch.zeros(B, 2, 40, dtype=torch.bool)
    for b, g, r in active.nonzero().tolist():
        p = int(group.retained_pos[b, g, r])
        assert not got[b, g, p], "one token in two slots"
        got[b, g, p] = True
        assert torch.equal(group.k_retained[:, b, g, r], k[:, b, g, p]) and torch.equal(group.v_retained[:, b, g, r], v[:, b, g, p])
    assert torch.equal(got, kept)
    if group.R:
        merged = torch.arange(group.exact.shape[2]) < (TOTAL - group.W)[:, None]
        assert torch.equal((group.exact & merged[:, None])[..., :40], kept[..., :group.exact.shape[2]])
    if config.granularity == "token" and n > 1:
        assert torch.equal(kept[:, 0], kept[:, 1])


def test_sinks_are_kept_and_stay_out_of_the_range() -> None:
    """Guards: first tokens, which differ most in real models, setting a threshold that nothing else passes."""
    config = setting("retention=intended,gamma=0.5,retain=0.2,sinks=2,window=0")
    k, v = stream(2, 20, batch=1, total=None)
    k[1, :, :, :2], v[1, :, :, :2] = -k[0, :, :, :2], -v[0, :, :, :2]
    group = make(config, batch=1)
    feed(group, k, v, [1] * 20, total=torch.tensor([20]))
    assert (group.score_range[..., 1] < 0.9).all(), "the sinks stand at distance 1"
    assert group.exact[:, :, :2].all() and group.exact[:, :, 2:20].any()


@pytest.mark.parametrize("retention", ["intended", "literal", "topk"])
def test_overflow_counts_as_a_plain_loop_does(retention: str) -> None:
    """Guards: the counter of --stats: tokens past the threshold of their time that found no slot, or lost it to a farther one."""
    config = setting(f"retention={retention},gamma=0.4,retain=0.1,sinks=2,window=3")
    k, v = stream(2, 40)
    group, prompt = make(config), make(config)
    feed(group, k, v, [1] * 40)
    feed(prompt, k, v, [40] if prompt.form == "cpp" else [1] * 40)
    score = (distance(k) + distance(v)) / 2 * (-1 if retention == "literal" else 1)
    for b in range(B):
        for g in range(2):
            kept, count = [], 0
            for p in range(2, int(TOTAL[b]) - 3):
                seen = score[b, g, 2:p + 1]
                threshold = seen.amax() - 0.4 * (seen.amax() - seen.amin())
                kept = sorted([*kept, p], key=lambda p, s=score[b, g]: (-float(s[p]), p))
                count += sum(float(score[b, g, lost] > threshold) for lost in kept[group.R - 2:])
                kept = kept[:group.R - 2]
            assert int(group.overflow[b, g]) == int(prompt.overflow[b, g]) == (0 if retention == "topk" else count)
    assert retention == "topk" or (group.overflow > 0).any()
