"""A layout of one's own, whole: what README promises of a subclass of LayerGroup. It is also the example to start from."""
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cache import KVCache
from cache.base import Columns, LayerGroup, column_blocks
from engine import Engine, SamplingParams
from engine.compare import compare_to_full
from tokenizer import load_tokenizer
from weights import EMBEDDED, load_model


class Int8Layer(LayerGroup):
    """One layer, 8 bits a number and one scale a token and head: [B, G, S, D] int8 and [B, G, S] fp32 for K and for V."""

    def __init__(self, layer: int, *, batch: int, n_kv_head: int, max_seq_len: int, head_dim: int, device: torch.device | str,
                 sliding_window: int | None) -> None:
        super().__init__()
        self.layers, self.sliding_window = (layer,), sliding_window
        for x in "kv":
            self.register_buffer(f"{x}_code", torch.zeros(batch, n_kv_head, max_seq_len, head_dim, dtype=torch.int8, device=device))
            self.register_buffer(f"{x}_scale", torch.zeros(batch, n_kv_head, max_seq_len, device=device))

    def columns(self, index: int, length: Tensor, input_pos: Tensor, rows: Tensor | None, limit: int | None = None) -> Iterator[Columns]:
        row = slice(None) if rows is None else rows
        for at in column_blocks(self.k_scale.shape[2], limit):
            column = torch.arange(at.start, at.stop, device=length.device)
            mask = (column < length[:, None])[:, None] & self.in_window(column[None, None], input_pos)
            k, k_scale, v, v_scale = (buffer[row, :, at] for buffer in self.buffers())
            yield Columns(k, v, mask[:, None], k_scale, v_scale)

    def commit(self, k: Tensor, v: Tensor, length: Tensor, n_new: Tensor, rows: Tensor | None = None) -> None:
        (B, G, S), T = self.k_scale.shape, k.shape[3]
        b = (torch.arange(B, device=k.device) if rows is None else rows)[:, None, None]
        i = torch.arange(T, device=k.device)
        at = (b, torch.arange(G, device=k.device)[:, None], ((length[:, None] + i) % S)[:, None])
        valid = (i < n_new[:, None])[:, None]                               # a lane that is not valid writes back what is there
        for name, x in (("k", k[0]), ("v", v[0])):
            code, scale = getattr(self, f"{name}_code"), getattr(self, f"{name}_scale")
            new = x.float().abs().amax(-1) / 127
            coded = (x.float() / new.clamp_min(1e-20)[..., None]).round().to(torch.int8)
            code[at] = torch.where(valid[..., None], coded, code[at])
            scale[at] = torch.where(valid, new, scale[at])

    def read(self, index: int, length: Tensor) -> tuple[Tensor, Tensor]:
        stored = (torch.arange(self.k_scale.shape[2], device=length.device) < length[:, None])[:, None]
        return self.k_code * (self.k_scale * stored)[..., None], self.v_code * (self.v_scale * stored)[..., None]

    def reset(self, rows: Tensor | None = None) -> None:
        for buffer in self.buffers():
            buffer[slice(None) if rows is None else rows] = 0


class Int8:
    """What `Engine(cache=...)` takes."""

    def build(self, *, n_layer: int, dtype: torch.dtype, sliding_window: int | None = None, **shape) -> KVCache:
        return KVCache([Int8Layer(layer, sliding_window=sliding_window, **shape) for layer in range(n_layer)])

    def nbytes(self, **shape) -> dict[str, int]:
        return self.build(**shape, device="meta").nbytes()


@pytest.mark.parametrize("prefill_chunk", [512, 5])
def test_it_runs_as_the_built_in_ones_do(prefill_chunk: int) -> None:
    """Guards README's recipe: prompts in chunks, rows refilled, ragged rows, bytes, and the comparison with the full cache."""
    model, tokenizer = load_model(EMBEDDED, dtype=torch.float32), load_tokenizer(EMBEDDED)
    prompts = [tokenizer.encode(text) for text in ("Once upon a time there was a dog.", "Lily", "The sea was blue and the sun was hot.")]
    engine = Engine(model, max_batch_size=2, max_seq_len=40, cache=Int8(), prefill_chunk=prefill_chunk)
    full = Engine(model, max_batch_size=2, max_seq_len=40)
    texts = []
    for one in (engine, full):
        tokens = [[] for _ in prompts]
        for step in one.generate(prompts, SamplingParams(max_new_tokens=10)):
            for i, token in step.tokens:
                tokens[i].append(token)
        texts.append(tokens)
    assert texts[0] == texts[1]
    assert engine.cache.nbytes().keys() == {"other"} and engine.bits_per_element == 8 + 32 / model.config.head_dim
    assert 0 < compare_to_full(engine, prompts, texts[0])["kl"] < 1e-3
