"""bench.py throughput: one real measurement in its own processes, everything else in this one, on the embedded model.

Speeds are not tested, only that they are there and belong to the work that was asked for.
"""
import io
import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bench
from engine.measure import cell as cells
from engine.measure import throughput
from engine.measure.cell import Cell, measure
from model.config import NAMED_CONFIGS

SMALL = ["throughput", "--device", "cpu", "--dtype", "float32", "--prompt-tokens", "12", "--new-tokens", "6"]
RATES = {"memory_bytes": 10 ** 9, "read_bytes_per_s": 1e10, "matmul_flop_per_s": 1e11}
TRACE = Path(__file__).resolve().parents[2] / "shared" / "data" / "traces" / "azure_2023_conversation.csv"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """Cells are measured in this process; the list fills with those that were."""
    measured: list[Cell] = []

    def measure_here(cell: Cell) -> dict:
        if not cell.lengths:
            return RATES
        measured.append(cell)
        return measure(cell)
    monkeypatch.setattr(throughput, "measure_apart", measure_here)
    return measured


@pytest.fixture
def run_out(tmp_path: Path):
    """Arguments -> exit status and the object that --out wrote."""
    def run(*argv: str) -> tuple[int, dict]:
        status = bench.main([*SMALL, "--out", str(tmp_path / "out.json"), *argv])
        return status, json.loads((tmp_path / "out.json").read_text())
    return run


def test_one_real_measurement(run_out, monkeypatch, capsys) -> None:
    """Guards the whole way: processes, warm-up left out, bytes by formula and by allocation, the documented keys."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    status, result = run_out("--batch-sizes", "2", "--cache", "minicache,bits=4")
    assert status == 0
    row, = result["rows"]
    assert (row["cache"], row["batch"], row["new_tokens"], row["decode_steps"], row["decoded_tokens"]) == ("minicache,bits=4", 2, 12, 5, 10)
    assert row["kv_bytes"] == row["kv_bytes_allocated"] and row["peak_bytes"] > row["kv_bytes"] + result["cards"][0]["weight_bytes"]
    assert 0 < row["median_step_s"] <= row["p95_step_s"] and 0 < row["ttft_s"] <= row["ttft_last_row_s"] and row["prefill_tokens_per_s"] > 0
    assert row["attend_form"] in ("cpp", "reference") and {"triton", "transformers", "cuda"} <= result["machine"].keys()
    step = result["cards"][0]["steps"][0]
    assert (row["step_bytes"], row["ceiling_tokens_per_s"]) == (step["step_bytes"], step["ceiling_tokens_per_s"])
    assert row["share_of_ceiling"] == row["decode_tokens_per_s"] / row["ceiling_tokens_per_s"]
    assert row["tokens_per_s"] == 12 / row["wall_s"] and result["rates"]["read_bytes_per_s"] > 1e8
    assert result["machine"]["torch"] == torch.__version__ and result["settings"]["dtype"] == "float32" and not result["interrupted"]
    assert f"{row['kv_bytes']:,}" in capsys.readouterr().out


def test_caches_alternate_within_a_batch_size(here, run_out) -> None:
    """Guards a comparison of caches measured minutes apart, and requests that are not one a row."""
    _, result = run_out("--batch-sizes", "1,3", "--cache", "full", "quant,bits=4", "--new-tokens", "1")
    order = [(spec, batch, batch) for batch in (1, 3) for spec in ("full", "quant,bits=4")]
    assert [(c.cache, c.batch, len(c.lengths)) for c in here] == order
    assert all(row["decode_steps"] == 0 and "share_of_ceiling" not in row for row in result["rows"]), "one new token: there is no decode"


@pytest.mark.skipif(not TRACE.is_file(), reason="no shared data beside the repository")
def test_real_trace_is_clipped_and_counted(here, run_out) -> None:
    """Guards real lengths beyond a small model's positions: clipped, counted, every request run to its length on refilled rows."""
    _, result = run_out("--trace", str(TRACE), "--requests", "5", "--batch-sizes", "2", "--cache", "full", "--new-tokens", "9")
    assert result["requests_clipped"] == 5 and here[0].lengths == ((12, 9),) * 5 and result["capacity_tokens"] == 21
    assert result["rows"][0]["new_tokens"] == 45 and result["rows"][0]["batch"] == 2


def test_trace_sets_the_capacity(here, run_out, tmp_path) -> None:
    """Guards the average of rows that are not all busy: the ceiling is that of the rows that were."""
    file = tmp_path / "trace.csv"
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\na,5,3\nb,9,2\nc,4,5\nd,900,900\n")
    _, result = run_out("--trace", str(file), "--requests", "3", "--batch-sizes", "2", "--cache", "full")
    assert (result["capacity_tokens"], result["requests_clipped"]) == (11, 0) and here[0].lengths == ((5, 3), (9, 2), (4, 5))
    row = result["rows"][0]
    assert row["new_tokens"] == 10 and row["decoded_tokens"] == 7 and row["ceiling_tokens_per_s"] > 0


@pytest.mark.parametrize("whole", [1, 7])
def test_fill_memory_takes_the_rows_of_the_card(here, run_out, monkeypatch, whole) -> None:
    monkeypatch.setattr(throughput, "whole_rows", lambda n, device: whole)
    _, result = run_out("--fill-memory", "0.051", "--cache", "full", "minicache,bits=4,window=2,sinks=0")
    fits = [card["rows_that_fit"] // whole * whole for card in result["cards"]]
    assert [c.batch for c in here] == fits == [row["batch"] for row in result["rows"]] and fits[1] > fits[0] > 1


@pytest.mark.parametrize("device, whole, card_rows, true_rows", [
    ("cpu", 1, 1, 1), ("cpu", 1, 1, 0), ("cpu", 1, 100, 100), ("cpu", 1, 100, 61), ("cpu", 1, 1000, 3), ("cpu", 1, 0, 0),
    ("cuda", 1, 61, 30), ("cuda", 8, 248, 241), ("cuda", 8, 248, 5), ("cuda", 128, 1280, 1194), ("cuda", 128, 1280, 3),
    ("cuda", 128, 4096, 1900), ("cuda", 128, 4096, 1100)])
def test_fill_memory_shrinks_to_what_runs(monkeypatch, device, whole, card_rows, true_rows) -> None:
    """Guards a search that gives up, never ends, or reports a batch that did not run; rows that are no multiple of a tile's."""
    refused = {"error": "no room", "no_room": True}
    monkeypatch.setattr(throughput, "measure_apart", lambda cell: refused if cell.batch > true_rows else {"rows": cell.batch})
    cell, figures = throughput.measure_apart_or_fewer(Cell(device, "float32", batch=card_rows), throughput.Load(((1, 1),)))
    grain = max(whole - 1, card_rows // 32 // whole * whole)
    if "error" in figures:
        assert true_rows <= grain
    else:
        assert cell.batch == figures["rows"] <= true_rows <= cell.batch + grain and cell.batch % whole == 0


def test_an_error_of_another_kind_is_not_tried_with_fewer_rows(monkeypatch) -> None:
    """Guards ten processes that each load the weights to meet the same bug."""
    tried = []
    monkeypatch.setattr(throughput, "measure_apart", lambda cell: tried.append(cell.batch) or {"error": "no kernel", "no_room": False})
    _, figures = throughput.measure_apart_or_fewer(Cell("cpu", "float32", batch=100), throughput.Load(((1, 1),)))
    assert tried == [100] and figures["error"] == "no kernel"


def test_each_cell_is_on_disk_before_the_next_begins(here, run_out, monkeypatch, tmp_path) -> None:
    """Guards hours of cells lost to a kill that nothing can catch."""
    found, measure_here = [], throughput.measure_apart

    def look_first(cell: Cell) -> dict:
        if cell.lengths and (tmp_path / "out.json").exists():
            found.append(json.loads((tmp_path / "out.json").read_text()))
        return measure_here(cell)
    monkeypatch.setattr(throughput, "measure_apart", look_first)
    _, result = run_out("--batch-sizes", "1", "--cache", "full", "quant,bits=4", "--new-tokens", "2")
    (early,) = found
    assert early["rows"] == result["rows"][:1] and early["interrupted"] and not result["interrupted"]


def test_ctrl_c_keeps_what_was_measured(monkeypatch, run_out, capsys) -> None:
    """Guards an hour of cells lost to one key."""
    answers = iter([RATES, {"error": "no room"}, {"new_tokens": 3, "decode_steps": 0, "peak_bytes": 5, "kv_bytes_allocated": 7}])
    monkeypatch.setattr(throughput, "measure_apart", lambda cell: next(answers, None) or interrupt())

    def interrupt():
        raise KeyboardInterrupt
    status, result = run_out("--batch-sizes", "1,2", "--cache", "full", "minicache")
    assert status == 130 and result["interrupted"] and [("error" in row) for row in result["rows"]] == [True, False]
    assert "full, batch 1: no room" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_child(kind, monkeypatch, tmp_path) -> None:
    """Guards a process that measures on after Ctrl-C or `timeout`, and the second signal of `timeout`, which must not end the report."""
    child = tmp_path / "child"
    child.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/started\nmv {tmp_path}/started {tmp_path}/pid\nexec sleep 60\n")
    child.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(child))

    def send() -> None:
        while not (tmp_path / "pid").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), kind)
    before = signal.getsignal(signal.SIGTERM)
    try:
        threading.Thread(target=send).start()
        with pytest.raises(KeyboardInterrupt):
            cells.measure_apart(Cell("cpu", "float32"))
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), 0)
        if kind == signal.SIGTERM:
            signal.raise_signal(kind)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_named_shape_of_few_layers(here, run_out, monkeypatch) -> None:
    """Guards --layers: the card and the model that is measured are of the same depth."""
    small = replace(NAMED_CONFIGS["llama-2-7b"], vocab_size=64, dim=64, intermediate_size=64, n_head=2, n_kv_head=2)
    monkeypatch.setitem(NAMED_CONFIGS, "llama-2-7b", small)
    _, result = run_out("--model", "llama-2-7b", "--layers", "4", "--batch-sizes", "1", "--cache", "minicache")
    row, = result["rows"]
    assert row["kv_bytes"] == row["kv_bytes_allocated"] == result["cards"][0]["kv_bytes_per_row"]
    assert result["cards"][0]["kv_bytes_by_kind"].keys() >= {"full", "direction"}, "two layers as they are, two merged"


def test_cell_that_cannot_run_answers_with_one_line(monkeypatch, capsys) -> None:
    """Guards a child's traceback where the parent waits for JSON."""
    cell = {"device": "cpu", "dtype": "float32", "model": "gpt-5", "lengths": [[1, 1]]}
    monkeypatch.setattr(cells.sys, "stdin", io.StringIO(json.dumps(cell)))
    assert cells.main() == 0
    assert "unknown model 'gpt-5'" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize("error, no_room", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True), (MemoryError(), True),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
    (ValueError("a full cache of 9 rows takes 99 bytes, 9 are free"), True), (RuntimeError("no kernel image"), False)])
def test_a_cell_says_whether_memory_was_short(error, no_room, monkeypatch, capsys) -> None:
    def fail(cell: Cell) -> dict:
        raise error
    monkeypatch.setattr(cells, "measure", fail)
    monkeypatch.setattr(cells.sys, "stdin", io.StringIO(json.dumps({"device": "cpu", "dtype": "float32"})))
    assert cells.main() == 0 and json.loads(capsys.readouterr().out)["no_room"] is no_room


def test_peers_are_rows_of_the_same_table(here, run_out, capsys) -> None:
    pytest.importorskip("transformers")
    _, result = run_out("--batch-sizes", "2", "--cache", "full", "--peer", "transformers")
    assert [row["cache"] for row in result["rows"]][:3] == ["full", "transformers StaticCache", "transformers DynamicCache"]
    full, static, dynamic = result["rows"][:3]
    assert full["kv_bytes"] == static["kv_bytes_allocated"] > dynamic["kv_bytes_allocated"] > 0
    assert full["ceiling_tokens_per_s"] == static["ceiling_tokens_per_s"]
    assert "QuantizedCache" in capsys.readouterr().out


def test_plot_is_a_png(here, run_out, tmp_path) -> None:
    pytest.importorskip("matplotlib", reason="plots are an extra")
    run_out("--batch-sizes", "1,2", "--cache", "full", "--plot", str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


# ---- mistakes: one line with the value, the limit and the cure, before anything is measured

@pytest.mark.parametrize("argv, says", [
    (["--model", "gpt-5"], ["'gpt-5'", "llama-2-7b"]),
    (["--model", "llama-2-7b", "--checkpoint", "x"], ["--model llama-2-7b", "--checkpoint x", "one of them"]),
    (["--model", "llama-2-7b", "--layers", "33"], ["--layers is 33", "1 to 32"]),
    (["--layers", "2"], ["--layers 2", "--model"]),
    (["--checkpoint", "no/such/folder"], ["no/such/folder"]),
    (["--cache", "full", "minicache,bits=5"], ["5", "16, 8, 4, 3, 2"]),
    (["--cache", "minicache,merge_from=3"], ["merge_from=3", "layers"]),
    (["--batch-sizes", "1,x"], ["1,x", "1,8,32"]),
    (["--batch-sizes", "0"], ["--batch-sizes 0"]),
    (["--batch-sizes", "2", "--fill-memory", "1"], ["exclude"]),
    (["--fill-memory", "0"], ["0 GB"]),
    (["--fill-memory", "nan"], ["nan GB"]),
    (["--prompt-tokens", "0"], ["--prompt-tokens is 0"]),
    (["--new-tokens", "5000"], ["5012 tokens", "positions", "--new-tokens"]),
    (["--requests", "3"], ["--trace"]),
    (["--trace", "no-such-file.csv"], ["no-such-file.csv"]),
    (["--trace", "{trace}", "--requests", "3"], ["2 requests", "3", "--requests"]),
    (["--trace", "{trace}", "--requests", "2", "--peer", "transformers"], ["one length"]),
    (["--trace", "{trace}", "--requests", "2", "--new-tokens", "2048"], ["--new-tokens 2048", "no room for a prompt", "positions"]),
    (["--trace", "{words}"], ["ContextTokens and GeneratedTokens"]),
    (["--trace", "{columns}"], ["ContextTokens and GeneratedTokens"]),
    (["--peer", "vllm"], ["'vllm'", "transformers"]),
    (["--peer", "gpt-fast"], ["gpt-fast DIR"]),
    (["--peer", "transformers", "x"], ["transformers x", "gpt-fast DIR"]),
    (["--peer", "transformers", "--peer", "gpt-fast", "no/such"], ["no/such", "model.py"]),
    (["--plot", "plot.jpg"], ["plot.jpg", "PNG"]),
    (["--plot", "plot.png", "--card-only"], ["plot.png", "--card-only"]),
    (["--out", "no/such/folder/out.json"], ["no/such/folder/out.json"]),
], ids=lambda x: " ".join(x))
def test_mistakes_are_one_line(argv, says, monkeypatch, capsys, tmp_path) -> None:
    """Guards tracebacks, and mistakes that are found only after the first cells have run."""
    monkeypatch.setattr(throughput, "measure_apart", lambda cell: pytest.fail("measured before the arguments were checked"))
    files = {"trace": "ContextTokens,GeneratedTokens\n3,4\n5,6\n", "words": "ContextTokens,GeneratedTokens\nthree,4\n",
             "columns": "a,b\n3,4\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    argv = [arg.format(**{name: tmp_path / name for name in files}) for arg in argv]
    try:
        status = bench.main([*SMALL, *argv])
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "") and err.count("\n") == 1 and all(text in err for text in says), err


def test_nothing_could_be_measured(monkeypatch, capsys) -> None:
    """Guards exit status 0 and an empty table where every cell was refused."""
    monkeypatch.setattr(throughput, "measure_apart", lambda cell: {"error": "no room for 8 rows"} if cell.lengths else RATES)
    assert bench.main([*SMALL, "--cache", "full"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "bench.py: error: no room for 8 rows"
