"""One Transformer for the Llama, Mistral, Phi-3 and Mixtral families: families differ in data (ModelConfig), not in code.

Letters: B rows, T tokens in this call, C width, H query heads, G kv heads, D head_dim, I MLP width, E experts, V vocabulary.
Contract: the model owns parameters only. Position tables (`Rope`) and the KV cache are arguments, so several engines can share
one set of weights. Attention hands q, k, v to `layer_cache.attend` and does not know how the cache stores them.
Trap: logits are computed for the positions that are asked for; `forward` returns all of them and is for tests and scoring.
"""
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig
from model.rope import Rope, apply_rope


class Transformer(nn.Module):
    """Token ids to logits, in three parts that the engine drives by itself: `embed`, `run_layers`, `logits`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = Linear(config.dim, config.vocab_size)
        if config.tie_word_embeddings:
            self.head.weight = self.embed.weight

    def run_layers(self, x: Tensor, layers: Sequence[int], caches: Sequence, cos_sin: tuple[Tensor, Tensor], input_pos: Tensor,
                   valid: Tensor, rows: Tensor | None = None) -> Tensor:
        """Hidden states x [B, T, C] through the named layers, `caches[i].attend` serving layer `layers[i]` -> [B, T, C]."""
        for index, layer_cache in zip(layers, caches, strict=True):
            x = self.layers[index](x, cos_sin, layer_cache, input_pos, valid, rows)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states x [..., C] -> logits [..., V] fp32."""
        return self.head(self.norm(x)).float()

    def forward(self, ids: Tensor, input_pos: Tensor, valid: Tensor, cache: nn.Module, rope: Rope, rows: Tensor | None = None) -> Tensor:
        """ids, input_pos, valid [B, T] -> logits [B, T, V] fp32; meaningless where not valid. The tokens are stored in `cache`."""
        x = self.run_layers(self.embed(ids), range(len(self.layers)), cache.layers, rope(input_pos), input_pos, valid, rows)
        return self.logits(x)


class Block(nn.Module):
    """Pre-norm attention and MLP, each with its residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MixtureOfExperts(config) if config.n_expert else MLP(config)

    def forward(self, x: Tensor, cos_sin: tuple[Tensor, Tensor], layer_cache, input_pos: Tensor, valid: Tensor,
                rows: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos_sin, layer_cache, input_pos, valid, rows)
        return x + self.mlp(self.mlp_norm(x))


class Attention(nn.Module):
    """Grouped-query attention: projections and rotary positions here, everything that touches stored tokens in the cache."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = (config.n_head, config.n_kv_head, config.n_kv_head)
        self.head_dim = config.head_dim
        self.wqkv = Linear(config.dim, sum(self.heads) * config.head_dim)
        self.wo = Linear(config.n_head * config.head_dim, config.dim)

    def forward(self, x: Tensor, cos_sin: tuple[Tensor, Tensor], layer_cache, input_pos: Tensor, valid: Tensor,
                rows: Tensor | None) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.wqkv(x).view(B, T, -1, self.head_dim).transpose(1, 2).split(self.heads, 1)    # [B, H | G | G, T, D]
        y = layer_cache.attend(apply_rope(q, *cos_sin), apply_rope(k, *cos_sin), v, input_pos, valid, rows)
        return self.wo(y.transpose(1, 2).reshape(B, T, -1))


class Linear(nn.Linear):
    """x @ weight^T, no bias. For a row or two on a CPU, one on CUDA, the compiled step multiplies and sums instead of calling the library.

    That is one pass over the weight near memory speed; MKL's product of such a shape runs at a third of it on AVX2.
    """

    # measured on a CPU: 2.0 and 1.5 times the library's speed in a whole step; from there on the weight is read once a row
    FEW_ROWS = {"cpu": 2, "cuda": 1}

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, n_in = x.numel() // x.shape[-1], x.shape[-1]
        if rows > self.FEW_ROWS.get(x.device.type, 0) or not torch.compiler.is_compiling():
            return F.linear(x, self.weight)
        # as_strided: the compiler stores x first, where it would else compute it anew for every output
        stored = x.contiguous().as_strided((rows, 1, n_in), (n_in, n_in, 1))
        if x.is_cuda:       # in fp32, too, and stored in x's dtype: a cast of its own would be done by whoever reads
            return (self.weight * stored).sum(-1).view(*x.shape[:-1], -1)
        return (self.weight.float() * stored.float()).sum(-1).to(x.dtype).view(*x.shape[:-1], -1)


class MLP(nn.Module):
    """SwiGLU with gate and up in one matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w13 = Linear(config.dim, 2 * config.intermediate_size)
        self.w2 = Linear(config.intermediate_size, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, -1)
        return self.w2(F.silu(gate) * up)


class MixtureOfExperts(nn.Module):
    """Top-k of E experts, softmax over all router logits first and renormalised over the chosen ones (Mixtral)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E, C, I = config.n_expert, config.dim, config.intermediate_size     # noqa: E741
        self.n_active = config.n_expert_per_token
        self.router = nn.Linear(C, E, bias=False)
        self.w13 = nn.Parameter(torch.empty(E, 2 * I, C))
        self.w2 = nn.Parameter(torch.empty(E, C, I))

    def forward(self, x: Tensor) -> Tensor:
        shape, decode = x.shape, x.shape[1] == 1
        x = x.reshape(-1, shape[-1])                                        # [N, C]
        weight, expert = self.router(x).float().softmax(-1).topk(self.n_active, -1)
        weight = (weight / weight.sum(-1, keepdim=True)).to(x.dtype)        # [N, A]
        E = self.router.out_features
        if not decode:
            y = self.by_expert(x, weight, expert)
        elif expert.numel() <= E:                                           # few tokens: read only the chosen experts
            gate, up = torch.einsum("nc,naic->nai", x, self.w13[expert]).chunk(2, -1)
            y = torch.einsum("nai,naci,na->nc", F.silu(gate) * up, self.w2[expert], weight)
        else:                                                               # a batch: nearly all are chosen; static shapes, each read once
            gate, up = torch.einsum("nc,eic->eni", x, self.w13).chunk(2, -1)
            dense = torch.zeros(x.shape[0], E, dtype=x.dtype, device=x.device).scatter(1, expert, weight)
            y = torch.einsum("enc,ne->nc", torch.einsum("eni,eci->enc", F.silu(gate) * up, self.w2), dense)
        return y.view(shape)

    def by_expert(self, x: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
        """A prompt: each expert once, over the tokens that chose it. Shapes depend on data, so this form is never compiled."""
        y = torch.zeros_like(x)
        for e in range(self.router.out_features):
            token, slot = (expert == e).nonzero(as_tuple=True)
            if token.numel():
                gate, up = F.linear(x[token], self.w13[e]).chunk(2, -1)
                y.index_add_(0, token, F.linear(F.silu(gate) * up, self.w2[e]) * weight[token, slot, None])
        return y


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square taken in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)
