"""Rotary positions against the reference's own tables and against complex multiplication."""
import pytest
import torch
from conftest import CHECKPOINTS

from model import ModelConfig, Rope, apply_rope
from model.rope import rope_frequencies


@pytest.mark.parametrize("name", ["llama", "llama-theta", "llama-linear", "llama3", "phi3-short"])
def test_frequencies_equal_the_reference(name: str, tiny_checkpoint) -> None:
    """Guards: each kind's formula, factor by factor, on the numbers that a saved config.json carries."""
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    path = tiny_checkpoint(name)
    reference, config = transformers.AutoConfig.from_pretrained(path), ModelConfig.from_checkpoint(path)
    kind = CHECKPOINTS[name].rope
    for S in (128, 129):        # 128: LongRoPE's original length, the last with short factors
        ours, scaling = rope_frequencies(config, S)
        if kind == "default":
            theirs, expected_scaling = transformers.LlamaModel(reference).rotary_emb.inv_freq, 1.0
        else:
            theirs, expected_scaling = utils.ROPE_INIT_FUNCTIONS[kind](reference, "cpu", seq_len=S)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
        assert scaling == pytest.approx(expected_scaling)


def test_longrope_switches_past_the_original_length(tiny_checkpoint) -> None:
    """Guards: off by one at the switch, and a scaling that would depend on it."""
    config = ModelConfig.from_checkpoint(tiny_checkpoint("phi3-short"))
    (short, a), (long, b) = rope_frequencies(config, 128), rope_frequencies(config, 129)
    ratio = torch.tensor(config.rope.long_factor) / torch.tensor(config.rope.short_factor)
    torch.testing.assert_close(short / long, ratio)
    assert a == b > 1


def test_rotation_pairs_halves_not_neighbours() -> None:
    """Guards: the interleaved layout of the original Llama files; rows keep positions of their own."""
    config = ModelConfig("llama", 128, 64, 2, 4, 4, 16, 96, 256)
    rope, position = Rope(config, 64), torch.tensor([[3, 4], [40, 41]])
    x = torch.randn(2, 4, 2, 16, generator=torch.Generator().manual_seed(0))
    y = apply_rope(x, *rope(position))
    z = torch.complex(x[..., :8], x[..., 8:]) * torch.exp(1j * position[:, None, :, None] * rope.inv_freq)
    torch.testing.assert_close(y, torch.cat((z.real, z.imag), -1))


def test_low_precision_rotates_in_fp32() -> None:
    """Guards: bf16 angles, which are wrong by whole turns at long positions."""
    config = ModelConfig("llama", 128, 64, 2, 4, 4, 16, 96, 65536)
    cos, sin = Rope(config, 65536)(torch.tensor([[65535]]))
    assert cos.shape == sin.shape == (1, 1, 1, 16) and cos.dtype == torch.float32
    x = torch.randn(1, 4, 1, 16).bfloat16()
    y = apply_rope(x, cos, sin)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, apply_rope(x.float(), cos, sin).bfloat16())
    exact = (65535 * 10000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)).cos()
    torch.testing.assert_close(cos[0, 0, 0, :8].double(), exact, atol=1e-2, rtol=0)
