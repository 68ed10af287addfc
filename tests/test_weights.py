"""Checkpoint files -> parameters: every slice once, one tensor in memory at a time, and refusals of one line."""
import json
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import weights.load
from model import ModelConfig, Transformer
from weights import EMBEDDED, load_model, random_model
from weights.names import tensor_slots

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_checkpoint) -> Callable[..., Path]:
    """A changed copy: (name, change) -> directory, `change` edits the dict of tensors in place."""
    def make(name: str, change: Callable[[dict], object] = lambda tensors: None) -> Path:
        source, directory = tiny_checkpoint(name), tmp_path / name
        directory.mkdir()
        shutil.copy(source / "config.json", directory)
        tensors = {key: tensor for file in source.glob("*.safetensors") for key, tensor in load_file(file).items()}
        change(tensors)
        save_file(tensors, directory / "model.safetensors")
        return directory
    return make


def refused(directory: Path, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        load_model(directory)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


def state(directory: Path) -> dict[str, torch.Tensor]:
    return load_model(directory).state_dict()


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ["llama", "llama3-tied", "phi3", "mixtral", "mixtral-stacked"])
def test_name_table_tiles_every_parameter_exactly(name: str, tiny_checkpoint) -> None:
    """Guards: a gap (an uninitialised slice) or an overlap (one tensor over another) in the table itself."""
    config = ModelConfig.from_checkpoint(tiny_checkpoint(name))
    stored = [".mlp.experts."] if name == "mixtral-stacked" else []
    filled = {key: torch.zeros(p.shape) for key, p in Transformer(config).named_parameters()}
    for parameter, index in tensor_slots(config, stored).values():
        filled[parameter][index] += 1
    assert all((count == 1).all() for count in filled.values())


def test_loaded_model_is_ready_for_inference() -> None:
    """Guards: training mode, gradients, a tied head that is a second and empty matrix, a buffer left on meta."""
    model = load_model(EMBEDDED)
    assert not model.training and model.head.weight is model.embed.weight
    assert all(p.dtype == torch.bfloat16 and p.device.type == "cpu" and not p.requires_grad for p in model.parameters())
    stored = load_file(EMBEDDED / "model.safetensors")["model.layers.1.self_attn.k_proj.weight"]
    G, D = model.config.n_kv_head, model.config.head_dim
    assert torch.equal(model.layers[1].attention.wqkv.weight[-2 * G * D:-G * D], stored)
    assert load_model(EMBEDDED, dtype=torch.float16).norm.weight.dtype == torch.float16


@pytest.mark.parametrize("name", ["llama-sharded", "mixtral"])
def test_files_may_be_one_or_indexed_or_several(name: str, tiny_checkpoint, checkpoint, tmp_path: Path) -> None:
    """Guards: a shard read twice or never. Shards may be symlinks, as in a download cache."""
    sharded, loose = tiny_checkpoint(name), tmp_path / "loose"
    assert len(list(sharded.glob("*.safetensors"))) > 2 and (sharded / "model.safetensors.index.json").is_file()
    loose.mkdir()
    for file in sharded.glob("*.safetensors"):
        (loose / file.name).symlink_to(file)
    shutil.copy(sharded / "config.json", loose)
    expected = state(checkpoint(name))
    assert_same(state(sharded), expected)
    assert_same(state(loose), expected)
    shutil.copy(sharded / "model.safetensors.index.json", loose)
    assert_same(state(loose), expected)


def test_rotary_tables_of_old_exports_are_ignored(checkpoint) -> None:
    load_model(checkpoint("llama", lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})))


def test_tied_head_may_be_stored(checkpoint, tmp_path: Path) -> None:
    """Guards: exports that write both names, only the head's, or a head that was trained apart from the embedding."""
    expected = state(checkpoint("llama3-tied"))
    changes = [lambda t: t.update({HEAD: t[EMBED].clone()}), lambda t: t.update({HEAD: t.pop(EMBED)})]
    for change in changes:
        shutil.rmtree(tmp_path / "llama3-tied")
        assert_same(state(checkpoint("llama3-tied", change)), expected)
    shutil.rmtree(tmp_path / "llama3-tied")
    message = refused(checkpoint("llama3-tied", lambda t: t.update({HEAD: t[EMBED] + 1})))
    assert "tie_word_embeddings" in message


@pytest.mark.parametrize("name, change, expected", [
    ("llama", lambda t: t.pop(Q), ["1 missing", Q]),
    ("llama", lambda t: t.pop(HEAD), ["1 missing", HEAD]),
    ("llama", lambda t: t.update({Q.replace("weight", "bias"): torch.ones(64)}), ["1 left over", "q_proj.bias"]),
    ("llama", lambda t: t.update({"model.layers.3.input_layernorm.weight": t.pop(Q)}), ["1 missing", "1 left over"]),
    ("llama", lambda t: t.update({"a\nb\x1b[2J": torch.ones(1)}), ["1 left over", "a\\nb\\x1b"]),
    ("llama", lambda t: t.update({Q: t[Q][:32].clone()}), [Q, "(32, 64)", "(64, 64)"]),
    ("llama", lambda t: t.update({Q: t[Q].view(64, 64, 1)}), [Q, "(64, 64, 1)", "(64, 64)"]),
    ("llama", lambda t: t.update({Q: t[Q].to(torch.int8)}), [Q, "I8", "BF16, F16, F32"]),
    ("llama", lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)}), [Q, "F8_E4M3", "BF16, F16, F32"]),
    ("mixtral", lambda t: t.pop("model.layers.1.block_sparse_moe.experts.7.w3.weight"), ["1 missing", "experts.7.w3"]),
    ("phi3", lambda t: t.update({Q: torch.ones(192, 192)}), ["1 left over", Q]),
])
def test_tensors_that_do_not_fit_are_named(name: str, change: Callable, expected: list[str], checkpoint) -> None:
    """Guards: weights of another model than config.json's, which would load partly and talk nonsense."""
    message = refused(checkpoint(name, change))
    assert all(part in message for part in expected), message


def test_other_family_names_what_is_missing(checkpoint) -> None:
    """Guards: the config of one family beside the weights of another."""
    directory = checkpoint("llama")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "phi3", "architectures": None}))
    message = refused(directory)
    assert "6 missing" in message and "15 left over" in message


@pytest.mark.parametrize("damage", [lambda data: data[:len(data) // 2], lambda data: data[:20], lambda data: b"",
                                    lambda data: b"<html>not found</html>", lambda data: b"\xff" * 64])
def test_damaged_file_is_one_line(damage: Callable[[bytes], bytes], checkpoint) -> None:
    """Guards: an interrupted download, an error page saved as weights, a header that claims to be huge."""
    file = checkpoint("llama") / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    assert str(file) in refused(file.parent)


def test_missing_shard_is_named(tiny_checkpoint, tmp_path: Path) -> None:
    """Guards: an unfinished download of a sharded checkpoint; also a link into a cache that was cleaned."""
    directory = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint("llama-sharded"), directory)
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.unlink()
    assert repr(shard.name) in refused(directory, FileNotFoundError)
    shard.symlink_to(tmp_path / "gone")
    assert repr(shard.name) in refused(directory, FileNotFoundError)


def test_duplicate_tensor_is_refused(checkpoint) -> None:
    """Guards: two exports in one folder, where the last file would win."""
    directory = checkpoint("llama")
    (directory / "model.safetensors").rename(directory / "a.safetensors")
    save_file({Q: torch.ones(64, 64)}, directory / "b.safetensors")
    message = refused(directory)
    assert Q in message and "a.safetensors" in message and "b.safetensors" in message


@pytest.mark.parametrize("index", [{"weight_map": {Q: "../secret.safetensors"}}, {"weight_map": {Q: "/etc/passwd"}},
                                   {"weight_map": {Q: ".."}}, {"weight_map": {Q: ""}}, {"weight_map": {Q: 3}},
                                   {"weight_map": {Q: "\0"}}, {"weight_map": [Q]}, {}, [], 3])
def test_index_is_not_trusted(index: object, checkpoint) -> None:
    """Guards: a path out of the folder, and an index that is no index."""
    directory = checkpoint("llama")
    (directory / "model.safetensors").rename(directory.parent / "secret.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_model(directory)
    assert "\n" not in str(caught.value) and "weight_map" in str(caught.value) or "shard" in str(caught.value)


def test_other_formats_and_empty_folder(checkpoint) -> None:
    """Guards: pickled weights are never opened, and the cure is said."""
    directory = checkpoint("llama")
    (directory / "model.safetensors").unlink()
    assert "no *.safetensors" in refused(directory, FileNotFoundError)
    (directory / "pytorch_model.bin").write_bytes(b"")
    message = refused(directory)
    assert "pytorch_model.bin" in message and "convert" in message


def test_one_tensor_in_memory_at_a_time(checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a second full copy of the model (a state dict, a list of tensors) while loading."""
    alive, peak, opened = 0, 0, weights.load.open_safetensors

    class Shard:
        def __init__(self, shard) -> None:
            self.shard = shard

        def get_tensor(self, name: str) -> torch.Tensor:
            nonlocal alive, peak
            tensor = self.shard.get_tensor(name)
            alive, peak = alive + 1, max(peak, alive + 1)
            weakref.finalize(tensor, gone)
            return tensor

    def gone() -> None:
        nonlocal alive
        alive -= 1

    class Opened:
        def __init__(self, file: Path) -> None:
            self.context = opened(file)

        def __enter__(self) -> Shard:
            return Shard(self.context.__enter__())

        def __exit__(self, *error) -> None:
            self.context.__exit__(*error)

    monkeypatch.setattr(weights.load, "open_safetensors", Opened)
    load_model(checkpoint("llama"))
    assert peak == 1


def test_too_little_memory_is_refused(checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a machine driven into swap; the message has both byte counts."""
    directory = checkpoint("llama")
    needed = sum(p.nbytes for p in load_model(directory).parameters())
    monkeypatch.setattr(weights.load, "available_bytes", lambda device: needed)
    load_model(directory)
    monkeypatch.setattr(weights.load, "available_bytes", lambda device: needed - 1)
    message = refused(directory)
    assert f"{needed:,} bytes in float32" in message and f"{needed - 1:,} free" in message
    with pytest.raises(ValueError, match="another device"):
        random_model(ModelConfig.from_checkpoint(directory))


def test_hostile_config_allocates_nothing(checkpoint) -> None:
    """Guards: sizes within the limits whose model would fill any machine."""
    directory = checkpoint("llama")
    config = json.loads((directory / "config.json").read_text())
    huge = {"hidden_size": 2**20, "intermediate_size": 2**22, "num_hidden_layers": 2**6, "head_dim": 2**12,
            "num_attention_heads": 2**10, "num_key_value_heads": 2**10, "vocab_size": 2**24}
    (directory / "config.json").write_text(json.dumps(config | huge))
    assert "missing" in refused(directory)
    with pytest.raises(ValueError, match="the weights need .* bytes"):
        random_model(ModelConfig.from_checkpoint(directory))


@pytest.mark.parametrize("terminal, period", [(True, 2), (False, 10)])
def test_progress_is_for_long_loads_only(terminal: bool, period: int, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Guards: noise for small models, silence for a minute, thousands of lines in a log."""
    clock = [0.0]
    monkeypatch.setattr(weights.load.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    progress = weights.load._Progress(20_000_000_000)
    for _ in range(20):
        clock[0] += period / 9.5
        progress.advance(1_000_000_000)
    progress.close()
    lines = capsys.readouterr().err.replace("\r", "\n").split("\n")
    assert [line for line in lines if line] == [f"loading weights: {done} of 20.0 GB" for done in ("10.0", "20.0")]
    load_model(EMBEDDED)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["llama3-tied", "mixtral"])
def test_random_model_is_reproducible_and_finite(name: str, tiny_checkpoint) -> None:
    """Guards: measurements on nan, which run at another speed, and runs that cannot be repeated."""
    config = ModelConfig.from_checkpoint(tiny_checkpoint(name))
    a, b, c = (random_model(config, dtype=torch.float16, seed=seed).state_dict() for seed in (1, 1, 2))
    assert_same(a, b)
    assert not torch.equal(a["embed.weight"], c["embed.weight"])
    assert all(x.isfinite().all() and x.dtype == torch.float16 for x in a.values())
    model = random_model(config)
    assert (model.head.weight is model.embed.weight) == config.tie_word_embeddings
