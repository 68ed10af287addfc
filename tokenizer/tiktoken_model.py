"""tiktoken `tokenizer.model` (Llama 3): lines of base64 token and rank; ids equal those of tiktoken.

The file holds no special tokens: Llama 3's 256 follow its ranks. Later releases renamed some of the reserved ones; a
tokenizer_config.json beside the file says so. The split pattern is Llama 3's, the only family with such a file here.
Trap: tiktoken's own loader caches files by path in a temporary folder, so this file is parsed here.
"""

import base64
import re
from pathlib import Path

import tiktoken

from tokenizer.base import Tokenizer
from tokenizer.settings import Settings, SpecialToken, read_json

# Both from Meta's reference code for Llama 3 (llama/tokenizer.py).
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MAX_RUN = 100_000  # white space in a row; at about a million tiktoken's regex engine panics (stack overflow)
SPECIAL_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_4|>",
    "<|eot_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
]


class TiktokenTokenizer(Tokenizer):
    """A tiktoken `tokenizer.model` with Llama 3's special tokens and split pattern."""

    def __init__(self, path: Path, data: bytes, settings: Settings):
        """data: the file's bytes. Raises ValueError if a line or a rank is missing."""
        ranks = {}
        for number, line in enumerate(data.splitlines(), 1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError:
                raise ValueError(f"{path}: line {number} is not `base64 rank`: truncated or corrupt") from None
        missing = {bytes([byte]) for byte in range(256)} - ranks.keys()
        if missing or sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError(f"{path}: {len(ranks)} tokens without consecutive ranks or all 256 bytes: corrupt")
        bos = read_json(path.with_name("config.json")).get("bos_token_id")
        if bos not in (None, len(ranks)):  # a file cut between two lines shows in nothing else
            raise ValueError(f"{path} ends at rank {len(ranks) - 1}, but config.json has bos_token_id {bos}: truncated")
        self._encoding = tiktoken.Encoding(
            path.name, pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={}, explicit_n_vocab=len(ranks)
        )
        special = [SpecialToken(id, text) for id, text in enumerate(SPECIAL_TOKENS, len(ranks))]
        names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
        super().__init__(settings, n_pieces=len(ranks), special=special, names=names)

    def _encode_segment(self, text: str, prefix: bool) -> list[int]:
        cuts = [cut for run in re.finditer(r"\s+", text) for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN)]
        parts = (text[start:end] for start, end in zip([0, *cuts], [*cuts, None], strict=True))
        return [id for part in parts for id in self._encoding.encode_ordinary(part)]

    def _piece(self, id: int) -> bytes:
        return self._encoding.decode_single_token_bytes(id)
