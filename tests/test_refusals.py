"""What generate.py refuses: one line with the value, the limit and the cure, exit status 2, before the work begins."""
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import engine.compare
import engine.engine
import generate
from model import ModelConfig
from options import exit_status
from weights import EMBEDDED

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ModelConfig.from_checkpoint(EMBEDDED).n_layer
GREEDY = ["--temperature", "0", "--dtype", "float32", "--device", "cpu", "--max-new-tokens", "12"]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Arguments that must end with status 2, nothing on stdout and one line on stderr -> that line."""
    def run(*argv: str) -> str:
        try:
            status = generate.main([*GREEDY, *argv])
        except SystemExit as error:
            status = error.code
        out, err = capsys.readouterr()
        assert (status, out) == (2, "") and err.startswith("generate.py: error: ") and err.count("\n") == 1, err
        return err
    return run


@pytest.mark.parametrize("argv, says", [
    (["--prompt", ""], ["the prompt is empty"]),
    (["--max-seq-len", "3"], ["the prompt has", "capacity is 3", "--max-seq-len"]),
    (["--max-seq-len", "9999999"], ["9999999", "positions"]),
    (["--max-seq-len", "0"], ["capacity is 0"]),
    (["--max-new-tokens", "0"], ["max_new_tokens is 0", "at least 1"]),
    (["--temperature", "-1"], ["temperature is -1.0"]),
    (["--temperature", "nan"], ["temperature is nan"]),
    (["--top-k", "-1"], ["top_k is -1"]),
    (["--top-p", "0"], ["top_p is 0.0"]),
    (["--seed", "-1"], ["seed is -1"]),
    (["--cache", "ful"], ["'ful'", "full"]),
    (["--cache", "full,bits=4"], ["'bits=4'"]),
    (["--device", "tpu"], ["'tpu'", "auto, cpu, cuda"]),
    (["--device", "cpu:1"], ["'cpu:1'"]),
    (["--device", "cuda:99"], ["'cuda:99'", "not there", "cpu"]),
    (["--dtype", "int8"], ["'int8'", "bfloat16"]),
    (["--checkpoint", "no/such/folder"], ["no/such/folder"]),
    (["--prompt-file", "no-such-file.txt"], ["no-such-file.txt", "No such file"]),
    (["--prompt-file", "."], ["cannot be read"]),
    (["--prompt", "a", "--chat"], ["not allowed with"]),
    (["--json", "--chat"], ["not allowed with"]),
    (["--system", "Be kind."], ["--chat"]),
    (["--max-new", "3"], ["unrecognized"]),
], ids=" ".join)
def test_wrong_argument(refused, argv, says):
    """Guards tracebacks, silent defaults and abbreviations that a later option would break."""
    line = refused(*argv)
    assert all(text in line for text in says), line


def test_cuda_without_a_gpu(refused):
    assert "'cuda' is not there" in refused("--device", "cuda")


@pytest.mark.parametrize("content, says", [(b"", "no prompt"), (b" \n\n", "no prompt"), (b"caf\xe9\n", "not UTF-8 (byte 0xe9 at 3)")])
def test_wrong_prompt_file(refused, tmp_path, content, says):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    assert says in refused("--prompt-file", str(file))


def test_a_prompt_beyond_the_positions_is_refused_and_named(refused, tmp_path):
    """Guards a capacity that silently cuts a prompt, and the advice to raise what cannot be raised."""
    positions = ModelConfig.from_checkpoint(EMBEDDED).max_position_embeddings
    file = tmp_path / "prompts.txt"
    file.write_text("A dog\n" + "dog " * positions)
    line = refused("--prompt-file", str(file))
    assert "prompt 2 of 2" in line and f"the capacity is {positions}; shorten it\n" in line


def test_a_cache_beyond_memory_is_refused_with_its_bytes(refused, monkeypatch):
    monkeypatch.setattr(engine.engine, "available_bytes", lambda device: 1000)
    line = refused()
    assert "1,000" in line and "--max-seq-len" in line


def test_no_room_for_the_comparison_is_said_before_the_work(refused, monkeypatch):
    """Guards a finished text that is thrown away because the full cache beside it does not fit."""
    monkeypatch.setattr(engine.compare, "available_bytes", lambda device: 1000)
    assert "a full cache of 1 rows" in refused("--cache", "minicache", "--compare-full", "--json")


@pytest.mark.parametrize("spec, says", [("minicache,attend_form=triton", "triton cannot be had on cpu"),
                                        ("minicache,merge_from=99", f"beyond the model's {LAYERS} layers")])
def test_a_cache_that_cannot_be_is_refused_without_the_weights(refused, tmp_path, spec, says):
    """Guards minutes of loading before a line about the SPEC."""
    for file in EMBEDDED.iterdir():
        if file.suffix in (".json", ".model"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert says in refused("--checkpoint", str(tmp_path), "--cache", spec)


class OutOfMemoryError(RuntimeError):
    pass


def test_limits_of_the_machine_are_one_line_and_bugs_are_not(capsys):
    """Guards a page of traceback where a GPU is full, and a bug that is hidden as if it were the user's."""
    def raises(error: Exception) -> Callable[[], int]:
        def run() -> int:
            raise error
        return run
    assert exit_status("x.py", raises(OutOfMemoryError("CUDA out of memory.\nTried to allocate"))) == 2
    assert capsys.readouterr().err.startswith("x.py: error: CUDA out of memory. Tried to allocate; lower the batch size")
    with pytest.raises(RuntimeError, match="a bug"):
        exit_status("x.py", raises(RuntimeError("a bug")))


def test_compile_without_a_compiler_is_one_line(tmp_path):
    """Guards a hundred lines of torch where `--no-compile` is the cure."""
    env = os.environ | {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "generate.py", *GREEDY[:-1], "2", "--compile"], cwd=ROOT, env=env,
                          capture_output=True, text=True)
    assert done.returncode == 2 and "--no-compile" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-"])
def test_closed_streams_are_no_traceback(closed):
    """Guards an attribute of None where a daemon runs the command without stdin or stdout."""
    done = subprocess.run(f"{sys.executable} generate.py {' '.join(GREEDY[:-1])} 2 {'--chat' if closed == '<&-' else ''} {closed}",
                          shell=True, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}')


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize("damage, says", [
    (missing_shard, ["model-00002-of-00002.safetensors"]),
    (truncated, ["model.safetensors", "truncated"]),
    (lambda folder: (folder / "model.safetensors").unlink(), ["safetensors"]),
    (lambda folder: (folder / "tokenizer.model").unlink(), ["no tokenizer"]),
    (lambda folder: (folder / "config.json").write_text("{"), ["config.json"]),
    (lambda folder: edit_config(folder, intermediate_size=96), ["shape"]),
    (lambda folder: edit_config(folder, num_hidden_layers=LAYERS - 1), ["left over"]),
    (lambda folder: edit_config(folder, num_hidden_layers=LAYERS + 1), ["missing"]),
    (lambda folder: edit_config(folder, model_type="gpt2"), ["model_type", "'gpt2'", "llama"]),
    (lambda folder: edit_config(folder, rope_scaling={"type": "yarn", "factor": 2.0}), ["rope_type", "'yarn'"]),
    (lambda folder: edit_config(folder, quantization_config={"quant_method": "gptq"}), ["quantization_config"]),
    (lambda folder: edit_config(folder, vocab_size=4000), [" ids", "4000"]),
], ids=["missing shard", "truncated", "no weights", "no tokenizer", "no JSON", "shape", "left over", "missing tensors", "architecture",
        "rope", "quantised", "vocabulary"])
def test_damaged_checkpoint(refused, tmp_path, damage, says):
    """Guards work half done on a checkpoint that cannot run."""
    for file in EMBEDDED.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path)
    line = refused("--checkpoint", str(tmp_path))
    assert all(text in line for text in says), line
