"""Low-bit unit directions: a fixed rotation, a fixed codebook, packed codes. No scale and no zero: the stored magnitude is the scale.

A unit vector's coordinates after a fixed orthogonal rotation are near Gaussian with variance 1 / D whatever the vector was, so one
codebook (Lloyd-Max levels of the normal law) serves every token, head and layer, and a token is coded without a look at its neighbours.
Codes stand in the rotated basis. Scores need no way back when q is rotated too; sums over V are rotated back once per query.
Trap: packing is by planes, coordinate c of a plane with p codes a byte sits in byte c mod (D / p); 3 bits are two planes, 2 + 1.
"""
import functools
import math

import torch
import torch.nn as nn
from torch import Tensor

PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}         # bits of a code -> widths of the planes that hold them, low bits first


@functools.cache
def normal_levels(bits: int) -> tuple[float, ...]:
    """2**bits Lloyd-Max levels of N(0, 1), ascending: each the mean of the law between the midpoints to its neighbours (Max, 1960)."""
    n = 2 ** bits
    x = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n) * math.sqrt(3)      # density ^ 1/3: near the optimum
    edge = torch.tensor([math.inf], dtype=torch.float64)
    for _ in range(600 if bits < 8 else 300):
        cut = torch.cat((-edge, (x[1:] + x[:-1]) / 2, edge))
        density, below = torch.exp(-cut.square() / 2) / math.sqrt(2 * math.pi), torch.special.ndtr(cut)
        x = (density[:-1] - density[1:]) / (below[1:] - below[:-1])
        x = (x - x.flip(0)) / 2                         # the law is symmetric
    return tuple(x.tolist())


@functools.cache
def rotation_matrix(head_dim: int) -> Tensor:
    """Orthogonal [D, D] fp64: a Hadamard matrix with fixed random column signs, / sqrt(D). ValueError where no order is known to us.

    Orders 2^k by Sylvester, 12 * 2^k and 20 * 2^k by Paley's first construction (q = 11, 19): 96 = 12 * 8 for Phi-3-mini.
    """
    rest, doublings = head_dim, 0
    while rest % 2 == 0 and rest not in (12, 20):
        rest, doublings = rest // 2, doublings + 1
    if rest not in (1, 12, 20):
        raise ValueError(f"head_dim {head_dim} has no Hadamard rotation here; low-bit codes need 2^k, 12 * 2^k or 20 * 2^k: use bits=16")
    h = torch.ones(1, 1, dtype=torch.float64) if rest == 1 else paley(rest - 1)
    for _ in range(doublings):
        h = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.float64), h)
    # signs break the alignment of structured vectors (one large coordinate, a constant) with rows of the matrix
    sign = torch.randint(0, 2, (head_dim,), generator=torch.Generator().manual_seed(head_dim)) * 2 - 1
    return sign[:, None] * h / math.sqrt(head_dim)


def paley(q: int) -> Tensor:
    """Hadamard matrix of order q + 1 for a prime q = 3 mod 4: I + S with S the bordered table of quadratic residues."""
    residues = {i * i % q for i in range(1, q)}
    s = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    s[0, 1:], s[1:, 0] = 1, -1
    for i in range(q):
        for j in range(q):
            if i != j:
                s[i + 1, j + 1] = 1 if (i - j) % q in residues else -1
    return s + torch.eye(q + 1, dtype=torch.float64)


class Codec(nn.Module):
    """`bits` a coordinate for vectors of head_dim D. One object serves all groups of a cache; its tables are buffers, for CUDA graphs."""

    def __init__(self, bits: int, rotation: Tensor) -> None:
        """rotation [D, D] fp32 (shared between codecs), from `rotation_matrix`; D a multiple of 8."""
        super().__init__()
        self.bits, self.head_dim = bits, rotation.shape[0]
        self.register_buffer("rotation", rotation, persistent=False)
        self.register_buffer("levels", torch.tensor(normal_levels(bits), device=rotation.device), persistent=False)
        self.register_buffer("cuts", (self.levels[1:] + self.levels[:-1]) / 2, persistent=False)

    def encode(self, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Unit direction [..., D] fp32, not rotated -> packed codes [..., D * bits / 8] uint8, and the length [...] that they decode to."""
        codes = torch.bucketize(direction @ self.rotation * math.sqrt(self.head_dim), self.cuts)
        length = self.levels[codes].square().sum(-1).sqrt()
        planes, shift = [], 0
        for width in PLANES[self.bits]:
            plane = (codes >> shift & 2 ** width - 1).unflatten(-1, (8 // width, -1))
            place = torch.arange(0, 8, width, device=codes.device)[:, None]
            planes.append((plane << place).sum(-2).to(torch.uint8))
            shift += width
        return torch.cat(planes, -1), length

    def decode(self, packed: Tensor) -> Tensor:
        """Packed codes [..., D * bits / 8] -> code vectors [..., D] fp32 in the rotated basis, of length near sqrt(D)."""
        codes, shift = 0, 0
        for plane, width in zip(packed.split([self.head_dim * w // 8 for w in PLANES[self.bits]], -1), PLANES[self.bits], strict=True):
            place = torch.arange(0, 8, width, device=packed.device, dtype=torch.uint8)[:, None]
            codes = codes | (plane.unsqueeze(-2) >> place & 2 ** width - 1).flatten(-2).int() << shift
            shift += width
        return self.levels[codes]


def make_codecs(bits: set[int], head_dim: int, device: torch.device | str) -> dict[int, Codec]:
    """One codec for each width below 16, all on one rotation. ValueError where head_dim has none."""
    widths = sorted(bits - {16})
    if widths and head_dim % 8:
        raise ValueError(f"head_dim {head_dim} is not a multiple of 8, so its codes fill no whole bytes: use bits=16")
    rotation = rotation_matrix(head_dim).float().to(device) if widths else None
    return {width: Codec(width, rotation) for width in widths}
