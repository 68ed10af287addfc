"""The engine: prompts of token ids in, steps of new token ids out."""
from engine.engine import Engine
from engine.sampling import SamplingParams
from engine.stats import Stats, Step, figures, peak_bytes
from weights import available_bytes

__all__ = ["Engine", "SamplingParams", "Stats", "Step", "available_bytes", "figures", "peak_bytes"]
