"""A text file cut into windows of token ids: what `quality` and `similarity` read.

Windows do not overlap and are spread evenly over the whole text; each opens with BOS where the tokenizer adds one, as every prompt does.
"""
from pathlib import Path

from tokenizer import Tokenizer


def read_windows(path: str, tokenizer: Tokenizer, *, n_tokens: int, n_windows: int,
                 option: str = "--windows") -> list[list[int]]:
    """n_windows lists of n_tokens ids. ValueError for a file that cannot be read or is too short; `option` says how many were asked for."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {path} is not UTF-8 (byte {error.object[error.start]:#04x} at {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise ValueError(f"--text {path} cannot be read ({error.strerror}); give a text file") from None
    bos, ids = tokenizer.encode(""), tokenizer.encode(text, bos=False)
    own = n_tokens - len(bos)
    if len(ids) < own * n_windows:
        cure = f"give a longer text or {option} {len(ids) // own}" if len(ids) >= own else "give a longer text or shorter windows"
        raise ValueError(f"--text {path} has {len(ids):,} tokens, {n_windows} windows of {own} need {own * n_windows:,}; {cure}")
    last = len(ids) - own
    starts = [i * last // max(n_windows - 1, 1) for i in range(n_windows)]
    return [bos + ids[start:start + own] for start in starts]
