"""bench.py quality: what is scored against what, how windows are cut, and what is left after Ctrl-C or a mistake."""
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bench
from cache import CacheConfig, KVCache
from engine.compare import forced_logits
from engine.engine import Engine
from engine.measure import quality
from engine.measure.quality import Result, measure, pareto_front
from engine.measure.report import print_table, write_json
from engine.measure.rivals import parse_cache
from engine.measure.windows import read_windows
from model import ModelConfig, Rope
from tokenizer import load_tokenizer
from weights import EMBEDDED, load_model

LAYERS = ModelConfig.from_checkpoint(EMBEDDED).n_layer
SHAPE = dict(n_layer=LAYERS, n_kv_head=3, head_dim=64, max_seq_len=32, batch=2, dtype=torch.float32)
ARGS = ["--context", "24", "--continuation", "8", "--windows", "3", "--batch-size", "2", "--dtype", "float32"]


@pytest.fixture(scope="module")
def text(tales: Callable[[int], str]) -> str:
    return tales(3)


def test_full_scores_are_those_of_one_plain_pass(text: str) -> None:
    """Guards against an offset between what is fed, what is predicted and what is scored; a filled-up last batch must not count twice."""
    windows = read_windows(text, load_tokenizer(EMBEDDED), n_tokens=33, n_windows=3)
    model = load_model(EMBEDDED, dtype=torch.float32)
    results = [Result(spec, CacheConfig.parse(spec), {"full": 1}, SHAPE) for spec in ("full", "quant,bits=16")]
    assert [*measure(model, windows, results, context=24, capacity=32, batch=2)] == [
        ("full", 0), ("quant,bits=16", 0), ("full", 2), ("quant,bits=16", 2)]
    ids, pos = torch.tensor(windows), torch.arange(33)[None].expand(3, -1)
    cache = CacheConfig().build(**SHAPE | {"batch": 3, "max_seq_len": 33}, device="cpu")
    with torch.inference_mode():
        log_p = model(ids, pos, pos >= 0, cache, Rope(model.config, 33)).log_softmax(-1)
    want = -log_p[:, 24:32].gather(-1, ids[:, 25:, None])[..., 0].mean(1)
    full, exact = (torch.cat(r.losses, 1) for r in results)
    torch.testing.assert_close(full[0].float(), want, atol=1e-4, rtol=0)
    assert full[1:].tolist() == [[0, 0, 0], [1, 1, 1]]
    torch.testing.assert_close(exact, full, atol=1e-4, rtol=0)      # 16 bits, another layout: nothing is lost


@pytest.mark.parametrize("chunk", [False, True])
def test_a_lent_prompt_changes_nothing(text: str, chunk: bool) -> None:
    """Guards the short cut of a sweep: prompts of unequal length stored from a full cache leave what a pass of their own leaves, bit for
    bit, rivals included. And scoring as one chunk: the full cache says what it says token by token, a lossy one is really looked at."""
    windows = read_windows(text, load_tokenizer(EMBEDDED), n_tokens=33, n_windows=2)
    prompts, targets = [windows[0][:16], windows[1][:24]], [windows[0][16:33], windows[1][24:30]]
    model = load_model(EMBEDDED, dtype=torch.float32)

    def logits(spec: str, exact: KVCache | None = None, chunk: bool = chunk) -> tuple[torch.Tensor, KVCache]:
        engine = Engine(model, max_batch_size=2, max_seq_len=32, cache=parse_cache(spec), compile=False)
        with torch.inference_mode():
            return torch.stack([*forced_logits(engine, prompts, targets, chunk=chunk, exact=exact)]), engine.cache

    full, cache = logits("full")
    torch.testing.assert_close(full[:, 0], logits("full", chunk=not chunk)[0][:, 0], atol=1e-4, rtol=0)
    torch.testing.assert_close(full[:6], logits("full", chunk=not chunk)[0][:6], atol=1e-4, rtol=0)
    for spec in ("minicache,bits=2,window=4", "kivi,bits=2,residual=32", "kivi,bits=2,residual=8,group=8"):
        own, lent = logits(spec)[0], logits(spec, cache)[0]
        assert torch.equal(lent, own[1:])
        assert ((own - full)[1].abs().max() > .05) == (spec != "kivi,bits=2,residual=32")      # too few tokens for a block of 32 K


def test_differences_are_paired_by_window() -> None:
    """Guards the interval: it comes from differences, not from the spread of texts; a cache cut short is held against its own windows."""
    size = {"full": LAYERS * 3 * 2 * 32 * 64 * 4}
    full, other = (Result(spec, CacheConfig.parse(spec), size, SHAPE) for spec in ("full", "quant,bits=4"))
    full.losses = [torch.tensor([[1., 3.], [0, 0], [1, 1]]), torch.tensor([[9., 9.], [0, 0], [1, 1]])]
    other.losses = [torch.tensor([[1.1, 3.3], [.02, .04], [1, .5]])]
    row = other.as_json(full)
    assert row["windows"] == 2 and row["bits_per_element"] == 16 and row["ratio_to_full"] == 1
    assert row["nll_difference_nats_per_token"] == pytest.approx(.2)
    assert row["nll_difference_interval_nats"] == pytest.approx(1.96 * .1414213 / 2 ** .5, rel=1e-5)
    assert row["kl_nats_per_token"] == pytest.approx(.03) and row["top1_agreement_share"] == .75


def test_command_prints_a_sorted_table_and_writes_what_it_says(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the whole path from the command line to table, JSON and plot, rivals and retained tokens included."""
    pytest.importorskip("matplotlib", reason="--plot is an extra")
    out, plot = tmp_path / "q.json", tmp_path / "q.png"
    caches = ["quant,bits=2", "minicache,preset=paper,window=2", "rtn,bits=4", "kivi,bits=2,group=8,residual=8"]
    assert bench.main(["quality", "--text", text, *ARGS, "--cache", *caches, "--out", str(out), "--plot", str(plot)]) == 0
    printed, data = capsys.readouterr().out, json.loads(out.read_text())
    assert [row["cache"] for row in data["rows"]] == [
        "full", "minicache,preset=paper,window=2", "minicache,preset=paper,window=2 (aligned)", "quant,bits=2",
        "kivi,bits=2,group=8,residual=8 (simulated)", "rtn,bits=4 (simulated)"]
    assert [row["kv_bytes"] for row in data["rows"]] == sorted((row["kv_bytes"] for row in data["rows"]), reverse=True)
    assert all(row["cache"] in printed and row["windows"] == 3 for row in data["rows"])
    full, paper, aligned = data["rows"][:3]
    assert aligned["kv_bytes"] == paper["kv_bytes"] and aligned["kl_nats_per_token"] < .8 * paper["kl_nats_per_token"]
    assert full["bits_per_element"] == 32 and full["kl_nats_per_token"] == 0 and full["nll_difference_nats_per_token"] == 0
    assert paper["kl_nats_per_token"] > 0 and 0 < paper["retained_fill_share"] <= 1 and "float32" in printed
    assert data["settings"]["dtype"] == "float32" and data["machine"]["torch"] == torch.__version__
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert data["settings"]["scoring"] == "decode" and "one by one" in printed
    assert bench.main(["quality", "--text", text, *ARGS, "--scoring", "chunk", "--cache", *caches[:1], "--out", str(out)]) == 0
    data = json.loads(out.read_text())
    assert data["settings"]["scoring"] == "chunk" and "as one exact chunk" in capsys.readouterr().out.partition("\n")[0]
    assert data["rows"][0]["nll_by_window"] == pytest.approx(full["nll_by_window"], abs=1e-4)


def test_ctrl_c_keeps_what_was_measured(text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards an hour's work: after Ctrl-C the table holds the windows that were finished, the status is 130."""
    def two_runs(*args, **settings):
        steps = measure(*args, **settings)
        yield from (next(steps), next(steps), next(steps))
        raise KeyboardInterrupt
    monkeypatch.setattr(quality, "measure", two_runs)
    assert bench.main(["quality", "--text", text, *ARGS, "--cache", "quant,bits=8", "quant,bits=4"]) == 130
    printed = capsys.readouterr().out
    assert "quant,bits=8" in printed and "quant,bits=4" not in printed


def test_windows_do_not_overlap_and_start_as_prompts_do(text: str) -> None:
    """Guards the independence of windows, on which the interval rests."""
    tokenizer = load_tokenizer(EMBEDDED)
    ids = tokenizer.encode(Path(text).read_text(), bos=False)
    n = len(ids) // 5 + 1
    windows = read_windows(text, tokenizer, n_tokens=n, n_windows=5)
    assert all(len(w) == n and w[0] == tokenizer.bos_id for w in windows)
    assert windows[0][1:] == ids[:n - 1] and windows[-1][1:] == ids[-n + 1:]
    assert sum((w[1:] for w in windows), []) == [x for i in range(5) for x in ids[i * (len(ids) - n + 1) // 4:][:n - 1]]
    assert (len(ids) - n + 1) // 4 >= n - 1


@pytest.mark.parametrize(("args", "message"), [
    (["--context", "9000"], "--context 9000 + --continuation 128 is 9128 tokens, the model has "),
    (["--windows", "0"], "--windows is 0; give at least 1"), (["--context", "24"], "tokens, 16 windows of"),
    (["--cache", "kivy"], "cache kind 'kivy' does not exist"), (["--cache", "rtn,group=48"], "group=48 does not divide head_dim 64"),
    (["--cache", "minicache,merge_from=5"], "choose one of"), (["--text", "absent.txt"], "--text absent.txt cannot be read"),
    (["--out", "absent/q.json"], "--out absent/q.json cannot be written"), (["--plot", "q.pdf"], "--plot q.pdf is not a .png")])
def test_a_mistake_is_one_line_before_any_work(args: list[str], message: str, text: str, capsys: pytest.CaptureFixture[str],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a traceback, and against weights that are loaded for nothing."""
    monkeypatch.setattr(quality, "load_model", lambda *args, **settings: pytest.fail("loaded"))
    assert bench.main(["quality", "--text", text, *args]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_pareto_front_holds_what_nothing_beats() -> None:
    """Guards the mark in the plot: of two caches of one size or of one loss only the better counts."""
    assert pareto_front([(4, .2), (3, .5), (4, .1), (8, .1), (16, .01)]) == [1, 2, 4]


def test_missing_figures_are_said_to_be_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards readers of the JSON (nan is no JSON) and of the table (None is not a number)."""
    path = tmp_path / "x.json"
    write_json(str(path), {"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": (None,)}})
    assert json.loads(path.read_text()) == {"a": None, "b": [None, 1.5], "c": {"d": [None]}}
    print_table([{"name": "full", "loss": None}, {"name": "q", "loss": .25}], {"name": ("cache", ""), "loss": ("loss", ".3f")})
    assert capsys.readouterr().out == "cache   loss\nfull       -\nq      0.250\n"
