"""Text in, token ids out, and back: one Tokenizer over three file formats, chat templates, stop ids, sampling settings.

`load_tokenizer(dir)` decides by the content of the checkpoint's files. Nothing here imports the model or the engine.
Trap: plain `encode` never makes a special token, whatever the text says; only a rendered chat template does.
"""

from tokenizer.base import Tokenizer
from tokenizer.chat import ChatTemplate
from tokenizer.load import load_tokenizer, sampling_settings, stop_ids

__all__ = ["ChatTemplate", "Tokenizer", "load_tokenizer", "sampling_settings", "stop_ids"]
