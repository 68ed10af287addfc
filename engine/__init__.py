"""The engine: prompts of token ids in, steps of new token ids out."""
from engine.engine import Engine, check_sizes
from engine.sampling import SamplingParams
from engine.stats import Stats, Step, figures, peak_bytes

__all__ = ["Engine", "SamplingParams", "Stats", "Step", "check_sizes", "figures", "peak_bytes"]
