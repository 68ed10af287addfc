"""sentencepiece `tokenizer.model` (Llama 2, Mistral, Mixtral, Phi-3): ids equal those of the library.

Control pieces (<s>, [INST], ...) are the file's special tokens; tokens added later lie in the JSON files beside it.
Trap: the library puts the dummy prefix before every text it is given, also before the rest of a chat turn. A second
processor over the same file without it encodes such segments.
"""

from pathlib import Path

import sentencepiece

from tokenizer.base import Tokenizer
from tokenizer.settings import Settings, SpecialToken

# Protobuf merges a message field that comes twice: normalizer_spec (3) { add_dummy_prefix (3): false }.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece `tokenizer.model` and the tokens added beside it."""

    def __init__(self, path: Path, data: bytes, settings: Settings):
        """data: the file's bytes. Raises ValueError if sentencepiece cannot read them."""
        self._model = sentencepiece.SentencePieceProcessor()
        self._bare = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(data)
            self._bare.LoadFromSerializedProto(data + NO_DUMMY_PREFIX)
        except RuntimeError:
            raise ValueError(f"{path} ({len(data)} bytes) is a truncated or corrupt sentencepiece model") from None
        n = self._model.vocab_size()
        special = [
            SpecialToken(i, self._model.id_to_piece(i))
            for i in range(n)
            if self._model.is_control(i) or self._model.is_unknown(i)
        ]
        has_prefix = self._model.encode("a") != self._bare.encode("a")
        ids = {"bos_token": self._model.bos_id(), "eos_token": self._model.eos_id()}  # -1: none
        names = {name: self._model.id_to_piece(id) for name, id in ids.items() if id >= 0}
        super().__init__(settings, n_pieces=n, special=special, names=names, strip_space=has_prefix)

    def _encode_segment(self, text: str, prefix: bool) -> list[int]:
        return (self._model if prefix else self._bare).encode(text)

    def _piece(self, id: int) -> bytes:
        piece = self._model.id_to_piece(id)
        if self._model.is_byte(id):  # "<0x0A>"
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()
