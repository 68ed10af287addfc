"""A checkpoint with nothing but `tokenizer.json`: the `tokenizers` library (an extra) does the splitting and merging.

The file's added tokens and post-processor are taken out before it is handed over: special tokens and BOS are the base
class's work for all formats. Byte-level and sentencepiece-like (byte fallback) vocabularies are read.
Trap: the library treats every text as the start of one, so segments inside a chat need a pipeline without prefix.
"""

import json
from pathlib import Path

from tokenizer.base import Tokenizer
from tokenizer.settings import Settings, read_json, steps


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json`, run by the `tokenizers` library."""

    def __init__(self, path: Path, settings: Settings):
        """Raises ValueError if `tokenizers` is not installed or the file is of another kind."""
        try:
            import tokenizers
        except ImportError:
            raise ValueError(f"{path} needs the tokenizers library: pip install tokenizers") from None
        spec = read_json(path) | {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        bare = _without_prefix(spec)
        try:
            self._model = tokenizers.Tokenizer.from_str(json.dumps(spec))
            self._bare = self._model if bare == spec else tokenizers.Tokenizer.from_str(json.dumps(bare))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is refused by tokenizers {tokenizers.__version__}: {error}") from error
        decoder = {step["type"]: step for step in steps(spec.get("decoder"))}
        if not decoder.keys() & {"ByteLevel", "ByteFallback", "Metaspace"}:
            raise ValueError(f"{path}: decoder {sorted(decoder)} is none of ByteLevel, ByteFallback, Metaspace")
        self._alphabet = _byte_alphabet() if "ByteLevel" in decoder else None
        n_pieces = 1 + max(self._model.get_vocab().values(), default=-1)
        super().__init__(settings, n_pieces=n_pieces, strip_space=bool(decoder.keys() & {"Strip", "Metaspace"}))

    def _encode_segment(self, text: str, prefix: bool) -> list[int]:
        return (self._model if prefix else self._bare).encode(text).ids

    def _piece(self, id: int) -> bytes:
        piece = self._model.id_to_token(id) or ""
        if self._alphabet:
            return b"".join(self._alphabet.get(character) or character.encode() for character in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()


def _without_prefix(spec: dict) -> dict:
    normalizers, pretokenizers = steps(spec.get("normalizer")), steps(spec.get("pre_tokenizer"))
    kinds = {step["type"] for step in normalizers + pretokenizers}
    if not kinds & {"Prepend", "Metaspace"}:
        return spec
    kept = [step for step in normalizers if step["type"] != "Prepend"]
    never = {"prepend_scheme": "never", "add_prefix_space": False}
    split = [step | never if step["type"] == "Metaspace" else step for step in pretokenizers]
    return spec | {
        "normalizer": {"type": "Sequence", "normalizers": kept} if kept else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": split} if split else None,
    }


def _byte_alphabet() -> dict[str, bytes]:
    """GPT-2's printable stand-ins: a printable Latin-1 byte is itself, the others are U+0100, U+0101, ... in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): bytes([b]) for b in printable} | {chr(256 + i): bytes([b]) for i, b in enumerate(others)}
