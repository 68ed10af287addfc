"""Peers of bench.py throughput: the same weights, the same tokens."""
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine import Engine, SamplingParams
from engine.measure.cell import random_prompts
from engine.measure.gpt_fast import GptFast
from engine.measure.peers import Peer, read_peers
from model.config import NAMED_CONFIGS, RopeConfig
from weights import EMBEDDED, load_model, random_model


def greedy(runner: Engine | Peer | GptFast, prompts: list[list[int]], n: int) -> list[list[int]]:
    tokens: list[list[int]] = [[] for _ in prompts]
    for step in runner.generate(prompts, [SamplingParams(max_new_tokens=n)] * len(prompts)):
        for i, token in step.tokens:
            tokens[i].append(token)
    return tokens


@pytest.mark.parametrize("kind", ["StaticCache", "DynamicCache"])
@pytest.mark.parametrize("name", ["embedded", *NAMED_CONFIGS])
def test_a_peer_says_what_the_engine_says(name: str, kind: str) -> None:
    """Guards a peer on other weights (q, k, v swapped, rotary tables of zeros), a cache not reset between runs, a copy of the weights."""
    pytest.importorskip("transformers")
    if name == "embedded":
        checkpoint, model = str(EMBEDDED), load_model(EMBEDDED, dtype=torch.float32)
    else:
        c = NAMED_CONFIGS[name]
        c = replace(c, vocab_size=256, dim=192, n_layer=2, n_head=2, n_kv_head=2 if c.n_kv_head == c.n_head else 1, head_dim=96,
                    intermediate_size=64, max_position_embeddings=128, sliding_window=c.sliding_window and 20)
        checkpoint, model = None, random_model(c, dtype=torch.float32)
    prompts = random_prompts(model.config.vocab_size, [25, 25])
    expected = greedy(Engine(model, max_batch_size=2, max_seq_len=40), prompts, 15)
    peer = Peer(model, kind, checkpoint=checkpoint, capacity=40, compile=False)
    assert greedy(peer, prompts, 15) == expected == greedy(peer, prompts, 15)
    assert peer.model.lm_head.weight.data_ptr() == model.head.weight.data_ptr()


# what gpt-fast must look like, with its rotary pairs (2i, 2i + 1): as little of it as the names and the arithmetic need
STAND_IN = {"model.py": '''
from dataclasses import dataclass
import torch
from torch import nn
from torch.nn import functional as F

@dataclass
class ModelArgs:
    block_size: int; vocab_size: int; n_layer: int; n_head: int; n_local_heads: int; dim: int; intermediate_size: int
    rope_base: float; norm_eps: float

class Holder(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)

class Transformer(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.a, D = a, a.dim // a.n_head
        linear = lambda i, o: nn.Linear(i, o, bias=False)
        norm = lambda: nn.RMSNorm(a.dim, a.norm_eps)
        self.tok_embeddings, self.norm, self.output = nn.Embedding(a.vocab_size, a.dim), norm(), linear(a.dim, a.vocab_size)
        self.layers = nn.ModuleList(Holder(
            attention=Holder(wqkv=linear(a.dim, (a.n_head + 2 * a.n_local_heads) * D), wo=linear(a.dim, a.dim)),
            attention_norm=norm(), ffn_norm=norm(), feed_forward=Holder(
                w1=linear(a.dim, a.intermediate_size), w3=linear(a.dim, a.intermediate_size), w2=linear(a.intermediate_size, a.dim)),
        ) for _ in range(a.n_layer))

    def setup_caches(self, max_batch_size, max_seq_length):
        self.max_seq_length = max_seq_length
        for layer in self.layers:
            cache = layer.attention.kv_cache = nn.Module()
            for name in ("k_cache", "v_cache"):
                cache.register_buffer(name, torch.zeros(1, self.a.n_local_heads, max_seq_length, self.a.dim // self.a.n_head))

    def forward(self, ids, pos):
        a, D = self.a, self.a.dim // self.a.n_head
        angle = pos[:, None] / a.rope_base ** (torch.arange(0, D, 2) / D)
        def turn(x):
            even, odd = x[..., 0::2], x[..., 1::2]
            return torch.stack((even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()), -1).flatten(-2)
        mask = torch.arange(self.max_seq_length) <= pos[:, None]
        x = self.tok_embeddings(ids)
        for layer in self.layers:
            t, cache = layer.attention, layer.attention.kv_cache
            qkv = t.wqkv(layer.attention_norm(x)).view(1, len(pos), -1, D).transpose(1, 2)
            q, k, v = qkv.split([a.n_head, a.n_local_heads, a.n_local_heads], 1)
            cache.k_cache[:, :, pos], cache.v_cache[:, :, pos] = turn(k), v
            y = F.scaled_dot_product_attention(turn(q), cache.k_cache, cache.v_cache, attn_mask=mask, enable_gqa=True)
            x = x + t.wo(y.transpose(1, 2).reshape(1, len(pos), -1))
            h, f = layer.ffn_norm(x), layer.feed_forward
            x = x + f.w2(F.silu(f.w1(h)) * f.w3(h))
        return self.output(self.norm(x))
''', "generate.py": '''
def prefill(model, x, input_pos, temperature):
    print("noise on stdout")
    return model(x, input_pos)[:, -1].argmax(-1, keepdim=True)

def decode_one_token(model, x, input_pos, temperature):
    return prefill(model, x, input_pos, temperature), None
'''}


@pytest.fixture(params=["stand-in", "checkout"])
def gpt_fast(request, tmp_path: Path) -> str:
    """A folder to give to --peer gpt-fast; the real one where GPT_FAST_DIR names it."""
    if request.param == "checkout":
        return os.environ.get("GPT_FAST_DIR") or pytest.skip("GPT_FAST_DIR names no checkout of gpt-fast")
    for name, text in STAND_IN.items():
        (tmp_path / name).write_text(text)
    return str(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_gpt_fast_says_what_the_engine_says(gpt_fast: str, tied: bool) -> None:
    """Guards rows of q and k in the wrong order, gate and up swapped, kv heads, a tied head, a second run on the first one's cache."""
    config = replace(NAMED_CONFIGS["llama-3-8b"], vocab_size=256, dim=128, n_layer=2, n_head=4, n_kv_head=2, head_dim=32,
                     intermediate_size=64, tie_word_embeddings=tied)
    model = random_model(config, dtype=torch.float32)
    prompts = random_prompts(model.config.vocab_size, [25])
    peer = GptFast(model, gpt_fast, capacity=40, compile=False)
    expected = greedy(Engine(model, max_seq_len=40), prompts, 15)
    assert greedy(peer, prompts, 15) == expected == greedy(peer, prompts, 15)
    c = model.config
    assert peer.kv_bytes() == 2 * 4 * c.n_layer * c.n_kv_head * c.head_dim * 40 and peer.peak_bytes() > 10 ** 7


@pytest.mark.parametrize("config, why", [
    (NAMED_CONFIGS["mixtral-8x7b"], "mixtral"), (NAMED_CONFIGS["phi-3-mini"], "phi3"), (NAMED_CONFIGS["llama-3-8b"], None),
    (replace(NAMED_CONFIGS["mistral-7b"], sliding_window=20), "window"), (NAMED_CONFIGS["mistral-7b"], None),
    (replace(NAMED_CONFIGS["llama-2-7b"], head_dim=64), "head_dim"),
    (replace(NAMED_CONFIGS["llama-2-7b"], rope=RopeConfig("linear", 1e4, 2.0)), "linear")])
def test_gpt_fast_is_left_out_where_it_lacks_something(config, why, tmp_path) -> None:
    """Guards a peer that runs another model than ours, and a whole run refused because of it."""
    for name in STAND_IN:
        (tmp_path / name).touch()
    peers, notes = read_peers([["gpt-fast", str(tmp_path)]], config, 40, [1, 2])
    assert peers == ([] if why else [("gpt-fast", str(tmp_path))])
    assert len(notes) == (why is not None) and all(why in note for note in notes)
    assert read_peers([["gpt-fast", str(tmp_path)]], config, 40, [2])[0] == []


