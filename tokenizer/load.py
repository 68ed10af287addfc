"""Which tokenizer a checkpoint has, where its texts end, and how it would be sampled.

Decided by the files' first bytes: sentencepiece is a protobuf, tiktoken lines of base64. `tokenizer.model` is preferred
to `tokenizer.json`, because its libraries are always installed. Never decided by the folder's name.
Trap: a git-lfs pointer is a small text file with the right name; it is refused as such.
"""

import re
from pathlib import Path

from tokenizer.base import Tokenizer
from tokenizer.sentencepiece_model import SentencePieceTokenizer
from tokenizer.settings import MAX_ID, read_json, read_settings
from tokenizer.tiktoken_model import TiktokenTokenizer
from tokenizer.tokenizer_json import JsonTokenizer

# Ends of a turn or a text in the families' formats; fine-tuned models use them without naming them as their EOS.
END_TOKENS = ("<|eot_id|>", "<|eom_id|>", "<|end|>", "<|im_end|>", "<|end_of_text|>", "<|endoftext|>")


def load_tokenizer(checkpoint_dir: Path | str) -> Tokenizer:
    """Raises FileNotFoundError if the folder holds no tokenizer, ValueError if it is unreadable."""
    folder = Path(checkpoint_dir)
    named = sorted(folder.glob("tokenizer.model*"))  # Mistral's own releases: tokenizer.model.v1, .v3
    path = folder / "tokenizer.model"
    if not path.is_file() and len(named) == 1:
        path = named[0]
    if not path.is_file():
        path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer in {folder}: it needs tokenizer.model or tokenizer.json")
    settings = read_settings(folder)
    if path.suffix == ".json":
        return JsonTokenizer(path, settings)
    data = path.read_bytes()
    if data.startswith(b"\n"):  # the tag of a protobuf's first field, `pieces`
        return SentencePieceTokenizer(path, data, settings)
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\s", data):
        return TiktokenTokenizer(path, data, settings)
    cure = "run `git lfs pull`" if data.startswith(b"version https://git-lfs") else "download it again"
    raise ValueError(f"{path} ({len(data)} bytes) is neither a sentencepiece nor a tiktoken model: {cure}")


def stop_ids(checkpoint_dir: Path | str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """All ids that end a reply, sorted: eos_token_id of generation_config.json and config.json (a number or a list),
    the tokenizer's EOS, and the end-of-turn tokens that its vocabulary has."""
    ids = {tokenizer.eos_id} | {tokenizer.special_tokens.get(text) for text in END_TOKENS}
    for name in ("generation_config.json", "config.json"):
        path = Path(checkpoint_dir) / name
        value = read_json(path).get("eos_token_id")
        named = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(id) is int and 0 <= id < MAX_ID for id in named):
            raise ValueError(f"{path}: eos_token_id is {value!r:.80}, not an id or a list of ids; correct it or take it out")
        ids |= set(named)
    return tuple(sorted(ids - {None}))


def sampling_settings(checkpoint_dir: Path | str) -> dict[str, float]:
    """temperature, top_k, top_p as far as generation_config.json recommends them; none where it does not say "do_sample": true."""
    path = Path(checkpoint_dir) / "generation_config.json"
    config = read_json(path)
    if config.get("do_sample") is not True:
        return {}
    settings = {key: config[key] for key in ("temperature", "top_k", "top_p") if config.get(key) is not None}
    for key, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or key == "top_k" and value % 1:
            number = "a whole number" if key == "top_k" else "a number"
            raise ValueError(f"{path}: {key} is {value!r}, not {number}; correct it or take it out")
    return settings | ({"top_k": int(settings["top_k"])} if "top_k" in settings else {})
