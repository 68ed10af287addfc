"""The subject: KV caches as layouts. `build_cache` makes one from a CacheConfig; attention sees only `attend` (base.py)."""
from cache.base import KVCache
from cache.build import bits_per_element, build_cache, check_layout
from cache.config import CacheConfig
from cache.prefill import GroupPrefill

__all__ = ["CacheConfig", "GroupPrefill", "KVCache", "bits_per_element", "build_cache", "check_layout"]
