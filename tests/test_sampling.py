"""Sampling: what may be drawn, how often, and that a request's ids are its own.

`sample` is compared with a reference written the long way: sort, cut, renormalise. Everything is seeded: no test can flake.
"""
import pytest
import torch
from test_engine import LONG, PROMPTS, alone, run, tiny

import engine.sampling
from engine import SamplingParams
from engine.sampling import exponential_noise, sample

N, V = 20000, 12
LOGITS = torch.randn(V, generator=torch.Generator().manual_seed(0)).flip(0) * 1.5


def draw(logits: torch.Tensor, *, method: str = "filtered", temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
         seed: int = 0, n: int = N) -> torch.Tensor:
    """n ids [n] from logits [V], by n seeds in a row."""
    def column(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((n,), value, dtype=dtype)
    return sample(logits.expand(n, -1), method, column(temperature, torch.float32), column(top_k, torch.int64),
                  column(top_p, torch.float32), seed + torch.arange(n), column(9, torch.int64))


def reference(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """Probabilities [V]: the top_k likeliest, of these the fewest whose share of them reaches top_p."""
    p = (logits.double() / temperature).softmax(-1)
    order = sorted(range(len(p)), key=lambda i: -p[i])[:top_k or len(p)]
    p = p / p[order].sum()
    kept, total = [], 0.0
    for i in order:
        if kept and total >= top_p:
            break
        kept.append(i)
        total += p[i].item()
    q = torch.zeros_like(p)
    q[kept] = p[kept]
    return q / q.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (1, 1.0), (3, 1.0), (50, 1.0), (0, 0.5), (0, 0.9), (0, 1e-50), (4, 0.7), (2, 0.95),
                                          (3, 0.5)])
def test_frequencies_equal_the_reference(temperature: float, top_k: int, top_p: float) -> None:
    """Guards: a forbidden id drawn once in thousands, the id that crosses top_p cut, a filter before the temperature."""
    expected = reference(LOGITS, temperature, top_k, top_p)
    count = draw(LOGITS, temperature=temperature, top_k=top_k, top_p=top_p).bincount(minlength=V)
    assert not count[expected == 0].any(), "an id outside top_k or top_p"
    error = (count / N - expected).abs()
    assert (error < 4.5 * (expected * (1 - expected) / N).sqrt() + 1e-9).all()
    if top_k == 0 and top_p == 1:
        assert torch.equal(count, draw(LOGITS, temperature=temperature, method="plain").bincount(minlength=V))


def test_a_row_without_filters_keeps_every_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a text changed by a neighbour that has filters: a rounded cumulated sum passes 1 and cuts the tail of a real vocabulary."""
    logits = torch.randn(128256, generator=torch.Generator().manual_seed(4)) * 2
    rare = logits.argsort()[:20]
    noise = torch.ones(20, len(logits)).index_put((torch.arange(20), rare), torch.tensor(1e-30))    # noise that picks one of them
    monkeypatch.setattr(engine.sampling, "exponential_noise", lambda *_: noise)
    for method in ("plain", "filtered"):
        assert torch.equal(draw(logits, method=method, n=20), rare)


@pytest.mark.parametrize("method", ["greedy", "plain", "filtered"])
@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1e-6, 1e4])
def test_extreme_logits_and_temperatures(method: str, temperature: float) -> None:
    """Guards: nan from a division by a tiny temperature or from an overflow: an id that is anything."""
    for logits in (LOGITS * 1e4, LOGITS.masked_fill(LOGITS < 0, float("-inf")), torch.zeros(V), LOGITS - 1e6):
        ids = draw(logits, method=method, temperature=temperature, top_k=5 if method == "filtered" else 0, n=50)
        assert ((0 <= ids) & (ids < V)).all() and (logits[ids] > float("-inf")).all()
        if method == "greedy" or temperature < 1e-9 and logits.unique().numel() > 1:
            assert (ids == logits.argmax()).all()


def test_noise_is_exponential() -> None:
    """Guards: a hash with structure: wrong mean, gaps, zeros or infinities, rows that follow their neighbours in seed or position."""
    seed, position = (x.flatten() for x in torch.meshgrid(torch.arange(25), torch.arange(40), indexing="ij"))
    x = exponential_noise(seed, position, 1000)
    assert x.dtype == torch.float32 and x.isfinite().all() and (x > 0).all()
    n = x.numel()
    assert abs(x.mean() - 1) < 4 / n ** 0.5
    empirical, law = torch.arange(n) / n, 1 - (-x.flatten().double().sort().values).exp()
    assert (empirical - law).abs().max() < 1.95 / n ** 0.5          # Kolmogorov-Smirnov, one in a thousand
    grid = (x - 1).view(25, 40, 1000)
    for a, b in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1]), (grid[..., 1:], grid[..., :-1]),
                 (grid[:25, :25], grid[:25, :25].transpose(0, 1).roll(1, 2))):
        assert abs((a * b).mean()) < 4 / a.numel() ** 0.5


def test_noise_depends_on_all_of_seed_and_position() -> None:
    """Guards: high bits of a seed dropped, (seed, position) added up so that pairs collide, an overflow at the largest values."""
    seeds = torch.tensor([0, 1, 2 ** 32, 2 ** 32 + 1, 2 ** 63 - 1, 2 ** 63 - 2, 2 ** 62, 40])
    positions = torch.tensor([1, 2, 3, 40, 131071, 10 ** 6])
    seed, position = (x.flatten() for x in torch.meshgrid(seeds, positions, indexing="ij"))
    x = exponential_noise(seed, position, 8)
    assert x.isfinite().all() and len(x.unique(dim=0)) == len(x)
    assert torch.equal(x[7:8], exponential_noise(seed[7:8], position[7:8], 8)), "a row depends on its neighbours"
    assert torch.equal(x, exponential_noise(seed, position, 16)[:, :8]), "an entry depends on the vocabulary's size"


def test_sampled_rows_equal_the_rows_alone() -> None:
    """Guards: noise, temperature or filters that leak to a neighbour; temperature 0 in a mixed batch stays greedy."""
    params = [SamplingParams(max_new_tokens=LONG, temperature=t, top_k=k, top_p=p, seed=s) for t, k, p, s in
              [(1.0, 0, 1.0, 3), (0.0, 0, 1.0, 3), (0.7, 5, 1.0, 3), (1.3, 0, 0.6, 2 ** 63 - 1), (0.9, 9, 0.9, 0), (1.0, 1, 1.0, 1),
               (1.0, 0, 1.0, 4)]]
    tokens, _ = run(tiny(3), PROMPTS, params)
    assert tokens == [alone(p, s) for p, s in zip(PROMPTS, params, strict=True)]
    greedy = SamplingParams(max_new_tokens=LONG)
    assert tokens[1] == alone(PROMPTS[1], greedy) and tokens[5] == alone(PROMPTS[5], greedy)
    assert tokens[0] != alone(PROMPTS[0], greedy)


def test_a_text_goes_on_as_it_began() -> None:
    """Guards: noise that depends on more than seed and position, or the noise of one position used for two tokens."""
    params = SamplingParams(max_new_tokens=LONG, temperature=1, seed=5)
    tokens = alone(PROMPTS[1], params)
    for n in (1, 2, 7):
        assert alone(PROMPTS[1] + tokens[:n], params)[:LONG - n] == tokens[n:]


def test_same_seed_same_ids_and_no_seed_another_text() -> None:
    """Guards: a hidden random state; a default seed that is a constant; a reseeded generator of the caller's."""
    seeded, unseeded = SamplingParams(max_new_tokens=LONG, temperature=1, seed=5), SamplingParams(max_new_tokens=LONG, temperature=1)
    e = tiny(2)
    (a, b), _ = run(e, [[5], [5]], seeded)
    assert a == b == run(e, [[5]], seeded)[0][0]
    torch.manual_seed(0)
    (c, d), _ = run(e, [[5], [5]], unseeded)
    assert c != d
    assert torch.initial_seed() == 0, "the engine reseeded torch's global generator"



@pytest.mark.parametrize("setting, message", [
    ({"temperature": -1}, "temperature is -1"), ({"temperature": float("nan")}, "temperature is nan"),
    ({"temperature": float("inf")}, "temperature is inf"), ({"top_k": -1}, "top_k is -1"), ({"top_p": 0}, "top_p is 0"),
    ({"top_p": 1.01}, "top_p is 1.01"), ({"top_p": float("nan")}, "top_p is nan"), ({"seed": -1}, "seed is -1"),
    ({"seed": 2 ** 63}, "seed is 9223372036854775808"), ({"max_new_tokens": 0}, "max_new_tokens is 0")])
def test_settings_out_of_range(setting: dict[str, float], message: str) -> None:
    """Guards: a setting that is silently clamped, or an overflow deep inside the step."""
    with pytest.raises(ValueError, match=message) as caught:
        SamplingParams(**setting)
    assert "\n" not in str(caught.value)
