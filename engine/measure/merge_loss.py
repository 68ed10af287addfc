"""What a group of layers loses at attention's output when it is merged, and coordinates that make the loss small: the maths of `align`.

Contract: the loss is the squared error of what attention adds to the hidden state, relative to it, mean of the layers, when K (or V, apart)
are merged and coded as in the cache and read beside exact sinks and window; of retained tokens it knows nothing. Maps: K's complex
[n, G, D / 2], V's [n, G, D, D].
Trap: the cosine is not the loss. Attention weighs exact columns (sinks) against merged ones, and keys that are too short shift weight.
"""
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cache import CacheConfig
from cache.merge import merge
from weights.alignment import MAX_CONDITION, as_complex, change

QUERIES, BATCH = 64, 4      # a step of the fit looks at the attention of so many positions in so many windows
# Relative squared error of codes by bits (Lloyd-Max, normal law): no map may live on digits that codes drop. 16: codes may come later.
CODE_NOISE = {16: .0095, 8: .00004, 4: .0095, 3: .0345, 2: .1175}
RATES = {"k": .03, "v": .01}


@dataclass
class States:
    """A layer on the calibration windows, fp32: q [N, H, T, D], k, v [N, G, T, D] after RoPE; wo [C, H, D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    wo: Tensor

    def in_order(self, order: Tensor) -> "States":
        """kv head order[g] in slot g, its query heads with it."""
        q, wo = (x.unflatten(1, (len(order), -1))[:, order].flatten(1, 2) for x in (self.q, self.wo))
        return States(q, self.k[:, order], self.v[:, order], wo)


class Group:
    """The layers that share storage, kv heads in their slots, and what maps lose: of K complex [n, G, D / 2], of V [n, G, D, D]."""

    def __init__(self, states: Sequence[States], cache: CacheConfig, sliding_window: int | None) -> None:
        self.states, self.cache = states, cache
        self.x = {x: torch.stack([getattr(s, x) for s in states]) for x in "kv"}                        # [n, N, G, T, D]
        n, N, G, T, D = self.x["k"].shape
        i = torch.arange(T, device=self.x["k"].device)
        back = i[:, None] - i
        self.seen, self.exact = (back >= 0) & (back < (sliding_window or T)), (back <= cache.window) | (i < cache.sinks)
        self.fitted, self.judges = torch.arange(N - max(1, N // 4)), torch.arange(N - max(1, N // 4), N)
        eye = torch.eye(D, device=i.device).expand(n, G, D, D)
        self.own = {"k": torch.ones(n, G, D // 2, dtype=torch.complex64, device=i.device), "v": eye}

    def merged(self, x: str, maps: Tensor, windows: Tensor) -> Tensor:
        """K or V of some windows as the cache would give them back, [n, N', G, T, D], the error of codes as noise."""
        stored = change(self.x[x][:, windows], maps[:, None])
        direction, coefficient = merge(stored, self.cache.merge, t=self.cache.t, coef=self.cache.coef)
        noise = CODE_NOISE[self.cache.k_bits if x == "k" else self.cache.v_bits]
        direction = direction + torch.randn_like(direction) * (noise / direction.shape[-1]) ** .5
        return change(coefficient[..., None] * direction, (1 / maps if x == "k" else torch.linalg.inv(maps))[:, None])

    def loss(self, x: str, maps: Tensor, windows: Tensor, queries: Tensor) -> Tensor:
        """Squared error of the attention's output relative to the output, mean over layers: K or V merged where they are not exact."""
        losses = []
        for s, merged in zip(self.states, self.merged(x, maps, windows), strict=True):
            q, k, v = s.q[windows][:, :, queries], s.k[windows], s.v[windows]
            q = q.unflatten(1, (k.shape[1], -1))                                                        # [N', G, H / G, Q, D]
            score = q @ k[:, :, None].mT * k.shape[-1] ** -.5
            p = score.masked_fill(~self.seen[queries], float("-inf")).softmax(-1)
            exact, of = self.exact[queries], s.wo.unflatten(1, (k.shape[1], -1))
            if x == "v":
                error, reference = (p * ~exact) @ (merged - v)[:, :, None], p @ v[:, :, None]
            else:
                score = torch.where(exact, score, q @ merged[:, :, None].mT * k.shape[-1] ** -.5)
                reference = p @ v[:, :, None]
                error = score.masked_fill(~self.seen[queries], float("-inf")).softmax(-1) @ v[:, :, None] - reference
            error, reference = (torch.einsum("bghtd,cghd->btc", y, of).square().sum() for y in (error, reference))
            losses.append(error / reference)
        return torch.stack(losses).mean()

    @torch.no_grad()
    def judge(self, x: str, maps: Tensor) -> float:
        """The loss on the windows that `refine` and `start` do not see, at every fourth position."""
        torch.manual_seed(0)
        return float(self.loss(x, maps, self.judges, torch.arange(3, self.seen.shape[0], 4)))

    def start(self, x: str) -> Tensor:
        """Orthogonal maps in closed form: every layer turned to the first so that a shared direction keeps most of their energy.

        Of two vectors a and R b it keeps (|a|^2 + |b|^2) / 2 + sqrt(((|a|^2 - |b|^2) / 2)^2 + (a . R b)^2), convex in R: each round
        solves the tangent problem max sum w a . R b, w the derivative by the product (Procrustes for V, a phase for K), and cannot lose.
        """
        first, *others = self.x[x][:, self.fitted].transpose(1, 2).flatten(2, 3)                        # [G, N T, D] each
        maps = [self.own[x][0]]
        for b in others:
            r = self.own[x][0]
            half = (first.square().sum(-1) - b.square().sum(-1)) / 2
            for round in range(12):
                dot = (first * change(b, r)).sum(-1)
                w = dot / (half.square() + dot.square()).sqrt().clamp_min(1e-20) if round else torch.ones_like(dot)
                if x == "k":
                    r = (as_complex(first) * as_complex(b).conj() * w[..., None]).sum(1)
                    r = torch.polar(torch.ones_like(r.abs()), r.angle())         # a pair that is 0 throughout keeps its phase
                else:
                    u, _, v = torch.linalg.svd((first * w[..., None]).mT @ b)
                    r = u @ v
            maps.append(r)
        return torch.stack(maps)

    def refine(self, x: str, maps: Tensor, *, steps: int, invertible: bool) -> Tensor:
        """Adam on the loss, from `maps` on: of K phases and, if `invertible`, scales; V's maps times exp of a matrix, skew if not."""
        generator = torch.Generator().manual_seed(0)
        free = torch.zeros((2, *maps.shape) if x == "k" else maps.shape, device=maps.device, requires_grad=True)

        def current() -> Tensor:
            if x == "k":
                return maps * torch.polar((free[0] * invertible).exp(), free[1])
            return torch.linalg.matrix_exp(free if invertible else free - free.mT) @ maps

        optimiser = torch.optim.Adam([free], lr=RATES[x])
        schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, max(steps, 1))
        for _ in range(steps):
            windows = self.fitted[torch.randperm(len(self.fitted), generator=generator)[:BATCH]]
            queries = torch.randperm(self.seen.shape[0], generator=generator)[:QUERIES]
            optimiser.zero_grad()
            self.loss(x, current(), windows, queries).backward()
            optimiser.step()
            schedule.step()
        return bounded(current().detach())


def stretch(maps: Tensor) -> Tensor:
    """By how much a map stretches its principal directions: [..., D or D / 2]."""
    return maps.abs() if maps.is_complex() else torch.linalg.svdvals(maps)


def bounded(maps: Tensor) -> Tensor:
    """The same within what `read_alignment` takes: condition number and distance from 1 under MAX_CONDITION."""
    s = stretch(maps)
    to = s.clamp(1.01 / MAX_CONDITION, .99 * MAX_CONDITION)
    to = to.clamp_min(to.amax(-1, keepdim=True) * 1.01 / MAX_CONDITION)
    if maps.is_complex():
        return maps * (to / s)
    u, _, v = torch.linalg.svd(maps)
    return u * to[..., None, :] @ v
