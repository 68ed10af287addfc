"""Parity: our logits equal those of `transformers` in fp32, at every position of prefill and of 64 cached decode steps.

The reference is one uncached forward over the whole text, read from the same directory; ours runs two rows of different
length through one cache, so a position or a mask shared between rows would show.
"""
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import CHECKPOINTS

from cache.build import build_cache
from cache.config import CacheConfig
from model import Rope, Transformer
from weights import EMBEDDED, load_model

TOLERANCE = 1e-4
PROMPTS, STEPS = (40, 23), 64       # longer than every sliding window in use; with the steps past LongRoPE's switch


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_tiny_checkpoint(name: str, tiny_checkpoint, parity_table) -> None:
    """Guards: slices of fused weights, RoPE kinds, sliding window, experts, config keys of both generations."""
    check(name, tiny_checkpoint(name), CHECKPOINTS[name].rope, parity_table)


def test_embedded_checkpoint(parity_table) -> None:
    """Guards: a real, trained checkpoint; random ones do not have its large activations."""
    check("storyteller", EMBEDDED, "default", parity_table)


def check(name: str, directory: Path, rope_kind: str, parity_table: Callable) -> None:
    model = load_model(directory, dtype=torch.float32)
    assert model.config.rope.kind == rope_kind
    shape = (len(PROMPTS), max(PROMPTS) + STEPS)
    ids = torch.randint(3, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    expected = reference_logits(directory, ids)
    prefill, decode = our_logits(model, ids)
    differences = [max((ours - expected[row, a:a + len(ours)]).abs().max().item() for row, (a, ours) in enumerate(part))
                   for part in (prefill, decode)]
    parity_table((name, model.config.family, rope_kind, *differences))
    assert expected.std() > 0.5, "the reference is flat: this comparison could not fail"
    assert max(differences) < TOLERANCE


@torch.no_grad()
def reference_logits(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    """[B, max prompt + STEPS, V]; a row is used up to its own prompt + STEPS: what follows cannot reach back."""
    transformers = pytest.importorskip("transformers", reason="parity is measured against transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model(ids, use_cache=False).logits


@torch.no_grad()
def our_logits(model: Transformer, ids: torch.Tensor) -> list[list[tuple[int, torch.Tensor]]]:
    """For prefill and for decode: per row, the first position and the logits [n, V]."""
    c, (B, S) = model.config, ids.shape
    cache = build_cache(CacheConfig("full"), n_layer=c.n_layer, n_kv_head=c.n_kv_head, head_dim=c.head_dim, batch=B,
                        max_seq_len=S, dtype=torch.float32, device="cpu", sliding_window=c.sliding_window)
    rope, prompts = Rope(c, S), torch.tensor(PROMPTS)
    position = torch.arange(max(PROMPTS)).expand(B, -1)
    logits = model(ids[:, :max(PROMPTS)], position, position < prompts[:, None], cache, rope)
    prefill = [(0, row[:n]) for row, n in zip(logits, PROMPTS, strict=True)]
    steps = []
    for step in range(STEPS):
        position = prompts[:, None] + step
        steps.append(model(ids.gather(1, position), position, torch.ones_like(position, dtype=torch.bool), cache, rope))
    return [prefill, list(zip(PROMPTS, torch.cat(steps, 1), strict=True))]
