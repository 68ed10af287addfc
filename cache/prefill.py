"""Exact attention of a prompt: the K and V of one group's layers, whole for the prompt, before the group commits them.

A prompt passes the model group by group (all its chunks through a group's layers, then commit), so at most one group's exact K and V is
alive: the scratch here. Results do not depend on how the prompt is cut into chunks.
"""
from itertools import chain

import torch
from torch import Tensor

from cache.base import BLOCK, Columns, LayerGroup, attend_columns, attend_exact, column_blocks


class GroupPrefill:
    """Scratch K, V [n, B', G, P, D] of a prompt of P tokens for one group; `layers[i].attend` keeps the contract of a layer cache.

    Every chunk passes member 0, 1, ... n - 1, chunks in order; then `commit`. `past` is a host bound on the stored length of
    the rows (0: a fresh prompt, which never looks at the cache).
    """

    def __init__(self, group: LayerGroup, n_tokens: int, *, past: int) -> None:
        self.group, self.n_tokens, self.past = group, n_tokens, past
        self.k = self.v = None
        self.layers = [PrefillLayer(self, i) for i in range(len(group.layers))]

    def commit(self, length: Tensor, n_new: Tensor, rows: Tensor | None) -> None:
        """Store n_new [B'] tokens of the scratch after `length` [B'] stored ones, in pieces: commit is associative."""
        most = BLOCK * (4 if self.k.is_cuda else 1)     # bounds the fp32 temporaries of merging; a GPU has more room than time for launches
        step = max(most // len(length), 16)
        for start in range(0, self.n_tokens, step):
            piece = slice(start, start + step)
            self.group.commit(self.k[:, :, :, piece], self.v[:, :, :, piece], length + n_new.clamp_max(start),
                              (n_new - start).clamp(0, step), rows)
        self.k = self.v = None          # the handles refer back to this object: without the collector it would outlive the next group


class PrefillLayer:
    """One layer's handle during prefill. The chunk's columns are start .. start + T of the prompt, the same for every row."""

    def __init__(self, prefill: GroupPrefill, index: int) -> None:
        self.prefill, self.index, self.start = prefill, index, 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, valid: Tensor, rows: Tensor | None = None) -> Tensor:
        p, T = self.prefill, q.shape[2]
        if p.k is None:
            p.k = k.new_zeros(len(p.layers), *k.shape[:2], p.n_tokens, k.shape[3])
            p.v = torch.zeros_like(p.k)
        start, end = self.start, self.start + T
        self.start = end
        p.k[self.index, :, :, start:end], p.v[self.index, :, :, start:end] = k, v
        keys, values = p.k[self.index], p.v[self.index]
        window = p.group.sliding_window

        if not p.past:      # right padding: a valid query sees only valid columns before it
            mask = None
            if start or (window is not None and end > window):      # additive: SDPA makes one of a bool mask anyway
                mask = q.new_full((T, end), float("-inf")).triu_(start + 1)
                if window is not None:
                    mask += q.new_full((T, end), float("-inf")).tril_(start - window)
            return attend_exact(q, keys[:, :, :end], values[:, :, :end], mask)

        def seen(first: int, last: int) -> Tensor:
            i, j = torch.arange(start, end, device=q.device)[:, None], torch.arange(first, last, device=q.device)
            return (j <= i) if window is None else (j <= i) & (j > i - window)

        length = input_pos[:, 0] - start
        stored = p.group.columns(self.index, length, input_pos, rows, limit=p.past)
        own = (Columns(keys[:, :, at], values[:, :, at], seen(at.start, at.stop)[None, None]) for at in column_blocks(end, end))
        return attend_columns(q, k.shape[1], chain(stored, own))
