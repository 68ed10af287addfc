"""bench.py similarity: what is recorded, what is compared, which pairs it would merge."""
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bench
from cache.merge import merge
from engine.engine import Engine
from engine.measure.similarity import compare_layers, pairs_to_merge, record
from model import ModelConfig
from weights import EMBEDDED, load_model


def test_cosines_and_losses_of_known_vectors() -> None:
    """Guards the figures that decide: alike, opposite (a signed coefficient serves both), at right angles, small beside large."""
    a = torch.randn(200, 2, 8, generator=torch.Generator().manual_seed(1))
    b = a.flip(-1) * torch.tensor([1., -1] * 4)         # at right angles to a, of the same length
    x = compare_layers(torch.stack((a, 3 * a, -a, b, b / 100)))
    median, loss = x["head"]["median"], x["merge_loss"]
    for i, j, cosine, lost in ((0, 1, 1, 0), (0, 2, -1, 0), (0, 3, 0, .5), (1, 2, -1, 0), (0, 4, 0, .5)):
        assert median[i][j] == median[j][i] == pytest.approx(cosine, abs=1e-5)
        assert loss[i][j] == pytest.approx(lost, abs=1e-4), (i, j)


def test_loss_is_that_of_the_caches_own_merge() -> None:
    """Guards the closed form against drifting from what merge=optimal, coef=projection stores."""
    x = torch.randn(2, 300, 3, 16, generator=torch.Generator().manual_seed(2))
    x[1] = .4 * x[0] + .7 * x[1]
    direction, coefficient = merge(x, "optimal", t=.6, coef="projection")
    lost = (x - coefficient[..., None] * direction).square().sum((1, 2, 3)) / x.square().sum((1, 2, 3))
    assert compare_layers(x)["merge_loss"][0][1] == pytest.approx(lost.mean().item(), abs=1e-4)


def test_a_common_mean_vector_is_seen_through() -> None:
    """Guards the centred view: independent tokens around one shared vector look alike until it is removed."""
    x = torch.randn(2, 500, 1, 32, generator=torch.Generator().manual_seed(3)) + 5
    figures = compare_layers(x)
    assert figures["head"]["median"][0][1] > .9 and abs(figures["head_centred"]["median"][0][1]) < .05


def test_per_token_joins_the_heads() -> None:
    """Guards the paper's granularity: a token's vector is all its heads together, so opposite heads cancel."""
    a = torch.randn(100, 1, 8, generator=torch.Generator().manual_seed(4))
    figures = compare_layers(torch.stack((torch.cat((a, a), 1), torch.cat((a, -a), 1))))
    assert figures["token"]["median"][0][1] == pytest.approx(0, abs=1e-6) and figures["head"]["p5"][0][1] == pytest.approx(-1)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "phi3-long"])
def test_recorded_states_are_the_models(name: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    """Guards the recorder's own attention (a sliding window would be lost) and the way back through RoPE (longrope scales cos and sin)."""
    model = load_model(tiny_checkpoint(name), dtype=torch.float32)
    windows = torch.randint(3, 128, (2, 70), generator=torch.Generator().manual_seed(5)).tolist()
    states = record(model, windows)
    engine = Engine(model, max_batch_size=2, max_seq_len=70)
    length, zero = torch.tensor([70, 70]), torch.tensor([0, 0])
    engine.prefill(torch.tensor(windows), zero, length, torch.tensor([0, 1]), past=0)
    for layer, handle in enumerate(engine.cache.layers):
        for kind, stored in zip("kv", handle.group.read(handle.index, length), strict=True):
            torch.testing.assert_close(states[kind][layer], stored.transpose(1, 2).flatten(0, 1), atol=1e-4, rtol=0)
    block, (h, g, _) = model.layers[0], model.layers[0].attention.heads
    with torch.inference_mode():
        qkv = block.attention.wqkv(block.attention_norm(model.embed(torch.tensor(windows))))
    k = qkv.view(140, -1, model.config.head_dim)[:, h:h + g]
    torch.testing.assert_close(states["k_before_rope"][0], k, atol=1e-4, rtol=0)


def test_pairs_are_disjoint_and_below_the_limit() -> None:
    """Guards the closing lines: the best pair is taken first, its neighbours then are not free."""
    adjacent = [.05, .01, .08, .02, .3]
    loss = [[0.] * 6 for _ in range(6)]
    for i, lost in enumerate(adjacent):
        loss[i][i + 1] = lost
    assert pairs_to_merge(loss) == [(1, 2), (3, 4)]


def test_command_ends_with_what_it_would_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the whole path from the command line to tables, verdict, JSON and plot."""
    pytest.importorskip("matplotlib", reason="--plot is an extra")
    text, out, plot = tmp_path / "t.txt", tmp_path / "s.json", tmp_path / "s.png"
    text.write_text("Once upon a time there was a little fox. It lived near a river and liked to sing. " * 8)
    args = ["similarity", "--text", str(text), "--context", "40", "--windows", "2", "--out", str(out), "--plot", str(plot)]
    assert bench.main(args) == 0
    lines, data = capsys.readouterr().out.splitlines(), json.loads(out.read_text())
    assert lines[-3].startswith("What to merge") and lines[-2].startswith("K after RoPE: ") and lines[-1].startswith("V: ")
    cosines, n = data["cosine_by_layer_pair"]["v"]["token_centred"]["p5"], ModelConfig.from_checkpoint(EMBEDDED).n_layer
    assert data["settings"]["tokens"] == 80 and len(cosines) == n
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a traceback for windows beyond the model's positions."""
    assert bench.main(["similarity", "--text", "x", "--context", "9000"]) == 2
    error = capsys.readouterr().err
    assert "--context is 9000; give 2 to " in error and error.count("\n") == 1
