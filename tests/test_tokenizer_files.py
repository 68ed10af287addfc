"""Which of a folder's files is read as its tokenizer, and what a truncated, corrupt or missing one says; odd input."""

import sys

import pytest
from tokenizer_files import STORYTELLER, write_json, write_tiktoken, write_with_added

from tokenizer import ChatTemplate, load_tokenizer, sampling_settings, stop_ids


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
        ("added_tokens.json", '{"<a>": -1}'),
        ("added_tokens.json", '{"": 5000}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"5000": {"content": 5}}}'),
        ("tokenizer_config.json", '{"bos_token": {"content": ["<s>"]}}'),
        pytest.param("tokenizer_config.json", '{"a":' * 100_000, id="deep"),
        ("tokenizer.json", '{"added_tokens": [{"id": "5", "content": "<a>"}]}'),
    ],
)
def test_corrupt_json(name, text, tmp_path):
    """Guards: a KeyError or a JSONDecodeError without the file's name."""
    write_json(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}.*") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ['"2"', "[[2]]", "-1", "true", "2.5", str(10**30)])
def test_bad_stop_ids(value, tmp_path):
    """Guards a traceback, or an overflow after half a text, from a checkpoint's own file."""
    (write_json(tmp_path) / "generation_config.json").write_text(f'{{"eos_token_id": {value}}}')
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id is"):
        stop_ids(tmp_path, load_tokenizer(tmp_path))


@pytest.mark.parametrize("value", ["2.5", '"3"', "NaN", "Infinity", "true"])
def test_bad_sampling_settings(value, tmp_path):
    (tmp_path / "generation_config.json").write_text(f'{{"do_sample": true, "top_k": {value}}}')
    with pytest.raises(ValueError, match="top_k is .* not a whole number"):
        sampling_settings(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"do_sample": true, "top_k": 40.0}')
    assert sampling_settings(tmp_path) == {"top_k": 40} and type(sampling_settings(tmp_path)["top_k"]) is int


def test_bad_chat_templates(tmp_path):
    tokenizer = load_tokenizer(write_json(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": [{"name": ["a"], "template": "x"}]}')
    with pytest.raises(ValueError, match="none is named default"):
        ChatTemplate.from_checkpoint(tmp_path, tokenizer)
    (tmp_path / "chat_template.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="chat_template.jinja is not UTF-8"):
        ChatTemplate.from_checkpoint(tmp_path, tokenizer)
