"""Tokenizers against the libraries that made the files: ids, special tokens, streaming. Bad files: test_tokenizer_files.py."""

import base64
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_files import PIPELINES, STORYTELLER, shared, write_json, write_tiktoken, write_with_added

from tokenizer import load_tokenizer, stop_ids
from tokenizer.tiktoken_model import SPECIAL_TOKENS, SPLIT_PATTERN

TEXTS = [
    "Once upon a time, there was a fox.",
    "def f(x):\n\tif x > 0:\n\t\treturn x  # tab\n    return -x\n",
    "    four spaces,  two   and three",
    " one leading space",
    "\n\nnewlines first\r\nand CRLF\n\n\n",
    "\ttab first\t\t",
    "trailing spaces   ",
    "日本語の文章と中文，混在。한국어",
    "emoji 🙂👩‍👩‍👧 flags 🇯🇵",
    "naïve café — “quotes” … ½ ²",
    "Привет, мир! مرحبا नमस्ते",
    "1234567890 3.14159 0xDEADBEEF",
    "https://example.org/a?b=c&d=%20e",
    "don't WE'LL they'RE",
    "\u00a0\u2003odd spaces\u3000",
    "\x00\x07 control \x1f",
    " ",
    "   ",
    "\n",
    "",
]


def fast_reference(path: Path):
    return pytest.importorskip("transformers").PreTrainedTokenizerFast(tokenizer_file=str(path))


# --- ids -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts",
    [
        ("llama2", "tokenizer.model"),
        ("phi3", "tokenizer.model"),
        ("mistral", "tokenizer.model.v1"),
        ("mistral", "mistral_instruct_tokenizer_240323.model.v3"),
        (),
    ],
    ids=lambda parts: "/".join(parts) or "storyteller",
)
def test_ids_equal_sentencepiece(parts, tmp_path):
    """Guards: a normalisation or a prefix of our own, other than the library's."""
    path = shared(*parts) if parts else STORYTELLER / "tokenizer.model"
    shutil.copy(path, tmp_path / "tokenizer.model")
    tokenizer, reference = load_tokenizer(tmp_path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in TEXTS:
        assert tokenizer.encode(text) == [reference.bos_id(), *reference.encode(text)], text
        assert tokenizer.decode(tokenizer.encode(text)) == reference.decode(reference.encode(text)) == text


def test_ids_equal_tiktoken():
    """Guards: Llama 3's split pattern and special ids."""
    folder = shared("llama3")
    tokenizer = load_tokenizer(folder)
    lines = (line.split() for line in (folder / "tokenizer.model").read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    reference = tiktoken.Encoding("llama3", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (128256, 128000)
    named = {"<|eot_id|>": 128009, "<|end_header_id|>": 128007, "<|reserved_special_token_250|>": 128255}
    assert named.items() <= tokenizer.special_tokens.items()
    for text in TEXTS:
        assert tokenizer.encode(text) == [128000, *reference.encode_ordinary(text)], text
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("family", ["llama2", "phi3", "mistral/v0.3"])
def test_ids_equal_tokenizer_json(family, tmp_path):
    """Guards: tokenizer.model and tokenizer.json of one folder disagreeing, here or with transformers."""
    folder = shared(*family.split("/"))
    reference = fast_reference(folder / "tokenizer.json")
    shutil.copy(folder / "tokenizer.json", tmp_path)
    for tokenizer in (load_tokenizer(folder), load_tokenizer(tmp_path)):
        for text in TEXTS:
            ids = tokenizer.encode(text, bos=False)
            assert ids == reference.encode(text, add_special_tokens=False), text
            if text.startswith(" ") and family == "mistral/v0.3":  # its pipeline adds no space before a space
                text = text[1:]
            assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_segments_follow_the_pipeline(pipeline, tmp_path):
    """Guards: the dummy prefix after special tokens, where every generation of pipelines has its own rule."""
    reference = fast_reference(write_json(tmp_path, pipeline) / "tokenizer.json")
    tokenizer = load_tokenizer(tmp_path)
    for text in ("<s>hi<|end|>  \n hi</s>  hi", "hi</s> hi", " hi", "hi", "", "</s>", "x<|end|>"):
        assert tokenizer.encode_with_special(text) == reference.encode(text, add_special_tokens=False), text
    assert tokenizer.encode("hi") == reference.encode("hi")
    assert tokenizer.bos_id == 1


@pytest.mark.parametrize("legacy, ids", [(True, "▁hi"), (None, "▁hi"), (False, "hi")])
def test_legacy_decides_without_a_pipeline(legacy, ids, tmp_path):
    """Guards: reading "legacy" the wrong way round: true prefixes the text after a special token, too."""
    write_with_added(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"legacy": legacy}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    model = sentencepiece.SentencePieceProcessor(model_file=str(STORYTELLER / "tokenizer.model"))
    text = "".join(model.id_to_piece(id) for id in tokenizer.encode_with_special("<s>hi")[1:])
    assert text == ids


def test_bos_is_added_where_the_files_say(tmp_path):
    """Guards: a missing or a second BOS, which costs every later token."""
    write_with_added(tmp_path)
    assert load_tokenizer(tmp_path).encode("a")[0] == 1
    assert load_tokenizer(tmp_path).encode("a", bos=False)[0] != 1
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert load_tokenizer(tmp_path).encode("a")[0] != 1
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "</s>"}}')
    assert load_tokenizer(tmp_path).encode("a")[0] == 2


# --- special tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama2", "llama3", "mistral/v0.3", "phi3", "sentencepiece", "tiktoken", "json"])
def test_special_tokens_in_user_text_stay_text(family, backends):
    """Guards: a prompt that ends its own turn by spelling the end-of-turn token."""
    tokenizer = backends[family] if family in backends else load_tokenizer(shared(*family.split("/")))
    special = set(tokenizer.special_tokens.values())
    for token, id in tokenizer.special_tokens.items():
        ids = tokenizer.encode(f"a{token} b", bos=False)
        assert not special & set(ids), token
        assert tokenizer.decode(ids) == f"a{token} b" or family == "json"  # its vocabulary is too small for that
        assert tokenizer.encode_with_special(f"{token}")[0] == id


def test_added_tokens_beside_the_model(backends):
    """Guards: Phi-3's 32000..32010, which the sentencepiece model does not know."""
    tokenizer = backends["sentencepiece"]
    assert tokenizer.vocab_size == 4100
    assert tokenizer.encode_with_special("<|user|>\n \n<|end|>") == [4098, 4096]  # rstrip swallows the white space
    assert tokenizer.decode([4098, 4099, 4096]) == "<|note|>"  # "special": false is shown
    assert tokenizer.decode([4098, 4099, 4096], skip_special=False) == "<|user|><|note|><|end|>"
    assert tokenizer.decode([4097, 99999, -1]) == ""  # a gap, and rows that pad the model's vocabulary


def test_renamed_reserved_tokens(tmp_path):
    """Guards: Llama 3.1, whose <|eom_id|> is one of 3.0's reserved tokens in the same file."""
    id = 262 + SPECIAL_TOKENS.index("<|reserved_special_token_4|>")
    renamed = {"added_tokens_decoder": {str(id): {"content": "<|eom_id|>", "special": True}}}
    (write_tiktoken(tmp_path) / "tokenizer_config.json").write_text(json.dumps(renamed))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.special_tokens["<|eom_id|>"] == id
    assert "<|reserved_special_token_4|>" not in tokenizer.special_tokens
    assert id in stop_ids(tmp_path, tokenizer)


def test_stop_ids_are_the_union(tmp_path):
    """Guards: a reply that runs on because only one of several stop ids was read."""
    tokenizer = load_tokenizer(write_with_added(tmp_path))
    assert stop_ids(tmp_path, tokenizer) == (2, 4096)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 9}')
    assert stop_ids(tmp_path, tokenizer) == (2, 7, 9, 4096)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert stop_ids(tmp_path, tokenizer) == (2, 9, 4096)


# --- streaming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["sentencepiece", "tiktoken", "json"])
@settings(max_examples=150, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_stream_equals_decode(backend, backends, data):
    """Guards: text lost, doubled or broken between tokens, for ids in any order, invalid UTF-8 included."""
    tokenizer = backends[backend]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=40))
    stream = tokenizer.stream()
    parts = [stream.put(id) for id in ids]
    text = "".join(parts) + stream.flush()
    assert text == tokenizer.decode(ids)
    raw = b"".join(tokenizer.token_bytes(id) for id in ids).decode("utf-8", "replace")
    assert text in (raw, raw.removeprefix(" "))


@pytest.mark.parametrize("backend", ["sentencepiece", "tiktoken", "json"])
@settings(max_examples=150, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\u2581"), max_size=40))
def test_round_trip_without_broken_characters(backend, backends, text):
    """Guards: half a character printed (U+FFFD) while its other bytes are still to come."""
    tokenizer = backends[backend]
    stream, shown = tokenizer.stream(), ""
    for id in tokenizer.encode(text):
        shown += stream.put(id)
        assert text.startswith(shown)
    assert shown == text
    assert stream.flush() == ""


def test_stream_shows_an_unfinished_character_at_the_end(backends):
    """Guards: bytes swallowed when the last token stops inside a character."""
    stream = backends["tiktoken"].stream()
    assert [stream.put(id) for id in "🙂".encode()[:3]] == ["", "", ""]
    assert stream.flush() == "\ufffd"


def test_stream_is_linear(backends, monkeypatch):
    """Guards: decoding the whole reply again for each token."""
    tokenizer, calls = backends["sentencepiece"], []
    piece = tokenizer.token_bytes
    monkeypatch.setattr(tokenizer, "token_bytes", lambda id, **flags: calls.append(id) or piece(id, **flags))
    stream = tokenizer.stream()
    for id in [300] * 500:
        stream.put(id)
    assert len(calls) == 500


def test_leading_space(backends):
    """Guards: the first word of a continuation glued to the prompt, or a reply that starts with a stray space."""
    tokenizer = backends["sentencepiece"]
    ids = tokenizer.encode("there was", bos=False)
    assert tokenizer.decode(ids) == "there was"
    assert tokenizer.decode(ids, continues=True) == " there was"
    stream = tokenizer.stream(continues=True)
    assert "".join(stream.put(id) for id in ids) == " there was"
