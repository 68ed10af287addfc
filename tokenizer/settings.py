"""What the JSON files beside a tokenizer say about it: added tokens, names, BOS, the dummy prefix.

Contract: `read_settings(dir)` reads tokenizer_config.json, special_tokens_map.json, added_tokens.json and
tokenizer.json, all optional, and resolves where they overlap. One unreadable file is one ValueError with its name.
Trap: releases of transformers disagree on what the same folder means; the rules kept are written at PrefixRule.
"""

import json
from dataclasses import dataclass
from pathlib import Path

MAX_ID = 1 << 31  # beyond any vocabulary


@dataclass(frozen=True)
class SpecialToken:
    """A token that plain text never becomes. lstrip, rstrip: in a rendered template it swallows white space there."""

    id: int
    text: str
    lstrip: bool = False
    rstrip: bool = False
    hidden: bool = True  # left out of decoded text ("special": true in the files)


@dataclass(frozen=True)
class PrefixRule:
    """Where sentencepiece's dummy prefix (a space before the first word) goes when special tokens split a text.

    tokenizer.json decides where there is one: that is the pipeline most copies of the model ran with. Its `Prepend`
    (Llama 2, Phi-3) prefixes every segment; `Metaspace` with "first" (Mistral v0.3) only the start of the text, and
    not before a space. transformers 5 rebuilds Phi-3's and Llama 2's pipeline as the latter and so gives other ids
    than the file. Without tokenizer.json: sentencepiece per segment, or, with "legacy": false, at the start alone.
    """

    start: bool = True  # the segment at the start of the text gets it
    inside: bool = True  # so does each segment after a special token
    double: bool = True  # even where the segment starts with a space of its own


@dataclass(frozen=True)
class Settings:
    """What the files beside a tokenizer say of it."""

    added: dict[int, SpecialToken]
    names: dict[str, str]  # bos_token, eos_token, unk_token, pad_token -> text, as far as they are known
    add_bos: bool
    prefix: PrefixRule


def read_json(path: Path) -> dict:
    """The object in a JSON file, {} where there is no file. ValueError if it is not an object."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")).items())
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON object ({error}): truncated or corrupt, download it again") from None


def read_settings(folder: Path) -> Settings:
    """Raises ValueError with the folder's name if a file has another shape than transformers writes."""
    config, pipeline = read_json(folder / "tokenizer_config.json"), read_json(folder / "tokenizer.json")
    try:
        found = [(id, {"content": text}) for text, id in read_json(folder / "added_tokens.json").items()]
        found += [(entry["id"], entry) for entry in pipeline.get("added_tokens", [])]
        found += [(int(id), entry) for id, entry in config.get("added_tokens_decoder", {}).items()]
        added = {id: _special(id, entry) for id, entry in found}
        names = {}
        for source in (read_json(folder / "special_tokens_map.json"), config):
            for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
                if value := source.get(key):
                    names[key] = _text(value if isinstance(value, str) else value["content"])
        prefix = PrefixRule(inside=config.get("legacy") is not False)
        add_bos = config.get("add_bos_token")
        if pipeline:
            prefix = _pipeline_prefix(pipeline)
            first = _pipeline_bos(pipeline)
            add_bos = bool(first) if add_bos is None else add_bos
            if first:
                names.setdefault("bos_token", first)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the tokenizer's JSON files in {folder} have an unknown shape: {error!r}") from None
    return Settings(added, names, add_bos is not False, prefix)


def steps(spec: dict | None) -> list[dict]:
    """The steps of a tokenizer.json component (normalizer, pre_tokenizer, post_processor, decoder), flattened."""
    if not spec:
        return []
    for key in ("normalizers", "pretokenizers", "processors", "decoders"):
        if key in spec:
            return [step for child in spec[key] for step in steps(child)]
    return [spec]


def _special(id: int, entry: dict) -> SpecialToken:
    if type(id) is not int or not 0 <= id < MAX_ID:
        raise ValueError(f"an added token has the id {id!r}")
    flags = {key: bool(entry.get(key)) for key in ("lstrip", "rstrip")}
    return SpecialToken(id, _text(entry["content"]), hidden=bool(entry.get("special", True)), **flags)


def _text(content: object) -> str:
    if not content or not isinstance(content, str):
        raise ValueError(f"a token's text is {content!r}")
    return content


def _pipeline_prefix(pipeline: dict) -> PrefixRule:
    if any(step["type"] == "Prepend" for step in steps(pipeline.get("normalizer"))):
        return PrefixRule()
    for step in steps(pipeline.get("pre_tokenizer")):
        if step["type"] == "Metaspace":
            scheme = step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")
            return PrefixRule(start=scheme != "never", inside=scheme == "always", double=False)
    return PrefixRule(start=False, inside=False)


def _pipeline_bos(pipeline: dict) -> str | None:
    for step in steps(pipeline.get("post_processor")):
        if step["type"] == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
            return step["single"][0]["SpecialToken"]["id"]
    return None
