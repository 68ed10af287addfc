"""Tokenizer files of every format: written here, so that a bare clone covers each backend, or the families' own beside the repository."""
import base64
import json
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "tokenizers"
STORYTELLER = ROOT / "weights" / "storyteller"


def shared(*parts: str) -> Path:
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip("the families' tokenizer files are not beside this repository")
    return path


def write_tiktoken(folder: Path) -> Path:
    tokens = [bytes([byte]) for byte in range(256)] + [b"he", b"ll", b"hell", b"hello", b" hello", "é".encode()]
    lines = (base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(tokens))
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    return folder


def write_with_added(folder: Path) -> Path:
    """The embedded sentencepiece model with tokens like Phi-3's beside it: one rstrip, one not special, a gap."""
    shutil.copy(STORYTELLER / "tokenizer.model", folder)
    (folder / "added_tokens.json").write_text('{"<|end|>": 4096, "<|user|>": 4098, "<|note|>": 4099}')
    user = {"content": "<|user|>", "rstrip": True, "special": True}
    note = {"content": "<|note|>", "special": False}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"4098": user, "4099": note}}))
    return folder


PIPELINES = {
    "prepend": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
    },
    "first": {
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
    },
    "always": {
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False},
    },
}


def write_json(folder: Path, pipeline: str = "prepend") -> Path:
    pieces = ["<unk>", "<s>", "</s>", "<|end|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    added = []
    for id, text in enumerate(pieces[:4]):
        flags = {"lstrip": False, "rstrip": text == "<|end|>", "single_word": False, "normalized": False}
        added.append({"id": id, "content": text, "special": True, **flags})
    pieces += ["▁", "h", "i", "▁h", "▁hi", "hi", "▁▁"]
    spec = {
        "version": "1.0",
        "added_tokens": added,
        **PIPELINES[pipeline],
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: id for id, piece in enumerate(pieces)},
            "merges": [["▁", "h"], ["▁h", "i"], ["h", "i"], ["▁", "▁"]],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder
