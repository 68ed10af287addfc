"""The model: configuration, rotary positions and one Transformer for all families."""
from model.config import ModelConfig
from model.rope import Rope, apply_rope
from model.transformer import Transformer

__all__ = ["ModelConfig", "Rope", "Transformer", "apply_rope"]
