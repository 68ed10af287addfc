"""A text file cut into windows of token ids: what `quality` and `similarity` read.

Windows do not overlap and are spread evenly over the whole text; each opens with BOS where the tokenizer adds one, as every prompt does.
"""
from options import read_text
from tokenizer import Tokenizer


def read_windows(path: str, tokenizer: Tokenizer, *, n_tokens: int, n_windows: int,
                 option: str = "--windows") -> list[list[int]]:
    """n_windows lists of n_tokens ids. ValueError for a file that cannot be read or is too short; `option` says how many were asked for."""
    text = read_text(path, "--text", "a text file")
    bos, ids = tokenizer.encode(""), tokenizer.encode(text, bos=False)
    own = n_tokens - len(bos)
    if len(ids) < own * n_windows:
        cure = f"give a longer text or {option} {len(ids) // own}" if len(ids) >= own else "give a longer text or shorter windows"
        raise ValueError(f"--text {path} has {len(ids):,} tokens, {n_windows} windows of {own} need {own * n_windows:,}; {cure}")
    last = len(ids) - own
    starts = [i * last // max(n_windows - 1, 1) for i in range(n_windows)]
    return [bos + ids[start:start + own] for start in starts]
