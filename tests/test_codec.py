"""Low-bit directions: the codebook against its theory, packing, the rotation, and what a cache of codes gives back."""
import math

import pytest
import torch
from torch.nn.functional import normalize

from cache import CacheConfig, build_cache
from cache.codec import Codec, make_codecs, normal_levels, rotation_matrix

# Mean squared error of the optimal quantiser of N(0, 1) with 4, 8, 16 levels: Max (1960), table I; 256 levels: pi sqrt(3) / 2 / 256^2
LIMIT = {2: 0.1175, 3: 0.03454, 4: 0.009497, 8: 4.15e-5}


def directions(n: int, head_dim: int) -> torch.Tensor:
    return normalize(torch.randn(n, head_dim, generator=torch.Generator().manual_seed(head_dim)), dim=-1)


def codec(bits: int, head_dim: int) -> Codec:
    return make_codecs({bits}, head_dim, "cpu")[bits]


@pytest.mark.parametrize("bits, level", [(2, 0.4528), (3, 0.2451), (4, 0.1284)])
def test_levels_are_those_of_the_literature(bits: int, level: float) -> None:
    """Guards: an iteration that stopped early, or levels of another law. Max (1960): the smallest positive level."""
    levels = torch.tensor(normal_levels(bits))
    assert len(levels) == 2 ** bits and levels[2 ** bits // 2].item() == pytest.approx(level, abs=1e-4)
    assert (levels.diff() > 0).all() and torch.allclose(levels, -levels.flip(0))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_error_is_within_five_percent_of_the_limit(bits: int, head_dim: int) -> None:
    """Guards: a lost bit, a wrong plane, a codebook that does not fit the rotated coordinates; with the length kept, as it is stored."""
    u, c = directions(3000, head_dim), codec(bits, head_dim)
    packed, length = c.encode(u)
    assert packed.shape == (3000, head_dim * bits // 8) and packed.dtype == torch.uint8
    back = (c.decode(packed) / length[:, None]) @ c.rotation.T
    assert (back - u).square().sum(-1).mean().item() < 1.05 * LIMIT[bits]
    assert torch.allclose(back.norm(dim=-1), torch.ones(3000), atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packing_keeps_every_code(bits: int) -> None:
    """Guards: planes in another order, or a code that leaks into its neighbour: codes are encoded from what they decode to."""
    c = codec(bits, 96)
    vectors = c.levels[torch.randint(0, 2 ** bits, (50, 96), generator=torch.Generator().manual_seed(0))]
    packed, length = c.encode(vectors / math.sqrt(96) @ c.rotation.T)
    assert torch.equal(c.decode(packed), vectors) and torch.allclose(length, vectors.norm(dim=-1))


@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 192, 256])
def test_rotation_is_orthogonal_and_spreads_every_axis(head_dim: int) -> None:
    """Guards: a Paley matrix that is no Hadamard matrix; a rotation that leaves one large coordinate large."""
    r = rotation_matrix(head_dim)
    assert torch.allclose(r @ r.T, torch.eye(head_dim, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(r.abs(), torch.full_like(r, head_dim ** -0.5))


@pytest.mark.parametrize("head_dim", [7, 12, 72, 100])
def test_a_head_dim_without_codes_is_refused(head_dim: int) -> None:
    """Guards: a traceback, or silently another rotation."""
    with pytest.raises(ValueError, match=f"head_dim {head_dim} .*bits=16"):
        make_codecs({4}, head_dim, "cpu")


@pytest.mark.parametrize("spec", ["quant,bits={},window=0,sinks=0", "minicache,bits={},merge_from=0,coef=norm,window=0,sinks=0,retain=0"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_restored_token_has_its_length(spec: str, bits: int) -> None:
    """Guards: the magnitude not corrected by the length of the code; norms of real tokens span orders of magnitude."""
    cache = build_cache(CacheConfig.parse(spec.format(bits)), n_layer=2, n_kv_head=2, head_dim=64, batch=1, max_seq_len=33,
                        dtype=torch.float32, device="cpu")
    k, v = torch.randn(2, 2, 1, 2, 32, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 32)[:, None]
    length, n_new = torch.tensor([0]), torch.tensor([32])
    for group in cache.groups:
        at = list(group.layers)
        group.commit(k[at], v[at], length, n_new)
    for layer, handle in enumerate(cache.layers):
        for got, want in zip(handle.group.read(handle.index, n_new), (k[layer], v[layer]), strict=True):
            torch.testing.assert_close(got[:, :, :32].norm(dim=-1), want.norm(dim=-1), rtol=1e-5, atol=0)


def test_k_and_v_have_their_own_bits() -> None:
    """Guards: one width for both, and bytes that do not follow."""
    group = build_cache(CacheConfig.parse("quant,k_bits=4,v_bits=3"), n_layer=1, n_kv_head=1, head_dim=96, batch=1, max_seq_len=20,
                        dtype=torch.bfloat16, device="cpu").groups[0]
    assert group.k_direction.shape[-1] == 48 and group.v_direction.shape[-1] == 36
