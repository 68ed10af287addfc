"""The subject: KV caches as layouts. `build_cache` makes one from a CacheConfig; attention sees only `attend` (base.py)."""
from cache.base import KVCache
from cache.build import build_cache
from cache.config import CacheConfig
from cache.prefill import GroupPrefill

__all__ = ["CacheConfig", "GroupPrefill", "KVCache", "build_cache"]
