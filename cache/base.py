"""What a KV cache is here: groups of layers, each storing its layers' K and V in a layout of its own.

Contract with attention (the model knows nothing else):
    y = layer_cache.attend(q, k, v, input_pos, valid, rows=None)
    q [B', H, T, D]; k, v [B', G, T, D] after RoPE; input_pos [B', T]; valid [B', T] bool, a prefix per row -> [B', H, T, D]
input_pos[b, 0] is the row's stored length, also where nothing is valid; the cache keeps no length. `rows` [B'] names the slots
(None: all).
Buffers are allocated once and written in place. Trap: write through the WHOLE buffer with tensor or slice indices
(`buf[:, b, g, pos] = x`); an int index or a view makes the compiler copy the buffer each step, with the right result and the same address.
"""
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Columns(NamedTuple):
    """Stored tokens as attention sees them: N columns whose K is `k * k_scale` and whose V is `v * v_scale`.

    A rotation [D, D] says that k or v stands in a rotated basis, x @ rotation.
    """

    k: Tensor                       # [B', G, N, D]
    v: Tensor                       # [B', G, N, D]
    mask: Tensor                    # bool, broadcasts to [B', G, T, N]: True where the query may look
    k_scale: Tensor | None = None   # [B', G, N]; None: 1
    v_scale: Tensor | None = None
    k_rotation: Tensor | None = None
    v_rotation: Tensor | None = None


class LayerGroup(nn.Module):
    """The layers that share storage, and how they store. A new cache is one subclass: `columns`, `commit`, `read`, `reset`."""

    layers: tuple[int, ...]
    sliding_window: int | None = None
    form: str = "reference"         # of attention for one new token per row: see cache/kernels
    commits_fast: bool = False      # `form` holds for storing, too

    def columns(self, index: int, length: Tensor, input_pos: Tensor, rows: Tensor | None,
                limit: int | None = None) -> Iterator[Columns]:
        """What member `index` has stored for `rows` [B'], `length` [B'] tokens, for queries at input_pos [B', T].

        `limit` is a host bound on the stored length: the columns then come in blocks of at most BLOCK, for long query blocks.
        """
        raise NotImplementedError

    def commit(self, k: Tensor, v: Tensor, length: Tensor, n_new: Tensor, rows: Tensor | None = None) -> None:
        """Store n_new [B'] tokens after `length` [B'] stored ones, all members at once. k, v [n, B', G, T, D], right padded.

        Of a step's one token a row n_new says whether there is one, as a bool.
        """
        raise NotImplementedError

    def read(self, index: int, length: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of member `index` as stored, restored to [B, G, S, D]; columns past `length` [B] are zero. For tests and comparison."""
        raise NotImplementedError

    def reset(self, rows: Tensor | None = None) -> None:
        """Forget what `rows` [B'] int64 (None: all) hold, numbers too: a masked column has weight 0, and 0 times a stale inf is nan."""
        raise NotImplementedError

    def report(self) -> dict[str, int]:
        """Counts to show beside the bytes; nothing by default."""
        return {}

    def attend(self, index: int, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, valid: Tensor,
               rows: Tensor | None = None) -> Tensor:
        """Attention of T new tokens over the stored ones and themselves (exact); the group's last member commits all members."""
        if self.form != "reference" and q.shape[2] == 1 and rows is None:
            y = self.attend_fast(index, q, k, v, input_pos[:, 0])
        else:
            y = self.attend_reference(index, q, k, v, input_pos, rows)
        if index == 0:
            self.pending = []
        self.pending.append((k, v))
        if index == len(self.layers) - 1:
            ks, vs = (torch.stack(x) if len(x) > 1 else x[0][None] for x in zip(*self.pending, strict=True))
            self.pending = None       # a tensor left on self would become an output of the compiled graph
            self.commit(ks, vs, input_pos[:, 0], valid[:, 0] if valid.shape[1] == 1 else valid.sum(1), rows)
        return y

    def attend_fast(self, index: int, q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
        """T = 1, all rows, by the operator minicache::attend. For layouts that `form` says have one."""
        raise NotImplementedError

    def attend_reference(self, index: int, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, rows: Tensor | None) -> Tensor:
        """Any T, plain PyTorch, inlined where it is traced."""
        i = torch.arange(q.shape[2], device=q.device)
        causal = (i[:, None] >= i) & self.in_window(input_pos[:, None, :], input_pos)      # right padding: no valid query sees it
        stored = self.columns(index, input_pos[:, 0], input_pos, rows)
        return attend_columns(q, k.shape[1], [*stored, Columns(k, v, causal[:, None])])

    def in_window(self, key_pos: Tensor, input_pos: Tensor) -> Tensor:
        """key_pos [B' | 1, (1 | T), N] -> bool [B' | 1, T | 1, N]: may a query at input_pos [B', T] see it (sliding-window models)."""
        if self.sliding_window is None:
            return torch.ones(1, 1, 1, dtype=torch.bool, device=key_pos.device)
        return key_pos > input_pos[:, :, None] - self.sliding_window


class LayerCache:
    """One layer's handle on its group: what the model's attention is given."""

    def __init__(self, group: "LayerGroup", index: int) -> None:
        self.group, self.index = group, index

    def attend(self, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, valid: Tensor, rows: Tensor | None = None) -> Tensor:
        return self.group.attend(self.index, q, k, v, input_pos, valid, rows)


class KVCache(nn.Module):
    """All layers of a model: `groups` in order of their first layers, `layers[l]` the handle that layer l's attention calls."""

    def __init__(self, groups: Sequence[LayerGroup]) -> None:
        super().__init__()
        self.groups = nn.ModuleList(groups)
        handles = {layer: LayerCache(g, i) for g in groups for i, layer in enumerate(g.layers)}
        self.layers = [handles[layer] for layer in sorted(handles)]

    def spans(self) -> list[list[LayerGroup]]:
        """Runs of groups that together cover layers without a gap: one group each, but for groups whose layers interleave."""
        runs, end = [], -1
        for group in self.groups:
            if group.layers[0] > end:
                runs.append([])
            runs[-1].append(group)
            end = max(end, group.layers[-1])
        return runs

    def reset(self, rows: Tensor | None = None) -> None:
        """Free the slots `rows` [B'] int64 (None: all) for another sequence."""
        for group in self.groups:
            group.reset(rows)

    def report(self) -> dict[str, int]:
        """What the layouts have to say of themselves besides bytes, summed over groups."""
        total: dict[str, int] = {}
        for group in self.groups:
            for key, value in group.report().items():
                total[key] = total.get(key, 0) + value
        return total

    def nbytes(self) -> dict[str, int]:
        """Bytes of every buffer, by kind (KINDS, else "other")."""
        total: dict[str, int] = {}
        for name, buffer in self.named_buffers():
            kind = KINDS.get(name.rsplit(".", 1)[-1], "other")
            total[kind] = total.get(kind, 0) + buffer.numel() * buffer.element_size()
        return total


BLOCK = 1024    # columns a block when a long query block meets a long past; bounds the scores to T x BLOCK
KINDS = {"k": "full", "v": "full"}      # buffer name -> kind of byte; a layout adds its own


def put(buffer: Tensor, dim: int, rows: Tensor | None, value: float | bool) -> None:
    """Fill `buffer` in place, at `rows` [B'] of `dim` or whole. An assignment by index would fetch the value from the host, which waits."""
    if rows is None:
        buffer.fill_(value)
    else:
        buffer.index_fill_(dim, rows, value)


def column_blocks(n_columns: int, limit: int | None) -> list[slice]:
    """All columns as one slice, or those below `limit` in slices of at most BLOCK."""
    if limit is None:
        return [slice(0, n_columns)]
    return [slice(a, min(a + BLOCK, limit, n_columns)) for a in range(0, min(limit, n_columns), BLOCK)]


def attend_columns(q: Tensor, n_kv_head: int, blocks: Iterable[Columns]) -> Tensor:
    """Softmax attention of q [B, H, T, D] over all blocks together, one block after the other (online softmax) -> [B, H, T, D].

    Scores and sums in fp32. The G kv heads serve H / G query heads each; a query that sees nothing gives zeros.
    """
    B, H, T, D = q.shape
    G = n_kv_head
    qg = q.reshape(B, G, H // G * T, D).float() * D ** -0.5
    q_rotated = y_rotated = rotation = None
    top = torch.full((B, G, H // G, T, 1), -1e30, device=q.device)      # finite: exp(-inf - top) is 0, never nan
    total = torch.zeros_like(top)
    y = torch.zeros(B, G, H // G, T, D, device=q.device)
    for block in blocks:
        if block.k_rotation is not None and q_rotated is None:
            q_rotated = qg @ block.k_rotation
        score = ((qg if block.k_rotation is None else q_rotated) @ block.k.float().mT).view(B, G, H // G, T, -1)
        if block.k_scale is not None:
            score = score * block.k_scale[:, :, None, None].float()
        score = score.masked_fill(~block.mask[:, :, None], float("-inf"))
        before, top = top, torch.maximum(top, score.amax(-1, keepdim=True))
        p, fade = (score - top).exp(), (before - top).exp()
        total = total * fade + p.sum(-1, keepdim=True)
        if block.v_scale is not None:
            p = p * block.v_scale[:, :, None, None].float()
        part = (p.view(B, G, H // G * T, -1) @ block.v.float()).view(B, G, H // G, T, D)
        y, y_rotated = y * fade, None if y_rotated is None else y_rotated * fade
        if block.v_rotation is None:
            y = y + part
        else:
            y_rotated, rotation = part if y_rotated is None else y_rotated + part, block.v_rotation
    if y_rotated is not None:
        y = y + y_rotated @ rotation.mT
    return (y / total.clamp_min(1e-30)).reshape(B, H, T, D).to(q.dtype)


def attend_exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """SDPA over full-precision columns: q [B, H, T, D], k, v [B, G, N, D], mask bool or additive, to [B, 1, T, N]; None: causal."""
    B, H, T, D = q.shape
    if T == 1 and mask is not None:     # the query heads of a kv head as its queries: no kernel can fall back to repeating K and V
        y = F.scaled_dot_product_attention(q.reshape(B, k.shape[1], -1, D), k, v, attn_mask=mask)
        return y.reshape(B, H, T, D)        # no view: not every kernel of a GPU answers in that order
    if mask is not None and q.is_cuda and H != k.shape[1]:      # no fused kernel takes a mask and fewer kv heads
        k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=H != k.shape[1])
