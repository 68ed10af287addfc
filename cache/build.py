"""From a CacheConfig and the model's integers to a KVCache, and to its bytes without allocating anything."""
import torch

from cache.base import KVCache
from cache.codec import make_codecs
from cache.config import CacheConfig
from cache.full import FullLayer
from cache.kernels import choose_form
from cache.split import SplitGroup


def build_cache(config: CacheConfig, *, n_layer: int, n_kv_head: int, head_dim: int, batch: int, max_seq_len: int,
                dtype: torch.dtype, device: torch.device | str, sliding_window: int | None = None) -> KVCache:
    """All buffers of a cache for `batch` rows of `max_seq_len` tokens; on device "meta" only their shapes."""
    shape = dict(batch=batch, n_kv_head=n_kv_head, max_seq_len=max_seq_len, head_dim=head_dim, dtype=dtype, device=device,
                 sliding_window=sliding_window)
    codecs = make_codecs(config.code_widths(n_layer), head_dim, device)
    cache = KVCache([FullLayer(group[0], **shape) if config.is_full(group) else SplitGroup(group, config, codecs=codecs, **shape)
                     for group in config.layer_groups(n_layer)])
    form = choose_form(config.attend_form, device)
    for group in cache.groups:
        group.form = form
    return cache


def check_layout(config: CacheConfig, *, device: torch.device | str, **shape) -> None:
    """ValueError for a layout or a form that cannot be had: nothing is allocated, so it can be asked before weights are read."""
    build_cache(config, **shape, device="meta")
    choose_form(config.attend_form, device)


def bits_per_element(nbytes: int, *, n_layer: int, n_kv_head: int, head_dim: int, batch: int, max_seq_len: int, **_: object) -> float:
    """Bits of a cache of `nbytes` for each number of K and V that it has room for; a bf16 full cache has 16."""
    return 8 * nbytes / (2 * n_layer * n_kv_head * head_dim * batch * max_seq_len)


def cache_bytes(config: CacheConfig, *, n_layer: int, n_kv_head: int, head_dim: int, batch: int, max_seq_len: int,
                dtype: torch.dtype) -> dict[str, int]:
    """The same bytes by kind as `KVCache.nbytes`, as a closed formula of integers (a test holds the two equal)."""
    S, W, D, item = max_seq_len, min(config.window, max_seq_len), head_dim, dtype.itemsize
    N, scale, heads = max(S - W, 1), 4 if dtype == torch.float32 else 2, batch * n_kv_head
    total: dict[str, int] = {}
    for group in config.layer_groups(n_layer):
        n, R = len(group), config.retained_slots(len(group), S)
        if config.is_full(group):
            kinds = {"full": 2 * S * D * item}
        else:
            own = {config.k_bits: 0, config.v_bits: 0}
            for bits, merged in ((config.k_bits, config.merge_k), (config.v_bits, config.merge_v)):
                own[bits] += 1 if merged and n > 1 else n
            vector = {bits: D * item if bits == 16 else D * bits // 8 for bits in own}
            kinds = {"direction": sum(m * N * vector[bits] for bits, m in own.items()), "magnitude": 2 * n * N * scale,
                     "retained": 2 * n * R * D * item, "window": 2 * n * W * D * item, "bookkeeping": (N if R else 0) + 8 * R + 12}
        for kind, size in kinds.items():
            total[kind] = total.get(kind, 0) + heads * size
    if tables := config.code_widths(n_layer):       # one rotation, and levels and cuts for each width
        total["bookkeeping"] += 4 * D * D + sum(4 * (2 ** (bits + 1) - 1) for bits in tables)
    return total
