"""Alignment: folding leaves the model as it is, the fit finds what is there, the files are held to what they say."""
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cache import CacheConfig
from engine.compare import forced_logits
from engine.engine import Engine
from engine.measure import merge_loss
from engine.measure.align import fit, head_order
from engine.measure.merge_loss import Group, States
from model import ModelConfig
from weights import EMBEDDED, Alignment, align, aligned, find_alignment, load_model
from weights.alignment import LayerMap, change, fold, read_alignment, write_alignment
from weights.checkpoint import ALIGNMENT

FAMILIES = ("llama", "llama-mha", "llama-wide-head", "llama3-tied", "mistral-window", "phi3-long", "mixtral")


def random_maps(c: ModelConfig, layers: range, *, seed: int = 0, stretch: float = 2.0) -> dict[int, LayerMap]:
    """Any order of heads, any phases, V's maps with stretches between 1 / stretch and stretch (1: orthogonal)."""
    g = torch.Generator().manual_seed(seed)
    G, D, maps = c.n_kv_head, c.head_dim, {}
    for layer in layers:
        u, _, v = torch.linalg.svd(torch.randn(G, D, D, generator=g))
        s = stretch ** (2 * torch.rand(2, G, D, generator=g) - 1)
        k = torch.polar(s[0, :, :D // 2].contiguous(), 6.3 * torch.rand(G, D // 2, generator=g))
        maps[layer] = LayerMap(torch.randperm(G, generator=g), k, u * s[1, :, None] @ v)
    return maps


@torch.inference_mode()
def full_logits(model: torch.nn.Module) -> torch.Tensor:
    engine = Engine(model, max_batch_size=2, max_seq_len=40)
    ids = torch.randint(3, model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    zero = torch.zeros(2, dtype=torch.long)
    return model.logits(engine.prefill(ids, zero, zero + 40, torch.arange(2), past=0))


@pytest.mark.parametrize("name", FAMILIES)
def test_folding_leaves_the_logits(name: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    """Guards the change of coordinates: a query head left behind, a phase that RoPE does not commute with, an inverse on the wrong side."""
    model = load_model(tiny_checkpoint(name), dtype=torch.float32)
    before, weights = full_logits(model), model.layers[1].attention.wqkv.weight.clone()
    fold(model, random_maps(model.config, range(model.config.n_layer)))
    assert (full_logits(model) - before).abs().max() < 1e-4
    assert (model.layers[1].attention.wqkv.weight - weights).abs().max() > .1


def test_bf16_folding_stays_in_its_noise(tiny_checkpoint: Callable[[str], Path]) -> None:
    """Guards the rounding: folded in fp64 and rounded once, a bf16 model moves no further from fp32 than bf16 itself, within a factor."""
    exact = full_logits(load_model(tiny_checkpoint("llama"), dtype=torch.float32))
    model = load_model(tiny_checkpoint("llama"), dtype=torch.bfloat16)
    noise = (full_logits(model) - exact).square().mean().sqrt()
    fold(model, random_maps(model.config, range(3)))
    assert (full_logits(model) - exact).square().mean().sqrt() < 3 * noise


def test_only_what_is_merged_is_folded_and_all_comes_back(tiny_checkpoint: Callable[[str], Path]) -> None:
    """Guards layers that a cache stores one by one, K where only V is merged, and the weights after `aligned`: bit for bit."""
    model = load_model(tiny_checkpoint("llama"), dtype=torch.float32)
    c = model.config
    H, G, D = c.n_head, c.n_kv_head, c.head_dim
    maps = {i: replace(m, order=torch.arange(G)) for i, m in random_maps(c, range(1, 3)).items()}
    before = {name: p.clone() for name, p in model.named_parameters()}
    with aligned(model, Alignment(((1, 2),), maps), CacheConfig.parse("minicache,merge_from=1,merge_k=0")):
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert changed == {f"layers.{i}.attention.{x}.weight" for i in (1, 2) for x in ("wqkv", "wo")}
        wq, wk, wv = (model.layers[1].attention.wqkv.weight - before["layers.1.attention.wqkv.weight"]).split([H * D, G * D, G * D])
        assert wq.abs().max() == wk.abs().max() == 0 < wv.abs().max()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_lent_prompt_equals_a_folded_model(tiny_checkpoint: Callable[[str], Path]) -> None:
    """Guards the quality bench: prompts computed by the unaligned model and turned are what the aligned model computes."""
    model, cache = load_model(tiny_checkpoint("llama"), dtype=torch.float32), CacheConfig.parse("minicache,merge_from=1,retain=0.1")
    alignment = Alignment(((1, 2),), random_maps(model.config, range(1, 3)))
    prompts, targets = [list(range(5, 45)), list(range(50, 90))], [list(range(20, 28))] * 2
    full = Engine(model, max_batch_size=2, max_seq_len=48)
    list(forced_logits(full, prompts, targets))
    with aligned(model, alignment, cache) as maps:
        engine = Engine(model, max_batch_size=2, max_seq_len=48, cache=cache)
        own = list(forced_logits(engine, prompts, targets))[1:]
        lent = list(forced_logits(engine, prompts, targets, exact=full.cache, maps=maps))
    assert max((a - b).abs().max() for a, b in zip(own, lent, strict=True)) < 1e-4


@given(st.integers(0, 1000), st.sampled_from(("k", "v")))
def test_a_map_and_its_inverse(seed: int, x: str) -> None:
    """Property: K's and V's changes of coordinates undo each other, and K's keep q . k when the query takes 1 / conj."""
    c = ModelConfig.from_checkpoint(EMBEDDED)
    m = getattr(random_maps(c, range(1), seed=seed)[0], x)
    y = torch.randn(2, c.n_kv_head, 5, c.head_dim, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(change(change(y, m), 1 / m if x == "k" else torch.linalg.inv(m)), y, atol=1e-4)
    if x == "k":
        assert torch.allclose((change(y, m) * change(y.flip(2), 1 / m.conj())).sum(-1), (y * y.flip(2)).sum(-1), atol=1e-3)


def made_states(*, hidden: bool, windows: int = 8) -> list[States]:
    """Two layers, 3 kv heads of 8, 6 query heads; hidden: the second holds the first's K and V in other coordinates and another order."""
    g = torch.Generator().manual_seed(3)
    N, G, T, D = windows, 3, 40, 8
    first, other = (States(torch.randn(N, 2 * G, T, D, generator=g), *torch.randn(2, N, G, T, D, generator=g),
                           torch.randn(16, 2 * G, D, generator=g)) for _ in range(2))
    if hidden:
        order = torch.tensor([2, 0, 1])
        phase = torch.polar(torch.ones(G, D // 2), 6 * torch.rand(G, D // 2, generator=g))
        other.k = 1.5 * change(first.k, phase)[:, order]
        other.v = (first.v @ torch.linalg.qr(torch.randn(G, D, D, generator=g))[0])[:, order]
    return [first, other]


def test_the_closed_form_finds_hidden_coordinates() -> None:
    """Guards order, phases and rotations: a layer that is another in disguise merges without loss, and is not seen to before."""
    states, cache = made_states(hidden=True), CacheConfig.parse("minicache,window=2,sinks=1")
    assert head_order(*states).tolist() == [1, 2, 0]
    maps, row = fit((4, 5), states, cache, None, steps=0, invertible=False)
    assert row["order"] == "0,1,2 1,2,0" and min(row["k_before"], row["v_before"]) > .08
    assert row["k_after"] < .15 * row["k_before"] and row["v_after"] < .15 * row["v_before"]        # what is left is the codes' noise
    assert (torch.linalg.svdvals(maps[5].v) - 1).abs().max() < 1e-4 and (maps[5].k.abs() - 1).abs().max() < 1e-4


def test_refining_lowers_the_loss_and_keeps_its_kind() -> None:
    """Guards the fit: from the checkpoint's own coordinates on, less loss on windows it has not seen; orthogonal where asked for."""
    first, other = made_states(hidden=True)
    order = torch.tensor([1, 2, 0])
    group = Group([first, other.in_order(order)], CacheConfig.parse("minicache,window=2,sinks=1"), None)
    for x in "kv":
        start = group.own[x]
        for invertible in (False, True):
            maps = group.refine(x, start, steps=60, invertible=invertible)
            assert group.judge(x, maps) < .9 * group.judge(x, start)
            s = maps.abs() if x == "k" else torch.linalg.svdvals(maps)
            assert ((s - 1).abs().max() < 1e-4) == (not invertible)


def test_a_fit_never_loses_to_the_checkpoints_own_coordinates() -> None:
    """Guards the last choice: with no steps, whatever the closed form does, nothing is stored that the judging windows like less."""
    for seed in range(3):
        states = made_states(hidden=False)
        states[1].v = states[1].v.roll(seed, 0)
        _, row = fit((0, 1), states, CacheConfig.parse("minicache,window=0,sinks=0"), None, steps=0, invertible=True)
        assert row["k_after"] + row["v_after"] <= row["k_before"] + row["v_before"] + 1e-9


@pytest.fixture
def stored(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> tuple[Path, ModelConfig]:
    config = ModelConfig.from_checkpoint(tiny_checkpoint("llama"))
    write_alignment(tmp_path / "a.safetensors", Alignment(((1, 2),), random_maps(config, range(1, 3))), kind="invertible")
    return tmp_path / "a.safetensors", config


def test_a_file_comes_back(stored: tuple[Path, ModelConfig]) -> None:
    path, config = stored
    maps, read = random_maps(config, range(1, 3)), read_alignment(path, config)
    assert read.groups == ((1, 2),)
    assert all(torch.equal(getattr(read.layers[i], x), getattr(maps[i], x)) for i in maps for x in ("order", "k", "v"))


BAD = {
    "not orthogonal": (lambda t, m: m.update(map="orthogonal"), "not orthogonal"),
    "near singular": (lambda t, m: t.update({"1.v": t["1.v"] * torch.logspace(0, 3, 16)[:, None]}), "condition number|stretches"),
    "not finite": (lambda t, m: t["2.k"].fill_(float("nan")), "not finite"),
    "huge": (lambda t, m: t["2.v"].mul_(1e30), "stretches by more than 64"),
    "a head of zeros": (lambda t, m: t["1.v"][1].zero_(), "shrinks to 0"),
    "K of zeros": (lambda t, m: t["1.k"].zero_(), "shrinks to 0"),
    "no groups": (lambda t, m: m.update(groups="[]"), "not lists of layers"),
    "groups missing": (lambda t, m: m.pop("groups"), "None are not lists"),
    "many groups": (lambda t, m: m.update(groups=str([[0, 1]] * 9999)), r"\[\[0, 1\], .{0,80} are not disjoint"),
    "no order": (lambda t, m: t["1.order"].fill_(0), "not an order of 2 kv heads"),
    "another model": (lambda t, m: t.update({"1.v": torch.eye(8).expand(2, 8, 8).contiguous()}), r"\[2, 8, 8\], the model wants"),
    "layer missing": (lambda t, m: t.pop("2.v"), "not those of its groups"),
    "layers beyond": (lambda t, m: m.update(groups="[[1, 7]]"), "the model layers 0 to 2"),
    "one layer twice": (lambda t, m: m.update(groups="[[1, 2], [2, 1]]"), "disjoint groups"),
    "no alignment": (lambda t, m: m.update(format="x"), "header"),
    "strange groups": (lambda t, m: m.update(groups='{"a": 1}'), "not lists of layers"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_with_the_reason(name: str, stored: tuple[Path, ModelConfig]) -> None:
    """Guards against files of another model, broken, or made to harm: one ValueError that says why."""
    path, config = stored
    tensors, data, (spoil, why) = load_file(path), path.read_bytes(), BAD[name]
    metadata = dict(json.loads(data[8:8 + int.from_bytes(data[:8], "little")])["__metadata__"])
    spoil(tensors, metadata)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match=why):
        read_alignment(path, config)


def test_a_cut_file_is_refused(stored: tuple[Path, ModelConfig]) -> None:
    path, config = stored
    data = path.read_bytes()
    for part in (data[:-10], data[:50], b"", b"\xff" * 64):
        path.write_bytes(part)
        with pytest.raises(ValueError, match="truncated or no safetensors file"):
            read_alignment(path, config)


def test_wrong_groups_are_refused_where_named_and_left_alone_where_not(stored: tuple[Path, ModelConfig]) -> None:
    """Guards the choice of a file: one named must fit the cache, the checkpoint's own is used where it does; none turns it off."""
    path, config = stored
    fits, other = CacheConfig.parse("minicache,merge_from=1"), CacheConfig.parse("minicache,pairs=0-2")
    assert find_alignment(str(path), path.parent, config, fits) and find_alignment("none", path.parent, config) is None
    with pytest.raises(ValueError, match="aligns layers 1-2, the cache merges 0-2"):
        find_alignment(str(path), path.parent, config, other)
    path.rename(path.parent / ALIGNMENT)
    assert find_alignment(None, path.parent, config, fits) and find_alignment(None, path.parent, config, other) is None
    with pytest.raises(ValueError, match="cannot be read"):
        find_alignment(str(path), path.parent, config)
    by_token = CacheConfig.parse("minicache,merge_from=1,granularity=token")     # where maps of single heads do harm
    assert find_alignment(None, path.parent, config, by_token) is None
    with pytest.raises(ValueError, match="granularity=token merges over all heads"):
        find_alignment(str(path.parent / ALIGNMENT), path.parent, config, by_token)


def test_interleaved_pairs_run_and_equal_adjacent_ones_before_merging(tiny_checkpoint: Callable[[str], Path]) -> None:
    """Guards groups whose layers interleave: prefill takes them together, decode commits each with its last layer; with everything in the
    window nothing is lost, so logits are those of the full cache."""
    model = load_model(tiny_checkpoint("llama"), dtype=torch.float32)
    prompts, targets = [list(range(5, 45)), list(range(50, 80))], [list(range(20, 30))] * 2
    want = list(forced_logits(Engine(model, max_batch_size=2, max_seq_len=56), prompts, targets))
    for chunk in (7, 512):
        cache = CacheConfig.parse("minicache,pairs=0-2,window=50")
        got = list(forced_logits(Engine(model, max_batch_size=2, max_seq_len=56, cache=cache, prefill_chunk=chunk), prompts, targets))
        assert max((a - b).abs().max() for a, b in zip(want, got, strict=True)) < 1e-4
    lossy = Engine(model, max_batch_size=2, max_seq_len=56, cache=CacheConfig.parse("minicache,pairs=0-2,window=0,sinks=0,retain=0"))
    assert [g.layers for g in lossy.cache.groups] == [(0, 2), (1,)] and [len(s) for s in lossy.cache.spans()] == [2]
    got = list(forced_logits(lossy, prompts, targets))
    assert 1e-3 < max((a - b).abs().max() for a, b in zip(want, got, strict=True)) < 100


def test_align_for_good(tiny_checkpoint: Callable[[str], Path]) -> None:
    """Guards Engine.from_pretrained's alignment: folded weights stay folded, and a cache that merges nothing is left alone."""
    model = load_model(tiny_checkpoint("llama"), dtype=torch.float32)
    alignment, before = Alignment(((1, 2),), random_maps(model.config, range(1, 3))), model.layers[1].attention.wo.weight.clone()
    align(model, alignment, CacheConfig.parse("quant,bits=4"))
    assert torch.equal(model.layers[1].attention.wo.weight, before)
    align(model, alignment, CacheConfig.parse("minicache,merge_from=1"))
    assert not torch.equal(model.layers[1].attention.wo.weight, before)
    shape = dict(max_seq_len=8, dtype=torch.float32, cache=CacheConfig.parse("minicache,merge_from=1"))
    engine = Engine.from_pretrained(tiny_checkpoint("llama"), alignment=alignment, **shape)
    assert torch.equal(engine.model.layers[1].attention.wo.weight, model.layers[1].attention.wo.weight)
    with pytest.raises(ValueError, match="the cache merges 0-1"):
        Engine.from_pretrained(tiny_checkpoint("llama"), alignment=alignment, **shape | {"cache": CacheConfig.parse("minicache,pairs=0-1")})


@pytest.mark.parametrize("x", ["k", "v"])
def test_the_loss_is_that_of_a_real_cache(x: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards what is made small against drifting from what is stored: without code noise it is the error of a cache fed token by token,
    heads in their slots, sinks and window exact, some heads weighing more at the output than others."""
    monkeypatch.setattr(merge_loss, "CODE_NOISE", {16: 0.0})
    cache = CacheConfig.parse(f"minicache,merge_from=0,merge_k={int(x == 'k')},merge_v={int(x == 'v')},retain=0,sinks=2,window=3")
    states = [s.in_order(torch.tensor([1, 2, 0])) for s in made_states(hidden=False, windows=3)]
    for s in states:
        s.wo = s.wo * torch.tensor([.1, 1, 3, .3, 2, 1])[:, None]
    group, (N, H, T, D) = Group(states, cache, None), states[0].q.shape
    queries = torch.arange(T)
    got = group.loss(x, group.own[x], torch.arange(N), queries)
    stored = cache.build(n_layer=2, n_kv_head=3, head_dim=D, batch=N, max_seq_len=T, dtype=torch.float32, device="cpu")
    y = torch.zeros(2, N, H, T, D)
    for t in range(T):
        at, valid = torch.full((N, 1), t), torch.ones(N, 1, dtype=torch.bool)
        for i, (layer, s) in enumerate(zip(stored.layers, states, strict=True)):
            y[i, :, :, t] = layer.attend(s.q[:, :, t:t + 1], s.k[:, :, t:t + 1], s.v[:, :, t:t + 1], at, valid)[:, :, 0]
    exact = torch.stack([torch.nn.functional.scaled_dot_product_attention(s.q, s.k, s.v, is_causal=True, enable_gqa=True) for s in states])
    error, reference = (torch.einsum("lbhtd,lchd->lbtc", z, torch.stack([s.wo for s in states])).square().sum((1, 2, 3))
                        for z in (y - exact, exact))
    assert got == pytest.approx((error / reference).mean().item(), rel=1e-3) and got > .01
