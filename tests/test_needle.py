"""bench.py needle: where the needle stands, what counts as found, and that it is looked for in what is stored."""
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bench
from cache import CacheConfig
from engine.engine import Engine
from engine.measure import needle
from engine.measure.needle import make_cases, measure, needle_texts
from engine.sampling import SamplingParams
from tokenizer import load_tokenizer
from weights import EMBEDDED, load_model

ARGS = ["--lengths", "64", "--depths", "3", "--needles", "2", "--batch-size", "5", "--dtype", "float32"]


@pytest.fixture(scope="module")
def text(tales: Callable[[int], str]) -> str:
    return tales(5)


def test_a_needle_stands_between_sentences_at_its_depth(text: str) -> None:
    """Guards what is stored: equal lengths, the needle whole and once, at the start, in the middle, at the end; the cue never in the prompt
    but as part of it; without a needle the same text, nothing of the answer in it."""
    tokenizer = load_tokenizer(EMBEDDED)
    cases = make_cases(text, tokenizer, length=64, depths=3, needles=2, seed=0)
    assert [(case.needle, case.depth) for case in cases] == [(i, d) for i in range(2) for d in (-1, 0, 1, 2)]
    for case in cases:
        cue, answer = needle_texts(2, 0)[case.needle]
        words = tokenizer.decode(case.text)
        assert len(case.text) == 64 and case.text[0] == tokenizer.bos_id and words.endswith(".")
        assert tokenizer.decode(case.fed, continues=True) == f" {cue} {answer}"
        assert tokenizer.decode(case.fed[-case.n_answer:], continues=True) == f" {answer}"
        before, found, after = words.partition(f"{cue} {answer}.")
        if case.depth < 0:
            assert not found and answer not in words
        else:
            assert found and cue not in before + after and (not before.strip() or before.rstrip().endswith("."))
            assert [not before.strip(), len(before) > 20 and len(after) > 20, not after][case.depth]


def test_found_is_what_greedy_decoding_says(text: str) -> None:
    """Guards the short cut (no decoding: each token of the answer is the likeliest after those before), and rows that fill up a batch.
    The expected answer is made the model's own, so that there is something to find."""
    model, tokenizer = load_model(EMBEDDED, dtype=torch.float32), load_tokenizer(EMBEDDED)
    cases = make_cases(text, tokenizer, length=64, depths=2, needles=1, seed=0)
    cases = [replace(case, fed=case.fed[case.depth == 0:]) for case in cases]       # cues of unequal length side by side
    engine = Engine(model, max_seq_len=80, compile=False)
    said = {}
    for case in cases:
        steps = engine.generate([case.text + case.fed[:-case.n_answer]], SamplingParams(max_new_tokens=2, temperature=0))
        said[case.depth] = [token for step in steps for _, token in step.tokens]
    wrong = {1: 1}          # another last token at the deepest place
    cases = [replace(c, fed=c.fed[:-c.n_answer] + [said[c.depth][0], said[c.depth][1] + wrong.get(c.depth, 0)], n_answer=2) for c in cases]
    row, = measure(model, cases, {"full": CacheConfig()}, {}, capacity=80, batch=4, depths=2)
    assert row["found_share_by_depth"] == [1, 0] and row["found_share"] == .5
    assert row["nll_nats_per_token_by_depth"][0] < row["nll_nats_per_token_by_depth"][1]


def test_command_shows_what_the_model_takes_from_the_needle(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the whole path, and that the stored text is what is looked at: the full cache gains from the needle, 2-bit codes lose."""
    pytest.importorskip("matplotlib", reason="--plot is an extra")
    out, plot = tmp_path / "n.json", tmp_path / "n.png"
    caches = ["--cache", "quant,bits=16", "minicache,bits=2,merge_from=0,window=0,sinks=0,retain=0", "rtn,bits=4", "--alignment", "none"]
    assert bench.main(["needle", "--text", text, *ARGS, *caches, "--out", str(out), "--plot", str(plot)]) == 0
    printed, data = capsys.readouterr().out, json.loads(out.read_text())
    full, same, coarse, rival = data["rows"]
    assert rival["cache"] == "rtn,bits=4 (simulated)" and full["length_tokens"] == 64 and len(full["nll_nats_per_token_by_depth"]) == 3
    assert full["gain_nats_per_token"] > .5 and coarse["gain_nats_per_token"] < full["gain_nats_per_token"] - .3
    assert same["nll_by_needle_and_depth"] == [pytest.approx(x, abs=1e-3) for x in full["nll_by_needle_and_depth"]]
    assert full["nll_difference_nats_per_token"] == 0 and coarse["nll_difference_nats_per_token"] > .1
    assert (full["found_share"] < .5) == ("The full cache itself finds" in printed)
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("args", "message"), [
    (["--lengths", "64,x"], "--lengths 64,x is not a list of whole numbers"), (["--lengths", "5000"], "ask for at most"),
    (["--depths", "1"], "--depths is 1; give at least 2"), (["--cache", "kivy"], "cache kind 'kivy' does not exist"),
    (["--text", "absent.txt"], "--text absent.txt cannot be read"), (["--needles", "99"], "give a longer text or --needles 3"),
    (["--cache", "minicache,merge_from=5"], "choose one of"), (["--plot", "n.pdf"], "--plot n.pdf is not a .png")])
def test_a_mistake_is_one_line_before_any_work(args: list[str], message: str, text: str, capsys: pytest.CaptureFixture[str],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a traceback, and against weights that are loaded for nothing."""
    monkeypatch.setattr(needle, "load_model", lambda *args, **settings: pytest.fail("loaded"))
    assert bench.main(["needle", "--text", text, *ARGS, *args]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out
