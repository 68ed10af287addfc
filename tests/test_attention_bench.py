"""bench.py attention: which sides are timed, the bytes they are charged with, what is refused. Speeds are not tested."""
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bench
from cache import CacheConfig
from cache.build import build_cache
from engine.measure import attention
from engine.measure.card import kv_read_bytes
from model.config import named_config

SMALL = ["attention", "--device", "cpu", "--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--batch", "3", "--seq", "100"]
SHAPE = dict(n_kv_head=2, head_dim=16, batch=3, max_seq_len=100, dtype=torch.bfloat16, device="cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rounds, a small buffer between them, a made-up bandwidth."""
    monkeypatch.setattr(attention, "ROUNDS", 2)
    monkeypatch.setattr(attention, "SETTLE", .001)
    monkeypatch.setattr(attention, "COLD_BYTES", 1 << 16)
    monkeypatch.setattr(attention, "measure_rates", lambda device, dtype: {"read_bytes_per_s": 1e10, "matmul_flop_per_s": 1e11})


@pytest.fixture
def run_out(tmp_path: Path):
    """Arguments -> the object that --out wrote."""
    def run(*argv: str) -> dict:
        assert bench.main([*SMALL, "--out", str(tmp_path / "out.json"), *argv]) == 0
        return json.loads((tmp_path / "out.json").read_text())
    return run


def test_every_side_has_its_figures(run_out, capsys) -> None:
    """Guards the whole way: both yardsticks, every form that can be had, GB/s and ratios that follow from times and bytes."""
    specs = ["full", "quant,bits=4", "minicache,bits=4,window=8,retain=0.1", "quant,attend_form=reference"]
    result = run_out("--cache", *specs)
    shape = dict(n_layer=2, **SHAPE)
    fast = build_cache(CacheConfig.parse("quant"), **shape).groups[0].form
    wanted = [("bf16 K and V", "SDPA, enable_gqa"), ("bf16 K and V", "SDPA, heads as queries")]
    wanted += [(spec, form) for spec in specs[:3] for form in dict.fromkeys(("reference", fast))] + [(specs[3], "reference")]
    stored = [("full", "commit, reference")] + [(spec, f"commit, {form}") for spec, form in wanted[2:] if spec != "full"]
    rows, commits = result["rows"][:len(wanted)], result["rows"][len(wanted):]
    assert [(row["cache"], row["form"]) for row in rows] == wanted
    assert [(row["cache"], row["form"]) for row in commits] == stored and all(row["median_ms"] > 0 for row in commits)
    assert not any("speedup_over_sdpa" in row for row in commits), "storing is not attention"
    best = min(row["median_ms"] for row in rows[:2])
    for row in rows:
        assert all(math.isfinite(value) and value > 0 for value in row.values() if not isinstance(value, str | None))
        assert row["gb_per_s"] == pytest.approx(row["bytes_read"] / row["median_ms"] / 1e6)
        assert row["share_of_bandwidth"] == pytest.approx(row["gb_per_s"] / 10)
        assert row["speedup_over_sdpa"] == pytest.approx(rows[0]["median_ms"] / row["median_ms"])
        assert row["speedup_over_best_sdpa"] == pytest.approx(best / row["median_ms"])
        assert row["filled_tokens"] == 99 and row["capacity"] == (None if row in rows[:2] else 100)
    assert result["settings"]["dtype"] == "bfloat16" and result["machine"]["torch_threads"] >= 1
    assert len(capsys.readouterr().out.splitlines()) == 3 + 1 + len(result["rows"])


def test_sides_take_turns_forth_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the comparison: a side that always followed the slow one would pay for it; and a turn that keeps a first call's time."""
    calls: list[str] = []
    monkeypatch.setattr(attention, "SETTLE", 0)
    attention.median_seconds([lambda name=name: calls.append(name) for name in "abc"], torch.device("cpu"))
    assert "".join(calls) == "abc" + "cba" + "abc"
    slow = iter([.02] + [0.] * 1000)
    monkeypatch.setattr(attention, "SETTLE", .03)
    assert attention.turn(lambda: attention.time.sleep(next(slow)), torch.ones(1)) < .02


@pytest.mark.parametrize("spec, group", [("minicache,pairs=6-9:7-8", 2), ("minicache,pairs=0-3-5", 3), ("minicache,group=4", 4),
                                         ("full", 2)])
def test_a_spec_is_cut_to_one_merged_group(spec: str, group: int) -> None:
    """Guards a refusal that names layers of a model which the user never gave."""
    cache = attention.one_group(CacheConfig.parse(spec))
    assert cache.group == group and (cache.kind == "full" or cache.layer_groups(group) == [tuple(range(group))])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_every_bf16_form_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a yardstick that reads less than it should, and one kernel that is absent here and ends the run."""
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 32, generator=generator) for heads, n in ((4, 1), (2, 50), (2, 50)))
    forms = attention.bf16_forms(q, k, v, by_name=True)
    assert {"SDPA, enable_gqa", "SDPA, heads as queries", "SDPA, flash", "flex"} <= forms.keys() and "SDPA, cuDNN" not in forms
    want = forms.pop("SDPA, enable_gqa")()
    for form in forms.values():
        torch.testing.assert_close(form().view_as(want), want)


def test_bytes_by_hand(run_out) -> None:
    """Guards the charge: 60 of 100 tokens, 8 in the window, 10 slots that each mask one of 52 columns; 3 rows of 2 heads of 16."""
    rows = run_out("--filled", "60", "--cache", "full", "minicache,bits=4,window=8,retain=0.1")["rows"]
    rows = [row for row in rows if row["capacity"] in (None, 100)]
    column = 2 * 8 + 2 * 2          # codes of K and V, two fp16 magnitudes
    exact = 2 * 16 * 2              # bf16 K and V
    head = (52 - 10) * column + 52 + 10 * (4 + 4) + (10 + 8) * exact        # flags; position and score of a slot
    assert {row["bytes_read"] for row in rows if row["bytes_read"] and row["cache"].startswith("minicache")} == {3 * 2 * head}
    assert {row["bytes_read"] for row in rows if row["bytes_read"] and not row["cache"].startswith("minicache")} == {3 * 2 * 60 * exact}


def test_a_cache_far_from_full_has_a_full_one_beside_it(run_out) -> None:
    """Guards the answer to 'does time follow the tokens or the capacity?': the same tokens and bytes in both, neighbours in the run."""
    specs = ["full", "quant,bits=4", "minicache,attend_form=reference"]
    rows = [row for row in run_out("--filled", "60", "--cache", *specs)["rows"] if row["bytes_read"]][2:]
    assert {row["filled_tokens"] for row in rows} == {60}
    for spec in specs:
        large, tight = [row for row in rows if row["cache"] == spec][-2:]
        assert (large["capacity"], tight["capacity"], large["form"]) == (100, 61, tight["form"])
        assert spec.startswith("mini") or large["bytes_read"] == tight["bytes_read"], "a merged cache's retained share is of the capacity"
    assert rows.index(tight) == len(rows) - 1


@pytest.mark.parametrize("spec", ["full", "quant,k_bits=3,v_bits=8,sinks=0", "minicache,retain=0,sinks=0", "quant,window=99,sinks=0"])
def test_bytes_agree_with_the_card(spec: str) -> None:
    """Guards two formulas against drifting apart: buffers here, integers there (which do not know what a retained token masks)."""
    cache = CacheConfig.parse(spec.replace("minicache", "minicache,merge_from=0"))
    layers = 2 if "minicache" in spec else 1
    group = build_cache(cache, n_layer=layers, **SHAPE).groups[0]
    tokens = torch.randn(3, 2, 1, 16).bfloat16()
    attention.fill(group, 0, 70, like=tokens, generator=torch.Generator().manual_seed(0))
    config = replace(named_config("llama-2-7b"), n_layer=layers, n_kv_head=2, head_dim=16)
    of_group = 3 * kv_read_bytes(config, cache, length=70, capacity=100, dtype=torch.bfloat16)
    assert attention.bytes_read(group, 70) * layers == of_group


def test_commit_is_timed_on_the_form_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards two rows that time the same code, and a group left on another form than its own."""
    group = build_cache(CacheConfig.parse("minicache,merge_from=0,window=3"), n_layer=2, **SHAPE).groups[0]
    group.form, fast = "cpp", []
    monkeypatch.setattr(type(group), "commit_fast", lambda self, *_: fast.append(self.form))
    k, length = torch.randn(3, 2, 1, 16).bfloat16(), torch.full((3,), 5)
    for form in ("reference", "cpp"):
        attention.commit_call(group, form, k, k, length)()
    assert fast == ["cpp"] and group.form == "cpp"
    assert torch.equal(group.k_window[:, :, :, 5 % 3], k[None, :, :, 0].expand(2, -1, -1, -1)), "the reference stored it for both layers"


def test_reference_of_a_full_cache_sees_the_filled_part_and_the_new_token() -> None:
    """Guards the mask: timing a call that attends to other tokens than the model's would be timing something else."""
    group = build_cache(CacheConfig(), n_layer=1, **SHAPE | {"dtype": torch.float32}).groups[0]
    like, q, length = torch.randn(3, 2, 1, 16), torch.randn(3, 4, 1, 16), torch.full((3,), 70)
    attention.fill(group, 0, 70, like=like, generator=torch.Generator().manual_seed(0))
    got = attention.attend_call(group, "reference", q, like, like, length)
    y = group.attend(0, q, like, like, length[:, None], torch.ones(3, 1, dtype=torch.bool), None)     # writes the new token, too
    torch.testing.assert_close(got(), y)


@pytest.mark.parametrize("argv, named", [
    (("--heads", "3"), "--heads 3 is not a multiple of --kv-heads 2"), (("--filled", "100"), "--filled is 100; give 1 to 99"),
    (("--batch", "0"), "--batch is 0; give at least 1"), (("--seq", "1"), "--seq is 1; give at least 2"),
    (("--cache", "quant,bits=5"), "choose one of: 16, 8, 4, 3, 2"), (("--head-dim", "4", "--cache", "quant,bits=4"), "not a multiple of 8"),
    (("--batch", "100000000"), "lower --batch or --seq"), (("--cache", "full,attend_form=triton"), "attend_form=triton cannot be had"),
    (("--out", "no/such/folder/x.json"), "cannot be written")])
def test_a_bad_value_is_one_line_and_status_2(argv: tuple[str, ...], named: str, capsys) -> None:
    """Guards against a traceback, and against work that starts before everything is checked."""
    assert bench.main([*SMALL, *argv]) == 2
    captured = capsys.readouterr()
    assert not captured.out and len(captured.err.splitlines()) == 1 and named in captured.err


def test_plot_shows_growing_lengths(run_out, tmp_path: Path) -> None:
    """Guards the lengths of a plot, the refill between them, and the file."""
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib")
    rows = run_out("--cache", "quant,bits=4,window=0,sinks=0,attend_form=reference", "--plot", str(tmp_path / "x.png"))["rows"]
    assert [row["filled_tokens"] for row in rows if row["form"] == "reference"] == [12, 24, 49, 99]
    assert [row["bytes_read"] // 12 for row in rows if row["form"] == "reference"] == [10 * n for n in (12, 24, 49, 99)]
    assert (tmp_path / "x.png").stat().st_size > 0


def test_memory_is_asked_for_what_runs(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Guards: a large cache with few tokens refused for the scratch of a reference form that was not asked for."""
    fast = build_cache(CacheConfig.parse("quant"), **SHAPE | {"n_layer": 1}).groups[0].form
    if fast == "reference":
        pytest.skip("no fast form here")
    scratch = 20 * 3 * 2 * 100 * 16
    monkeypatch.setattr(attention, "available_bytes", lambda device: scratch + attention.COLD_BYTES)
    assert bench.main([*SMALL, "--filled", "5", "--cache", f"quant,bits=4,attend_form={fast}"]) == 0
    assert bench.main([*SMALL, "--filled", "5", "--cache", "quant,bits=4"]) == 2 and "lower --batch or --seq" in capsys.readouterr().err
