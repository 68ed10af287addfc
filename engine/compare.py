"""What a cache loses, measured: two engines on the same weights are fed the same tokens, one with the full cache.

Teacher-forced: after the prompt both read `targets`, whatever they would have said themselves, so every position compares like with like.
"""
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cache import CacheConfig, GroupPrefill, KVCache
from engine.engine import Engine, check_memory
from weights import available_bytes
from weights.alignment import LayerMap


@torch.inference_mode()
def forced_logits(engine: Engine, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], *,
                  chunk: bool = False, exact: KVCache | None = None,
                  maps: Mapping[int, LayerMap] | None = None) -> Iterator[Tensor]:
    """Yields logits [B, V] for target 0, 1, ... of every row, fed token by token as in decoding; a row past its end repeats garbage.

    At most one prompt per engine row; B is max_batch_size, rows without a prompt last. After an empty prompt the first logits mean nothing.
    A row must hold len(prompt) + len(target) - 1 tokens.
    chunk: the targets pass at once, over the prompts as stored and over each other exactly; B is then len(prompts).
    exact: a full cache whose rows hold these prompts; they are stored from it, not computed again, and target 0, whose logits come
    from the exact prompt whatever the cache, is left out. maps: what the engine's model is aligned by, where `exact` is not.
    """
    idle = engine.max_batch_size - len(prompts)
    tensor = lambda x: torch.tensor(x, device=engine.device)        # noqa: E731
    n_prompt, n_target = tensor([len(p) for p in prompts]), tensor([len(t) for t in targets])
    width, steps = max(int(n_prompt.max()), 1), int(n_target.max())
    fed = tensor([list(t) + [0] * (steps - len(t)) for t in targets])
    engine.cache.reset()
    rows = torch.arange(len(prompts), device=engine.device)
    if exact is None:
        x = engine.prefill(tensor([list(p) + [0] * (width - len(p)) for p in prompts]), torch.zeros_like(n_prompt), n_prompt, rows, past=0)
        yield engine.model.logits(x[rows, n_prompt - 1])
    else:
        maps = maps or {}
        for group in engine.cache.groups:
            prefill, lent = GroupPrefill(group, width, past=0), []
            for layer in group.layers:
                k, v = (getattr(exact.groups[layer], name)[:len(prompts), :, :width] for name in "kv")
                lent.append(maps[layer].apply(k, v) if layer in maps else (k, v))
            prefill.k, prefill.v = (torch.stack(x) for x in zip(*lent, strict=True))
            prefill.commit(torch.zeros_like(n_prompt), n_prompt, rows)
    if chunk and steps > 1:
        x = engine.prefill(fed[:, :-1], n_prompt, n_target - 1, rows, past=width)
        yield from (engine.model.logits(x[:, i]) for i in range(steps - 1))
        return
    n_prompt, n_target, fed = (F.pad(t, (0, 0) * (t.dim() - 1) + (0, idle)) for t in (n_prompt, n_target, fed))
    for i in range(steps - 1):
        alive = i < n_target - 1
        yield engine.step.logits(fed[:, i], n_prompt + torch.minimum(tensor(i), n_target - 1), alive)


def token_losses(p: Tensor, q: Tensor, want: Tensor) -> Tensor:
    """Log-probabilities [B, V] of the full cache and of another, the true tokens [B] -> [3, B] fp64: the other's negative log-likelihood,
    KL(full || other), both in nats, and 1 where both have the same likeliest token."""
    same = p.argmax(-1) == q.argmax(-1)
    return torch.stack((-q.gather(1, want[:, None])[:, 0], (p.exp() * (p - q)).sum(-1), same.float())).double()


def compare(full: Engine, other: Engine, prompts: Sequence[Sequence[int]],
            targets: Sequence[Sequence[int]]) -> dict[str, float | list[float]]:
    """Figures over all target tokens: nll_full, nll (nats per token), kl (nats per token, full against other), top1_agreement (share),
    and per layer the relative error |stored - full| / |full| of K and V at the end, which holds the loss of storage and of drifted states.
    """
    rows, total = len(prompts), dict(nll_full=0.0, nll=0.0, kl=0.0, top1_agreement=0.0)
    pairs = zip(forced_logits(full, prompts, targets), forced_logits(other, prompts, targets), strict=True)
    for i, logits in enumerate(pairs):
        at = [row for row in range(rows) if i < len(targets[row])]
        p, q = (x[at].log_softmax(-1) for x in logits)
        want = torch.tensor([targets[row][i] for row in at], device=p.device)
        total["nll_full"] -= p.gather(1, want[:, None]).sum().item()
        for name, loss in zip(("nll", "kl", "top1_agreement"), token_losses(p, q, want).sum(1).tolist(), strict=True):
            total[name] += loss
    n = sum(map(len, targets))
    means: dict[str, float | list[float]] = {name: value / n for name, value in total.items()}
    stored = [len(p) + len(t) - 1 for p, t in zip(prompts, targets, strict=True)] + [0] * (full.max_batch_size - rows)
    length = torch.tensor(stored, device=full.device).clamp_max(full.max_seq_len - 1)       # the last column may be a spare one
    errors = [[float((a.float() - b.float()).norm() / a.float().norm().clamp_min(1e-20)) for a, b in
               zip(want.group.read(want.index, length), got.group.read(got.index, length), strict=True)]
              for want, got in zip(full.cache.layers, other.cache.layers, strict=True)]
    return means | {"k_error_by_layer": [e[0] for e in errors], "v_error_by_layer": [e[1] for e in errors]}


def check_room_for_full(engine: Engine) -> None:
    """ValueError where memory cannot hold a full cache beside the engine's: asked before the work that `compare_to_full` judges."""
    full, room = CacheConfig(), available_bytes(engine.device)
    if room is not None and engine.device.type == "cpu":        # a CPU gives pages when they are written
        room -= sum(engine.cache.nbytes().values())
    need = sum(full.nbytes(**engine.shape).values())
    check_memory(full, need, engine.max_batch_size, engine.max_seq_len, engine.device, room)


@torch.inference_mode()
def compare_to_full(engine: Engine, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> dict[str, float | list[float]]:
    """`compare` of an engine with one on the same weights and a full cache, made here, over any number of texts; forgets what rows hold.

    Figures per token are means over all tokens, those per layer over batches. ValueError if memory cannot hold both caches.
    """
    full = Engine(engine.model, max_batch_size=engine.max_batch_size, max_seq_len=engine.max_seq_len, compile=False)
    engine.stored = [[] for _ in engine.stored]
    texts = [(p, t) for p, t in zip(prompts, targets, strict=True) if t]
    batches = [texts[i:i + engine.max_batch_size] for i in range(0, len(texts), engine.max_batch_size)]
    parts = [(sum(len(t) for _, t in batch), compare(full, engine, *zip(*batch, strict=True))) for batch in batches]
    total = max(sum(n for n, _ in parts), 1)

    def mean(name: str, index: int | None = None) -> float:
        return sum(n / total * (part[name] if index is None else part[name][index]) for n, part in parts)

    return {name: mean(name) if isinstance(value, float) else [mean(name, i) for i in range(len(value))]
            for name, value in (parts[0][1] if parts else {}).items()}
