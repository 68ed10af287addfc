"""bench.py align as its users see it: the file that it writes, what it prints, what it refuses."""
import re
from pathlib import Path

import pytest

import bench
from cache import CacheConfig
from model import ModelConfig
from weights import EMBEDDED, find_alignment

LAST_PAIR = f"minicache,merge_from={ModelConfig.from_checkpoint(EMBEDDED).n_layer - 2}"


@pytest.mark.parametrize("options", [["--cache", LAST_PAIR], ["--cache", LAST_PAIR, "--map", "orthogonal"],
                                     ["--cache", "minicache,pairs=6-7:8-9,merge_k=0", "--pairs", "any"]])
def test_bench_align_end_to_end(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Guards the command on the embedded checkpoint: a file that fits the SPEC it prints, and a table that never loses to no alignment."""
    text, out = tmp_path / "text.txt", tmp_path / "a.safetensors"
    text.write_text("Once upon a time there was a little dog named Spot. He liked to play with a red ball in the park. " * 60)
    command = ["align", "--text", str(text), "--out", str(out), "--windows", "4", "--context", "64", "--steps", "3", "--dtype", "float32"]
    assert bench.main(command + options) == 0
    printed = capsys.readouterr().out
    config = ModelConfig.from_checkpoint(EMBEDDED)
    assert find_alignment(str(out), tmp_path, config, CacheConfig.parse(printed.rsplit("serves ", 1)[1].strip()))
    rows = [line.split() for line in printed.splitlines() if re.match(r"\d+-\d+ ", line)]
    assert len(rows) == (2 if "--pairs" in options else 1)
    for row in rows:
        k_before, k_after, _, v_before, v_after, _ = (0 if x == "-" else float(x) for x in row[-6:])
        assert k_after + v_after <= k_before + v_before
    assert "--pairs" not in options or "merge_k=0" in printed


def test_bench_align_refuses(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Guards the command line: what cannot be is one line and status 2, before the work."""
    text = tmp_path / "text.txt"
    text.write_text("word " * 3000)
    positions = ModelConfig.from_checkpoint(EMBEDDED).max_position_embeddings
    for options, why in ((["--out", "a.json"], "not a .safetensors"), (["--cache", "full"], "merges no layers"),
                         (["--cache", "minicache,group=3", "--pairs", "any"], "merges 3 layers"), (["--windows", "1"], "at least 2"),
                         (["--context", "4"], f"give 8 to {positions}"), (["--cache", "minicache,granularity=token"], "head by head"),
                         (["--cache", "minicache,pairs=0-1-2", "--pairs", "any"], "merges 3 layers")):
        assert bench.main(["align", "--text", str(text), "--out", str(tmp_path / "a.safetensors"), *options]) == 2
        err = capsys.readouterr().err
        assert why in err and err.count("\n") == 1
