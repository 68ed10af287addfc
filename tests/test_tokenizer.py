"""Tokenizers against the libraries that made the files: ids, special tokens, streaming, bad files.

The families' real files lie in ../shared and are skipped where absent; the embedded checkpoint's tokenizer, with added
tokens written beside it, a tiktoken file and a tokenizer.json built here cover every backend in a bare clone.
"""

import base64
import json
import shutil
import sys
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenizer import load_tokenizer, stop_ids
from tokenizer.tiktoken_model import SPECIAL_TOKENS, SPLIT_PATTERN

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "tokenizers"
STORYTELLER = ROOT / "weights" / "storyteller"

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


def shared(*parts: str) -> Path:
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip("the families' tokenizer files are not beside this repository")
    return path


def fast_reference(path: Path):
    return pytest.importorskip("transformers").PreTrainedTokenizerFast(tokenizer_file=str(path))


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


@pytest.fixture(scope="module")
def backends(tmp_path_factory) -> dict:
    """One tokenizer per file format, from files that every clone has."""
    writers = {"sentencepiece": write_with_added, "tiktoken": write_tiktoken, "json": write_json}
    return {name: load_tokenizer(write(tmp_path_factory.mktemp(name))) for name, write in writers.items()}


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


# --- odd input and bad files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["sentencepiece", "tiktoken", "json"])
def test_lone_surrogate(backend, backends):
    """Guards: a traceback for an undecodable byte on the command line."""
    tokenizer = backends[backend]
    assert tokenizer.decode(tokenizer.encode("a\udcffb")) == "a\ufffdb"


def test_very_long_white_space(tmp_path):
    """Guards: tiktoken's panic (a BaseException) on a million spaces."""
    tokenizer = load_tokenizer(write_tiktoken(tmp_path))
    assert tokenizer.decode(tokenizer.encode(" " * 1_000_000 + "x")) == " " * 1_000_000 + "x"


def test_which_file_is_read(tmp_path):
    """Guards: needing the `tokenizers` extra although a tokenizer.model lies there; Mistral's own file names."""
    write_json(write_with_added(tmp_path))
    assert load_tokenizer(tmp_path).vocab_size == 4100
    (tmp_path / "tokenizer.model").rename(tmp_path / "tokenizer.model.v3")
    assert load_tokenizer(str(tmp_path)).vocab_size == 4100
    (tmp_path / "tokenizer.model.v3").unlink()
    assert load_tokenizer(tmp_path).vocab_size == 4100  # the added tokens still lie there
    assert load_tokenizer(tmp_path).encode("hi", bos=False) == [264]


def test_no_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"needs tokenizer\.model or tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_tokenizers_library_absent(tmp_path, monkeypatch):
    """Guards: an ImportError's traceback where one pip command is the cure."""
    write_json(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="pip install tokenizers"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("size", [0, 1, 13, 14, 1000, 40000, -1])
def test_truncated_sentencepiece(size, tmp_path):
    """Guards: a half-downloaded file read as a smaller vocabulary."""
    data = (STORYTELLER / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(data[:size])
    with pytest.raises(ValueError, match=r"tokenizer\.model \(\d+ bytes\) is"):
        load_tokenizer(tmp_path)


def test_tiktoken_cut_between_lines(tmp_path):
    """Guards: every special id off by the lines that are missing."""
    (write_tiktoken(tmp_path) / "config.json").write_text('{"bos_token_id": 262}')
    assert load_tokenizer(tmp_path).bos_id == 262
    lines = (tmp_path / "tokenizer.model").read_bytes().splitlines(keepends=True)
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines[:-2]))
    with pytest.raises(ValueError, match="ends at rank 259, but config.json has bos_token_id 262"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"IQ== 0\nIg=", "line 2"),
        (b"IQ== 0\nIg== one\n", "line 2"),
        (b"IQ== 0\nI*== 1\n", "line 2"),
        (b"IQ== 0\nIg== 2\n", "consecutive ranks"),
        (b"\x80\x04pickle", "neither a sentencepiece nor a tiktoken model"),
    ],
)
def test_corrupt_model_file(data, message, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "name, text",
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"added_tokens": []}'),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "y"}}}'),
        ("tokenizer_config.json", '{"bos_token": {"text": "<s>"}}'),
        ("added_tokens.json", '{"<a>": "b"}'),
    ],
)
def test_corrupt_json(name, text, tmp_path):
    """Guards: a KeyError or a JSONDecodeError without the file's name."""
    write_json(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}.*") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
