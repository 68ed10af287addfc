"""generate.py as its users and the tools that call it see it: what is printed where, and exit statuses.

Runs the command line in process on the embedded checkpoint, fp32, few tokens. What the model says is not tested, only that
it is the same wherever it should be.
"""
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import generate
from engine import Engine
from model import ModelConfig
from tokenizer import load_tokenizer
from weights import EMBEDDED

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ModelConfig.from_checkpoint(EMBEDDED).n_layer
GREEDY = ["--temperature", "0", "--dtype", "float32", "--device", "cpu", "--max-new-tokens", "12"]
KEYS = {"text", "prompt_ids", "tokens", "prompt_tokens", "new_tokens", "finish_reason"}
WHOLE_KEYS = {"ttft_s", "prefill_tokens_per_s", "decode_tokens_per_s", "kv_bytes", "kv_bytes_by_kind", "bits_per_element", "ratio_to_full",
              "peak_bytes", "cache", "attend_form", "compile", "device", "dtype"}


@pytest.fixture
def run_json(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict]:
    """Arguments -> the JSON object, which must be all of stdout."""
    def run(*argv: str) -> dict:
        assert generate.main(["--json", *GREEDY, *argv]) == 0
        return json.loads(capsys.readouterr().out)
    return run


def interrupt_after(monkeypatch: pytest.MonkeyPatch, steps: int, times: int = 1) -> None:
    """A Ctrl-C (or several) while the engine is at work."""
    original = Engine.generate

    def generate_interrupted(self, *args, **kwargs):
        for n, step in enumerate(original(self, *args, **kwargs), 1):
            yield step
            if n == steps:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(Engine, "generate", generate_interrupted)


# ---- what comes out

def test_json_has_the_documented_keys_and_they_agree(run_json):
    """Guards the contract that other tools parse, and that text is of the new tokens: prompt + text is the whole story."""
    result = run_json("--prompt", "Once upon a time")
    assert set(result) == KEYS | WHOLE_KEYS
    assert (result["prompt_tokens"], result["new_tokens"]) == (len(result["prompt_ids"]), len(result["tokens"]))
    assert (result["finish_reason"], result["cache"], result["compile"], result["device"], result["dtype"]) == (
        "length", "full", False, "cpu", "float32")
    c = ModelConfig.from_checkpoint(EMBEDDED)
    per_token = 2 * c.n_layer * c.n_kv_head * c.head_dim * 4
    assert result["kv_bytes"] == per_token * (result["prompt_tokens"] + 12), "the default capacity is prompt + new tokens"
    assert 0 < result["ttft_s"] < 60 and result["decode_tokens_per_s"] > 0 and result["peak_bytes"] > 0


def test_text_is_the_prompt_and_the_json_text(run_json, capsys):
    """Guards streaming: a space lost between prompt and continuation, a flush forgotten, statistics on stdout."""
    tokenizer, prompt = load_tokenizer(EMBEDDED), "Once upon a time there"
    result = run_json("--prompt", prompt)
    assert prompt + result["text"] == tokenizer.decode(result["prompt_ids"] + result["tokens"]) and result["text"].startswith(" ")
    assert generate.main([*GREEDY, "--prompt", prompt, "--stats"]) == 0
    out, err = capsys.readouterr()
    assert out == prompt + result["text"] + "\n"
    assert {"prompt_tokens", "new_tokens", "rows"} | WHOLE_KEYS == {line.split()[0] for line in err.splitlines()}


def test_a_person_is_told_that_a_text_was_cut(capsys, monkeypatch):
    """Guards a story that stops in mid-sentence without a word, and a pipe that gets that word."""
    for terminal, expected in ((False, ""), (True, "[cut after 5 tokens, see --max-new-tokens and --max-seq-len]\n")):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        assert generate.main(["--max-new-tokens", "5", "--temperature", "0"]) == 0
        assert capsys.readouterr().err == expected


def test_rows_of_a_file_equal_the_prompts_alone(run_json, tmp_path):
    """Guards padding, queueing and order: 10 prompts of different lengths on 8 rows, blank lines, a BOM and \\r\\n in the file."""
    prompts = ["Once upon a time", "The", "Tom and his dog\x0c ran", *(f"Lily had {n} red balls and she" + " ran" * n for n in range(7))]
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(prompts).encode() + b"\n \n")
    result = run_json("--prompt-file", str(file))
    assert set(result) == {"rows"} | WHOLE_KEYS and all(set(row) == KEYS for row in result["rows"])
    for prompt, row in zip(prompts, result["rows"], strict=True):
        alone = run_json("--prompt", prompt)
        assert {key: alone[key] for key in KEYS} == row


def test_a_file_prints_each_prompt_whole_and_in_order(run_json, tmp_path, capsys):
    """Guards interleaved output: the second prompt finishes first, at its capacity, and still comes second."""
    prompts = ["Once upon a time", "The dog ran " * 20]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts))
    argv = ["--prompt-file", str(file), "--max-seq-len", str(run_json("--prompt", prompts[1])["prompt_tokens"] + 2)]
    rows = run_json(*argv)["rows"]
    assert [(row["finish_reason"], row["new_tokens"]) for row in rows] == [("length", 12), ("capacity", 3)]
    assert generate.main([*GREEDY, *argv]) == 0
    expected = [f"--- {i} of 2: {row['prompt_tokens']} + {row['new_tokens']} tokens, {row['finish_reason']}\n{prompt}{row['text']}\n\n"
                for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True), 1)]
    assert capsys.readouterr().out == "".join(expected)


def test_seed_decides_the_text(run_json):
    """Guards --seed, and sampling options that reach nothing."""
    def tokens(*options: str) -> list[int]:
        return run_json("--temperature", "1.5", *options)["tokens"]
    assert tokens("--seed", "3") == tokens("--seed", "3") != tokens("--seed", "4")
    assert tokens("--seed", "3", "--top-k", "1") == tokens("--seed", "4", "--top-p", "1e-6") == run_json()["tokens"]


def test_sampling_is_the_checkpoints_own_unless_given(tmp_path, capsys):
    """Guards generation_config.json: read, overruled by an option, refused with its name where it holds nonsense."""
    for file in EMBEDDED.glob("*.*"):
        (tmp_path / file.name).symlink_to(file)
    config = tmp_path / "generation_config.json"
    config.unlink()
    options = ["--json", "--checkpoint", str(tmp_path), "--device", "cpu", "--max-new-tokens", "12", "--seed", "3"]

    def tokens(settings: dict, *more: str) -> list[int]:
        config.write_text(json.dumps(settings))
        assert generate.main([*options, *more]) == 0
        return json.loads(capsys.readouterr().out)["tokens"]
    own = {"do_sample": True, "temperature": 1.5, "top_k": 1}
    assert tokens(own) == tokens({}, "--temperature", "0") != tokens(own, "--top-k", "0") == tokens({}, "--temperature", "1.5")
    assert tokens(own | {"do_sample": False}) == tokens({}) == tokens({}, "--temperature", "0.8")
    config.write_text('{"do_sample": true, "top_p": "high"}')
    assert generate.main(options) == 2 and "generation_config.json: top_p is 'high'" in capsys.readouterr().err


def test_output_that_the_terminal_cannot_show_does_not_end_the_run(monkeypatch):
    """Guards a UnicodeEncodeError in the middle of a text where stdout is not UTF-8."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert generate.main([*GREEDY, "--prompt", "Zoë"]) == 0
    assert out.buffer.getvalue().startswith(b"Zo?")


# ---- ends other than by itself

@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_prints_what_there_is(monkeypatch, capsys, times):
    """Guards a traceback or lost text at the first Ctrl-C, at a second one, and the caller's own handler afterwards."""
    before = signal.getsignal(signal.SIGINT)
    interrupt_after(monkeypatch, 4, times)
    assert generate.main(["--json", *GREEDY]) == 130
    result = json.loads(capsys.readouterr().out)
    assert (result["finish_reason"], result["new_tokens"]) == ("interrupted", 4) and result["text"]
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_in_a_file_keeps_the_finished_and_leaves_out_the_unbegun(monkeypatch, tmp_path, capsys):
    """Guards the queue: prompts that wait are reported as interrupted, never as empty results."""
    monkeypatch.setattr(generate, "ROWS", 2)
    interrupt_after(monkeypatch, 4)
    file = tmp_path / "prompts.txt"
    file.write_text("Once\nThe dog\nA cat\n")
    assert generate.main([*GREEDY, "--prompt-file", str(file)]) == 130
    out = capsys.readouterr().out
    assert "--- 2 of 3" in out and "interrupted" in out and "A cat" not in out


def test_a_reader_that_goes_away_is_no_error():
    """`generate.py | head`: guards the BrokenPipeError traceback, also the one that the interpreter prints at exit."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}      # it would hide the second one
    process = subprocess.Popen([sys.executable, "generate.py", "--device", "cpu", "--temperature", "0"], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=env | {"OMP_NUM_THREADS": "1"})
    assert process.stdout.read(16) == b"Once upon a time"
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == b""


def test_help_and_usage_errors_do_not_wait_for_torch():
    """Guards an import of torch at the top, seconds before a mistyped option is reported; and the real exit status."""
    code = ("import sys, generate\n"
            "try: generate.main(['--help'])\n"
            "except SystemExit: assert 'torch' not in sys.modules\n"
            "generate.main(['--promt', 'x'])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout.startswith("usage: generate.py")
    assert done.stderr == "generate.py: error: unrecognized arguments: --promt x; --help lists the options\n"


def test_a_merged_cache_reports_its_bytes_and_what_it_loses(run_json: Callable[..., dict]) -> None:
    """Guards --cache and --compare-full through the command line: figures that cannot be, or a comparison with itself."""
    result = run_json("--prompt", "Once upon a time there was a dog", "--cache", "minicache,window=2,sinks=1", "--compare-full")
    assert sum(result["kv_bytes_by_kind"].values()) == result["kv_bytes"] and result["cache"] == "minicache,sinks=1,window=2"
    assert result["retained_filled"] > 0 and result["kl"] > 0 and 0 <= result["top1_agreement"] <= 1
    errors, middle = result["k_error_by_layer"], LAYERS // 2
    assert len(errors) == LAYERS and max(errors[:middle]) == 0 < min(errors[middle:])
    same = run_json("--prompt", "Once upon a time there was a dog", "--compare-full")
    assert same["kl"] == pytest.approx(0, abs=1e-6) and same["top1_agreement"] == 1 and same["nll"] == pytest.approx(same["nll_full"])


def test_prompts_of_very_different_length_are_not_padded_to_the_longest() -> None:
    """Guards the time to the first token of a short prompt that stands beside a long one."""
    from engine import Engine, SamplingParams
    engine = Engine.from_pretrained(EMBEDDED, max_batch_size=4, max_seq_len=120)
    fed = [step.n_fed for step in engine.generate([[1] * 5] * 3 + [[1] * 100], SamplingParams(max_new_tokens=2)) if step.phase == "prefill"]
    assert fed == [15, 100]
