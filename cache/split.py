"""The split layout: the K and V of a group of n layers as direction, magnitude, retained and window tensors. One class for all n:
n = 1 stores layers one by one (quantised), n = 2 is MiniCache, n > 2 the paper's future work. Decode never restores K or V of a layer.

A token lives its first W steps in the window (exact), then leaves it: it is merged into column `position` of direction and magnitude,
and the R tokens whose layers differ most are kept exact besides, in `retained`; the flag `exact` then masks their merged column.
Trap: the last of the S - W columns takes the writes of masked lanes and is never read (a query stands at S - 1 at most).
"""
from collections.abc import Iterator

import torch
import torch.nn as nn
from torch import Tensor

from cache.base import KINDS, Columns, LayerGroup, column_blocks, put
from cache.codec import Codec
from cache.config import CacheConfig
from cache.merge import RULES, distance, max_norm, mean, merge, optimal, slerp

FAST_RULES = (slerp, mean, max_norm, optimal)       # what minicache::commit knows; a rule of your own runs as it is written
SINK = 2.0          # above every distance: the first tokens are always kept
KINDS.update({f"{x}_{kind}": kind for x in "kv" for kind in ("direction", "magnitude", "retained", "window")})
KINDS.update(dict.fromkeys(("exact", "retained_pos", "retained_score", "score_range", "overflow", "code_rotation", "k_levels",
                            "v_levels", "cuts"), "bookkeeping"))


class SplitGroup(LayerGroup):
    """Buffers, x being k or v, N = S - W columns, m = 1 where x is merged and n where every layer keeps its own direction:

    x_direction [m, B, G, N, D], or packed codes [m, B, G, N, D * bits / 8] uint8; x_magnitude [n, B, G, N];
    x_retained [n, B, G, R, D]; x_window [n, B, G, W, D] (ring);
    exact [B, G, N]: this merged column is masked; retained_pos, retained_score [B, G, R] (empty slot: -inf);
    score_range [B, G, 2]: least and largest score so far; overflow [B, G]: tokens past the threshold of their time that found no slot
    or lost it (the reference takes a prompt's pieces at their end).
    The codec's tables are registered here as well, so that the buffers in order are what the operators take.
    """

    def __init__(self, layers: tuple[int, ...], config: CacheConfig, *, batch: int, n_kv_head: int, max_seq_len: int, head_dim: int,
                 dtype: torch.dtype, device: torch.device | str, sliding_window: int | None, codecs: dict[int, Codec]) -> None:
        super().__init__()
        self.codec = nn.ModuleDict({x: codecs[bits] for x, bits in (("k", config.k_bits), ("v", config.v_bits)) if bits < 16})
        self.layers, self.config, self.sliding_window = layers, config, sliding_window
        self.max_seq_len, self.W, self.R = max_seq_len, min(config.window, max_seq_len), config.retained_slots(len(layers), max_seq_len)
        rule = RULES[config.merge]
        self.rule = FAST_RULES.index(rule) if rule in FAST_RULES else None
        # the operator commits where it can: one layer, or two by one of our rules, each kv head by itself
        self.commits_fast = len(layers) == 1 or len(layers) == 2 and config.granularity == "head" and self.rule is not None
        self.by_threshold = config.retention != "topk" and len(layers) > 1       # not all filled slots count
        self.merged = {"k": config.merge_k and len(layers) > 1, "v": config.merge_v and len(layers) > 1}
        n, B, G, D, N, R = len(layers), batch, n_kv_head, head_dim, max(max_seq_len - self.W, 1), self.R
        small = torch.float32 if dtype == torch.float32 else torch.float16

        def buffer(name: str, *shape: int, dtype: torch.dtype = dtype, fill: float = 0) -> None:
            self.register_buffer(name, torch.full(shape, fill, dtype=dtype, device=device), persistent=False)

        for x in "kv":
            m, bits = 1 if self.merged[x] else n, config.k_bits if x == "k" else config.v_bits
            buffer(f"{x}_direction", m, B, G, N, D if bits == 16 else D * bits // 8, dtype=dtype if bits == 16 else torch.uint8)
        for x in "kv":
            buffer(f"{x}_magnitude", n, B, G, N, dtype=small)
        buffer("exact", B, G, N if R else 0, dtype=torch.bool)
        for x in "kv":
            buffer(f"{x}_retained", n, B, G, R, D)
        buffer("retained_pos", B, G, R, dtype=torch.int32, fill=N - 1)
        buffer("retained_score", B, G, R, dtype=torch.float32, fill=float("-inf"))
        buffer("score_range", B, G, 2, dtype=torch.float32)
        buffer("overflow", B, G, dtype=torch.int32)
        for x in "kv":
            buffer(f"{x}_window", n, B, G, self.W, D)
        none = torch.empty(0, device=device)
        tables = {"code_rotation": next((codec.rotation for codec in self.codec.values()), none)}
        for name, table in (tables | {f"{x}_levels": self.codec[x].levels if x in self.codec else none for x in "kv"}).items():
            self.register_buffer(name, table, persistent=False)
        self.reset()

    def reset(self, rows: Tensor | None = None) -> None:
        for name in (f"{x}_{part}" for x in "kv" for part in ("direction", "magnitude", "retained", "window")):
            put(getattr(self, name), 1, rows, 0)
        put(self.exact, 0, rows, False)
        put(self.retained_pos, 0, rows, self.k_magnitude.shape[3] - 1)
        put(self.retained_score, 0, rows, float("-inf"))
        put(self.score_range[..., 0], 0, rows, float("inf"))
        put(self.score_range[..., 1], 0, rows, float("-inf"))
        put(self.overflow, 0, rows, 0)

    # -- reading --------------------------------------------------------------------------------------------------------------------
    def columns(self, index: int, length: Tensor, input_pos: Tensor, rows: Tensor | None, limit: int | None = None) -> Iterator[Columns]:
        N, device = self.k_magnitude.shape[3], length.device
        merged_len = (length - self.W).clamp_min(0)[:, None]
        row = slice(None) if rows is None else rows

        def of(name: str, at: slice = slice(None)) -> Tensor:
            buffer = getattr(self, name)
            return buffer[index if buffer.shape[0] > 1 else 0, row, :, at]

        # 1. merged columns: the shared direction, this layer's length
        for at in column_blocks(N, limit):
            column = torch.arange(at.start, at.stop, device=device)
            mask = ((column < merged_len)[:, None] & ~self.exact[row, :, at] if self.R else (column < merged_len)[:, None])[:, :, None]
            yield Columns(self.decode("k", of("k_direction", at)), self.decode("v", of("v_direction", at)),
                          mask & self.in_window(column[None, None], input_pos)[:, None], of("k_magnitude", at), of("v_magnitude", at),
                          self.rotation("k"), self.rotation("v"))
        # 2. retained tokens, exact
        if self.R:
            pos = self.retained_pos[row].flatten(1)[:, None]        # [B', 1, G * R]: positions differ by head
            seen = self.in_window(pos, input_pos).unflatten(-1, (-1, self.R)).movedim(-2, 1) if self.sliding_window else True
            yield Columns(of("k_retained"), of("v_retained"), self.active(row)[:, :, None] & seen)
        # 3. the newest W tokens, exact
        if self.W:
            pos = self.ring_pos(length)[:, None]
            yield Columns(of("k_window"), of("v_window"), ((pos >= 0) & self.in_window(pos, input_pos))[:, None])

    def decode(self, x: str, stored: Tensor) -> Tensor:
        """Stored directions of K or V as vectors, in the rotated basis where they are codes."""
        return self.codec[x].decode(stored) if x in self.codec else stored

    def rotation(self, x: str) -> Tensor | None:
        return self.codec[x].rotation if x in self.codec else None

    def active(self, row: Tensor | slice = slice(None)) -> Tensor:
        """Which retained slots count now [B', G, R]: all that are filled (topk), or those past the threshold of the running range."""
        return self.retained_score[row] > self.threshold(self.score_range[row])[..., None]

    def threshold(self, score_range: Tensor) -> Tensor:
        """Scores above it are retained. score_range [..., 2] -> [...]. The paper's text: d > d_max - gamma (d_max - d_min)."""
        if not self.by_threshold:
            return score_range.new_full(score_range.shape[:-1], float("-inf"))
        least, most = score_range.unbind(-1)
        return torch.where(most >= least, most - self.config.gamma * (most - least), float("inf")).clamp_max(1.0)

    def report(self) -> dict[str, int]:
        """Over rows and heads: slots there are, filled, counting now; tokens past the threshold that found no slot or lost it."""
        return {"retained_slots": self.retained_pos.numel(), "retained_filled": int((self.retained_score > float("-inf")).sum()),
                "retained_active": int(self.active().sum()), "retained_overflow": int(self.overflow.sum())}

    def ring_pos(self, length: Tensor) -> Tensor:
        """length [B'] -> [B', W]: the newest position p < length with p % W == slot; negative where there is none."""
        newest = length[:, None] - 1
        return newest - (newest - torch.arange(self.W, device=length.device)) % self.W

    def read(self, index: int, length: Tensor) -> tuple[Tensor, Tensor]:
        S, N = self.max_seq_len, self.k_magnitude.shape[3]
        B, G, _ = self.retained_pos.shape
        b, g = torch.arange(B, device=length.device)[:, None, None], torch.arange(G, device=length.device)[:, None]
        out = []
        for x in "kv":
            parts = ("direction", "magnitude", "retained", "window")
            direction, magnitude, retained, window = (getattr(self, f"{x}_{part}") for part in parts)
            y = torch.zeros(B, G, S + 1, retained.shape[-1], device=length.device)       # column S takes what is not there
            vectors = self.decode(x, direction[index if direction.shape[0] > 1 else 0]).float()
            vectors = vectors if self.rotation(x) is None else vectors @ self.rotation(x).mT
            y[:, :, :N] = vectors * magnitude[index, ..., None].float()
            y[b, g, torch.where(self.active(), self.retained_pos.long(), S)] = retained[index].float()
            if self.W:
                pos = self.ring_pos(length)
                y[b, g, torch.where(pos >= 0, pos, S)[:, None]] = window[index].float()
            out.append(y[:, :, :S] * (torch.arange(S, device=length.device) < length[:, None])[:, None, :, None])
        return out[0], out[1]

    def attend_fast(self, index: int, q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
        least = self.threshold(self.score_range) if self.by_threshold else self.score_range[:0]
        return torch.ops.minicache.attend(q, k, v, length, least, *self._buffers.values(), index, self.sliding_window or 0, q.dtype)

    # -- writing --------------------------------------------------------------------------------------------------------------------
    def commit(self, k: Tensor, v: Tensor, length: Tensor, n_new: Tensor, rows: Tensor | None = None) -> None:
        form = self.form if self.commits_fast else "reference"
        if form == "cpp" or form == "triton" and k.shape[3] == 1 and rows is None:
            return self.commit_fast(k, v, length, n_new, rows)
        T, W, last = k.shape[3], self.W, self.k_magnitude.shape[3] - 1
        B, G = self.retained_pos.shape[:2]
        b = (torch.arange(B, device=k.device) if rows is None else rows)[:, None, None]
        g = torch.arange(G, device=k.device)[:, None]
        # 1. the tokens that leave the window: T lanes from each row's first unmerged position on
        pos = (length - W).clamp_min(0)[:, None] + torch.arange(T, device=k.device)
        leaves = pos < (length + n_new - W)[:, None]
        leaving = {"k": k, "v": v} if self.R or form == "reference" else {}
        if W and T == 1:
            leaving = {x: getattr(self, f"{x}_window")[:, b, g, (length % W)[:, None, None]] for x in leaving}
        elif W:     # from the ring, or already in this chunk; read before the ring is written
            lane = torch.where(pos < length[:, None], pos % W, W + pos - length[:, None]).clamp(0, W + T - 1)[None, :, None, :, None]
            for x, new in leaving.items():
                both = torch.cat((getattr(self, f"{x}_window")[:, b[:, 0, 0]], new.to(self.k_window.dtype)), 3)
                leaving[x] = both.gather(3, lane.expand(*both.shape[:3], T, both.shape[4]))
        # 2. merged, in place
        if form == "triton":
            distances = self.store_fast(k, v, length, n_new, rows)
        else:       # lanes that hold no leaving token write to the spare column
            distances = self.store(leaving, torch.where(leaves, pos, last)[:, None], b, g)
        # 3. retained: the R largest scores so far
        if self.R:
            self.retain(leaving, sum(distances) / len(distances) if distances else None, pos, leaves, b, g)
        # 4. the ring takes the newest tokens
        if W:
            self.write_window(k, v, length, n_new, b, g)

    def store(self, leaving: dict[str, Tensor], to: Tensor, b: Tensor, g: Tensor) -> list[Tensor]:
        """Merge tokens [n, B', G, T, D] into columns `to` -> how far they are [B', G, T], of K and V where merged."""
        distances = []
        for x, tokens in leaving.items():
            direction, magnitude, d = self.split(tokens.float(), self.merged[x])
            if x in self.codec:     # codes decode to another length: the magnitude makes up for it, so no scale is stored
                direction, length_of_code = self.codec[x].encode(direction)
                magnitude = magnitude / length_of_code
            target = getattr(self, f"{x}_direction")
            target[:, b, g, to] = direction.to(target.dtype)
            target = getattr(self, f"{x}_magnitude")
            most = torch.finfo(target.dtype).max
            target[:, b, g, to] = magnitude.clamp(-most, most).to(target.dtype)
            if d is not None:
                distances.append(d)
        return distances

    def commit_fast(self, *tokens: Tensor | None) -> None:
        torch.ops.minicache.commit(*self.operands(*tokens))

    def store_fast(self, *tokens: Tensor | None) -> list[Tensor]:
        from cache.kernels import triton_commit
        return [d for x, d in zip("kv", triton_commit.store_triton(*self.operands(*tokens)), strict=False) if self.merged[x]]

    def operands(self, *tokens: Tensor | None) -> tuple:
        """All that the operator takes; tokens: k, v, length, n_new, rows."""
        c = self.config
        return (*tokens, *self._buffers.values(), self.rule or 0, c.coef, c.t, c.retention, c.gamma, c.sinks)

    def split(self, x: Tensor, merged: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """x [n, B', G, T, D] fp32 -> direction [m, B', G, T, D], magnitude [n, B', G, T], distance [B', G, T] (None where not merged)."""
        if not merged:
            direction, magnitude = merge(x[None], "mean", t=0.0, coef="norm")
            return direction, magnitude[0], None
        rule = dict(rule=self.config.merge, t=self.config.t, coef=self.config.coef)
        if self.config.granularity == "head":
            direction, magnitude = merge(x, **rule)
            return direction[None], magnitude, distance(x)
        # the paper's shapes: one angle and one direction over all heads of a token, stored per head in the same layout
        whole = x.transpose(2, 3).flatten(3)                                                    # [n, B', T, G * D]
        direction, magnitude = merge(whole, **rule)
        direction = direction.unflatten(-1, (x.shape[2], -1)).transpose(1, 2)                   # [B', G, T, D], of all heads unit together
        unit, share = merge(direction[None, None], "mean", t=0.0, coef="norm")
        return unit, magnitude[:, :, None] * share[0], distance(whole)[:, None].expand(x.shape[1:4])

    def retain(self, leaving: dict[str, Tensor], d: Tensor | None, pos: Tensor, leaves: Tensor, b: Tensor, g: Tensor) -> None:
        """Keep the R largest scores of (kept + leaving), and say which merged columns they mask. d [B', G, T]; pos, leaves [B', T]."""
        T, last, rows, minus = pos.shape[1], self.exact.shape[2] - 1, b[:, 0, 0], float("-inf")
        shape = (pos.shape[0], self.retained_pos.shape[1], T)
        sink, lanes, to = ((x[:, None].expand(shape)) for x in (pos < self.config.sinks, leaves, torch.where(leaves, pos, last)))
        if d is None:                           # layers stored one by one: sinks only
            score = torch.full(shape, minus, device=pos.device)
        else:                                   # "literal" is the sign that the paper prints: it keeps the most similar tokens
            score = -d if self.config.retention == "literal" else d
            ranged, old = lanes & ~sink, self.score_range[rows]
            least = torch.where(ranged, score, -minus).amin(-1).minimum(old[..., 0])
            most = torch.where(ranged, score, minus).amax(-1).maximum(old[..., 1])
            self.score_range[rows] = torch.stack((least, most), -1)
        score = torch.where(lanes, torch.where(sink, SINK, score), minus)
        threshold = self.threshold(self.score_range[rows])[..., None]
        kept_score, kept_pos = self.retained_score[rows], self.retained_pos[rows].long()
        if T == 1:
            # decode: at most one slot changes; of equally bad ones the newest, so that the result does not depend on how tokens arrive
            worst = kept_score.amin(-1, keepdim=True)
            slot = torch.where(kept_score == worst, kept_pos, -1).argmax(-1, keepdim=True)
            wins, old = score > worst, kept_pos.gather(-1, slot)
            lost = torch.where(wins, worst, score)
            self.exact[b, g, torch.where(wins, old, last)] = wins.new_zeros(())       # a plain False would come from the host
            for x, new in leaving.items():
                buffer = getattr(self, f"{x}_retained")
                at = (slice(None), b, g, slot)
                buffer[at] = torch.where(wins[..., None], new.to(buffer.dtype), buffer[at])
            self.retained_pos[b, g, slot] = torch.where(wins, to, old).int()
            self.retained_score[b, g, slot] = torch.where(wins, score, worst)
        else:
            # prefill: old slots in order of position, then the new tokens; a stable sort then prefers the earlier of equals
            order = kept_pos.argsort(-1)
            every = torch.cat((kept_score.gather(-1, order), score), -1)
            best, pick = every.sort(dim=-1, descending=True, stable=True)
            best, pick, lost = best[..., :self.R], pick[..., :self.R], best[..., self.R:]
            self.exact[b, g, kept_pos] = leaves.new_zeros(())
            for x, new in leaving.items():
                buffer = getattr(self, f"{x}_retained")
                source = torch.where(pick < self.R, order.gather(-1, pick.clamp_max(self.R - 1)), pick)
                both = torch.cat((buffer[:, rows], new.to(buffer.dtype)), 3)
                buffer[:, rows] = both.gather(3, source[None, ..., None].expand(*both.shape[:3], self.R, both.shape[4]))
            where = torch.cat((kept_pos.gather(-1, order), to), -1).gather(-1, pick)
            self.retained_pos[rows] = torch.where(best > minus, where, last).int()
            self.retained_score[rows] = best
        self.exact[b, g, self.retained_pos[rows].long()] = self.active(rows)
        if d is not None and self.config.retention != "topk":
            self.overflow[rows] = self.overflow[rows] + (lost > threshold).sum(-1).int()

    def write_window(self, k: Tensor, v: Tensor, length: Tensor, n_new: Tensor, b: Tensor, g: Tensor) -> None:
        T, W, rows = k.shape[3], self.W, b[:, 0, 0]
        for x, new in (("k", k), ("v", v)):
            buffer = getattr(self, f"{x}_window")
            if T == 1:      # decode: the newest token takes the slot of the one that left
                at = (slice(None), b, g, (length % W)[:, None, None])
                buffer[at] = torch.where((n_new > 0)[:, None, None, None], new.to(buffer.dtype), buffer[at])
            else:           # every slot asks which token it holds now: no two lanes write one slot
                lane = self.ring_pos(length + n_new) - length[:, None]
                source = lane.clamp(0, T - 1)[None, :, None, :, None].expand(*new.shape[:3], W, new.shape[4])
                fresh = (lane >= 0)[:, None, :, None]
                buffer[:, rows] = torch.where(fresh, new.gather(3, source).to(buffer.dtype), buffer[:, rows])
