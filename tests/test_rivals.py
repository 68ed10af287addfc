"""The simulated rivals: which tokens are coded when, what a code loses, what packed buffers would take."""
import pytest
import torch

from cache.base import attend_exact
from engine.measure.rivals import Rival, parse_cache, round_to_nearest

SHAPE = dict(n_layer=1, n_kv_head=2, head_dim=16, batch=3, max_seq_len=40, dtype=torch.float32)


def random_kv(n_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n_tokens)
    return tuple(torch.randn(1, 3, 2, n_tokens, 16, generator=generator) for _ in "kv")


def coded(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x [groups, values] rounded between each group's least and largest value: an independent form of what a code loses."""
    out = torch.empty_like(x)
    for i, group in enumerate(x):
        least = float(group.min().half())
        scale = float(torch.tensor((float(group.max()) - least) / (2 ** bits - 1)).half())
        out[i] = torch.tensor([least + scale * min(max(round((float(v) - least) / scale), 0), 2 ** bits - 1) for v in group])
    return out


def expected(rival: Rival, k: torch.Tensor, v: torch.Tensor, length: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Row by row, head by head: K and V [3, 2, n_tokens, 16] with the coded tokens replaced."""
    k, v, g = k[0].clone(), v[0].clone(), rival.group
    for row, n in enumerate(length):
        n_k, n_v = (n, n) if rival.kind == "rtn" else (n // rival.residual * rival.residual, max(n - rival.residual, 0))
        for head in range(2):
            for x, count in ((k, n_k), (v, n_v)):
                part = x[row, head, :count]
                if x is k and rival.kind == "kivi":
                    for start in range(0, count, g):                    # one channel's values over a block of tokens
                        part[start:start + g] = coded(part[start:start + g].T, rival.bits).T
                else:                                                   # one token's values over a block of channels
                    part.copy_(coded(part.reshape(-1, g), rival.bits).view_as(part))
            k[row, head, n:], v[row, head, n:] = 0, 0
    return k, v


@pytest.mark.parametrize("spec", ["rtn,bits=4,group=8", "kivi,bits=2,group=4,residual=8", "kivi,bits=3,group=8,residual=16"])
@pytest.mark.parametrize("pieces", [[37], [20, 17], [13] + [1] * 24])
def test_tokens_are_coded_once_and_when_they_leave_the_exact_ones(spec: str, pieces: list[int]) -> None:
    """Guards the residual's schedule for ragged rows, and that coding does not depend on how tokens arrive (no code of a code)."""
    rival = parse_cache(spec)
    group = rival.build(**SHAPE, device="cpu").groups[0]
    k, v = random_kv(37)
    most = torch.tensor([37, 21, 6])
    length = torch.zeros(3, dtype=torch.long)
    start = 0
    for piece in pieces:
        n_new = (most - start).clamp(0, piece)
        group.commit(k[..., start:start + piece, :], v[..., start:start + piece, :], length, n_new)
        length, start = length + n_new, start + piece
    for got, want in zip(group.read(0, most), expected(rival, k, v, most.tolist()), strict=True):
        torch.testing.assert_close(got[:, :, :37], want, atol=2e-6, rtol=0)


def test_rows_are_coded_in_their_own_slots() -> None:
    """Guards the slot of a row that is written apart from its neighbours: coding row 0 of the call must not touch slot 0 of the cache."""
    rival = parse_cache("kivi,bits=2,group=4,residual=8")
    group = rival.build(**SHAPE, device="cpu").groups[0]
    k, v = random_kv(20)
    zero = torch.zeros(2, dtype=torch.long)
    group.commit(k[:, :2], v[:, :2], zero, zero + 20, torch.tensor([2, 0]))
    got = group.read(0, torch.tensor([20, 0, 20]))
    want = expected(rival, k, v, [20, 20, 0])
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x[[2, 0], :, :20], y[:2], atol=2e-6, rtol=0)
        assert not x[1].any()


def test_a_tokens_own_step_is_exact() -> None:
    """Guards attention against coding the newest token before it was used: it sees coded past columns and its own exact K and V."""
    group = parse_cache("rtn,bits=2,group=8").build(**SHAPE, device="cpu").groups[0]
    (k, v), length = random_kv(9), torch.tensor([8, 8, 8])
    group.commit(k[..., :8, :], v[..., :8, :], length * 0, length)
    past = group.read(0, length)
    own = k[0, :, :, 8:], v[0, :, :, 8:]
    q = torch.randn(3, 4, 1, 16, generator=torch.Generator().manual_seed(1))
    y = group.attend(0, q, *own, length[:, None], torch.ones(3, 1, dtype=torch.bool), None)
    keys, values = (torch.cat((x[:, :, :8], new), 2) for x, new in zip(past, own, strict=True))
    torch.testing.assert_close(y, attend_exact(q, keys, values, torch.ones(1, 1, 1, 9, dtype=torch.bool)))
    assert not torch.equal(group.read(0, length + 1)[0][:, :, 8], k[0, :, :, 8]), "and coded afterwards"


def test_constant_values_survive() -> None:
    """Guards the division by a scale of zero."""
    assert torch.equal(round_to_nearest(torch.full((2, 8), .5), -1, 4), torch.full((2, 8), .5))


@pytest.mark.parametrize(("spec", "bytes_per_head"), [
    # 256 tokens, head_dim 128, bf16: K and V each 256 tokens x (64 bytes of codes + 4 groups x 4)
    ("rtn,bits=4", {"codes": 2 * 256 * 64, "scales": 2 * 256 * 16}),
    # K: 256 in codes at most; V: 128; and 128 exact slots for each
    ("kivi,bits=2", {"codes": (256 + 128) * 32, "scales": (256 + 128) * 16, "residual": 2 * 128 * 256}),
    # fewer tokens than the residual are never coded
    ("kivi,bits=2,residual=512", {"codes": 0, "scales": 0, "residual": 2 * 256 * 256})])
def test_bytes_are_those_of_packed_buffers(spec: str, bytes_per_head: dict[str, int]) -> None:
    """Guards the table against the size of the simulation's own buffers."""
    shape = dict(n_layer=2, n_kv_head=3, head_dim=128, batch=5, max_seq_len=256, dtype=torch.bfloat16)
    nbytes = parse_cache(spec).build(**shape, device="meta").nbytes()
    assert nbytes == {kind: 2 * 3 * 5 * n for kind, n in bytes_per_head.items()}
    if spec == "rtn,bits=4":
        assert 2 * 2 * 3 * 5 * 256 * 128 * 2 / sum(nbytes.values()) == 3.2


@pytest.mark.parametrize(("spec", "message"), [
    ("kivy,bits=4", "cache kind 'kivy' does not exist; choose one of: full, quant, minicache, rtn, kivi"),
    ("rtn,residual=32", "'residual=32' is not one of rtn's"), ("kivi,bits=two", "'bits=two' is not one of kivi's"),
    ("kivi,bits=16", "bits=16 does not exist for kivi"), ("kivi,residual=40", "residual=40 is no multiple of group=32"),
    ("rtn,group=0", "group=0 is less than 1")])
def test_a_wrong_spec_is_refused(spec: str, message: str) -> None:
    """Guards the one line that says what is wrong and what exists."""
    with pytest.raises(ValueError, match=message):
        parse_cache(spec)


def test_a_group_that_does_not_divide_the_head_is_refused() -> None:
    """Guards against a traceback from deep inside a run."""
    with pytest.raises(ValueError, match="group=32 does not divide head_dim 16"):
        parse_cache("rtn").build(**SHAPE, device="meta")
