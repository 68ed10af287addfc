"""Weights: a checkpoint's own *.safetensors files, or random numbers in a named shape, into a Transformer's parameters.

Contract: no convert step and no second copy; every parameter slice is filled exactly once or loading is refused before
anything is allocated. `EMBEDDED` is the small checkpoint that comes with the code.
"""
from pathlib import Path

from weights.alignment import Alignment, align, aligned, find_alignment
from weights.load import available_bytes, load_model, random_model

EMBEDDED = Path(__file__).parent / "storyteller"

__all__ = ["EMBEDDED", "Alignment", "align", "aligned", "available_bytes", "find_alignment", "load_model", "random_model"]
