"""config.json -> ModelConfig: published files, both generations of keys, and refusals of one line."""
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import ModelConfig, RopeConfig, named_config
from model.transformer import Transformer

TOKENIZERS = Path(__file__).resolve().parents[2] / "shared" / "tokenizers"
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128, "hidden_size": 64,
         "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256,
         "rms_norm_eps": 1e-5}
MIXTRAL = LLAMA | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 8,
                   "num_experts_per_tok": 2}
PHI3 = LLAMA | {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "original_max_position_embeddings": 64}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2] * 8}


def test_absent_keys_take_defaults() -> None:
    """Guards: Llama 2's first config.json, without head_dim, kv heads, theta, dtype or end token."""
    assert ModelConfig.from_dict(LLAMA) == ModelConfig("llama", 128, 64, 2, 4, 4, 16, 96, 256)
    assert ModelConfig.from_dict(LLAMA | {"head_dim": None, "num_key_value_heads": None, "rope_scaling": None,
                                          "eos_token_id": None}) == ModelConfig.from_dict(LLAMA)


def test_both_generations_of_keys_agree() -> None:
    """Guards: a checkpoint saved again by a newer library must stay the same model."""
    numbers = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = LLAMA | {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **numbers}, "torch_dtype": "float16"}
    older = LLAMA | {"rope_theta": 500000, "rope_scaling": {"type": "llama3", **numbers}, "torch_dtype": "float16"}
    new = LLAMA | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **numbers}, "dtype": "float16"}
    expected = RopeConfig("llama3", 5e5, 8.0, 1.0, 4.0, 64)
    for data in (old, older, new):
        config = ModelConfig.from_dict(data)
        assert (config.rope, config.dtype) == (expected, torch.float16)


def test_longrope_reads_its_old_name_and_both_places_of_its_length() -> None:
    """Guards: Phi-3-mini-128k's first files say "su" and keep the original length outside of rope_scaling."""
    outside = ModelConfig.from_dict(PHI3 | {"rope_scaling": LONGROPE | {"type": "su"}}).rope
    data = {key: value for key, value in PHI3.items() if key != "original_max_position_embeddings"}
    inside = ModelConfig.from_dict(data | {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 64}}).rope
    assert inside == outside
    assert (outside.kind, outside.original_max_position_embeddings, outside.long_factor) == ("longrope", 64, (2.0,) * 8)
    assert outside.attention_scaling == pytest.approx((1 + 1 / 3) ** 0.5)       # sqrt(1 + log(256/64) / log(64))
    saved = ModelConfig.from_dict(PHI3 | {"rope_scaling": LONGROPE | {"attention_factor": 1.25}}).rope
    assert saved.attention_scaling == 1.25


def test_sliding_window_defaults_differ_by_family() -> None:
    """Guards: absent is not null in a Mistral config, and Llama never has a window."""
    mistral = LLAMA | {"architectures": None, "model_type": "mistral"}
    assert ModelConfig.from_dict(mistral).sliding_window == 4096
    assert ModelConfig.from_dict(mistral | {"sliding_window": None}).sliding_window is None
    assert ModelConfig.from_dict(PHI3).sliding_window is None
    assert ModelConfig.from_dict(PHI3 | {"sliding_window": 2047}).sliding_window == 2047
    assert ModelConfig.from_dict(LLAMA | {"sliding_window": 2047}).sliding_window is None


@pytest.mark.parametrize("name, folder", [("mistral-7b", "mistral/v0.3"), ("mixtral-8x7b", "mixtral")])
def test_named_config_equals_published_file(name: str, folder: str) -> None:
    """Guards: a typing error in the table of named shapes."""
    if not (TOKENIZERS / folder / "config.json").is_file():
        pytest.skip("the published config.json files are not beside the repository")
    data = json.loads((TOKENIZERS / folder / "config.json").read_text())
    if name == "mixtral-8x7b":      # the file is of a fine-tune with two more tokens
        data["vocab_size"] = 32000
    assert ModelConfig.from_dict(data) == named_config(name)


@pytest.mark.parametrize("name, parameters", [
    ("llama-2-7b", 6_738_415_616), ("llama-3-8b", 8_030_261_248), ("phi-3-mini", 3_821_079_552),
    ("mistral-7b", 7_248_023_552), ("mixtral-8x7b", 46_702_792_704)])
def test_named_config_has_the_published_number_of_parameters(name: str, parameters: int) -> None:
    """Guards: a wrong size anywhere in config or Transformer."""
    with torch.device("meta"):
        assert sum(p.numel() for p in Transformer(named_config(name)).parameters()) == parameters
    with pytest.raises(ValueError, match="llama-2-7b, llama-3-8b"):
        named_config(name.upper())


@pytest.mark.parametrize("base, change, message", [
    (LLAMA, {"model_type": "qwen2"}, "model_type is 'qwen2'; supported: llama, mistral, mixtral, phi3"),
    (LLAMA, {"model_type": None}, "model_type is missing"),
    (LLAMA, {"model_type": ["llama"]}, "model_type is \\['llama'\\]"),
    (LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, "supported: LlamaForCausalLM"),
    (LLAMA, {"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM'"),
    (LLAMA, {"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config is .*awq.*unquantised"),
    (LLAMA, {"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: silu"),
    (LLAMA, {"attention_bias": True}, "attention_bias is True; supported: false"),
    (LLAMA, {"mlp_bias": True}, "mlp_bias is True; supported: false"),
    (LLAMA, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 2}}, "rope_type is 'yarn'; supported: default, linear, llama3"),
    (LLAMA, {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one flat object"),
    (LLAMA, {"rope_scaling": {"type": "linear"}}, "factor is missing"),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0; supported: numbers from"),
    (LLAMA, {"rope_scaling": "linear"}, "rope_parameters is 'linear'"),
    (LLAMA, {"rope_theta": float("nan")}, "rope_theta is nan"),
    (LLAMA, {"partial_rotary_factor": 0.75}, "partial_rotary_factor is 0.75"),
    (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4,
                              "original_max_position_embeddings": 64}}, "low_freq_factor is 4.0; .* below high"),
    (PHI3, {"rope_scaling": LONGROPE | {"long_factor": [1.0] * 7}}, "long_factor .* head_dim / 2 = 8 numbers"),
    (PHI3, {"rope_scaling": LONGROPE | {"short_factor": [1.0] * 7 + ["1"]}}, "short_factor is '1'"),
    (PHI3, {"rope_scaling": LONGROPE, "original_max_position_embeddings": None}, "original_max_position_.* is missing"),
    (PHI3, {"sliding_window": 0}, "sliding_window is 0; supported: integers from 1"),
    (LLAMA, {"num_key_value_heads": 3}, "num_key_value_heads is 3; supported: divisors of num_attention_heads = 4"),
    (LLAMA, {"hidden_size": 65}, "hidden_size is 65; supported: multiples"),
    (LLAMA, {"hidden_size": 60}, "head_dim is 15; supported: even"),
    (LLAMA, {"hidden_size": -64}, "hidden_size is -64; supported: integers from 1"),
    (LLAMA, {"hidden_size": 64.0}, "hidden_size is 64.0"),
    (LLAMA, {"vocab_size": True}, "vocab_size is True"),
    (LLAMA, {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; supported: integers from 1 to 1024"),
    (LLAMA, {"intermediate_size": None}, "intermediate_size is missing"),
    (LLAMA, {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
    (LLAMA, {"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
    (LLAMA, {"torch_dtype": "float8_e4m3fn"}, "torch_dtype is 'float8_e4m3fn'; supported: bfloat16, float16, float32"),
    (MIXTRAL, {"num_experts_per_tok": 9}, "num_experts_per_tok is 9; supported: 1 to num_local_experts = 8"),
    (MIXTRAL, {"num_local_experts": None}, "num_local_experts is missing"),
])
def test_refusal_names_key_value_and_what_is_supported(base: dict, change: dict, message: str) -> None:
    """Guards: a model that would be computed wrongly, silently or with a traceback from deep inside."""
    ModelConfig.from_dict(base)
    with pytest.raises(ValueError, match=message) as caught:
        ModelConfig.from_dict(base | change)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
                      lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=9), x, max_size=3),
                      max_leaves=5)
KEYS = st.sampled_from(sorted({*MIXTRAL, *PHI3, "head_dim", "num_key_value_heads", "rope_scaling", "rope_parameters",
                               "rope_theta", "sliding_window", "dtype", "torch_dtype",
                               "tie_word_embeddings", "quantization_config", "layer_types", "partial_rotary_factor"}))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([LLAMA, MIXTRAL, PHI3 | {"rope_scaling": LONGROPE}]), st.dictionaries(KEYS, VALUES, max_size=3),
       st.dictionaries(st.sampled_from(["type", "rope_type", "factor", "short_factor"]), VALUES, max_size=2))
def test_any_malformed_config_is_one_line(base: dict, change: dict, rope: dict) -> None:
    """Guards: config.json comes from strangers; anything but a ValueError of one line would be a traceback."""
    data = base | {"rope_scaling": base.get("rope_scaling", {}) | rope} | change
    try:
        ModelConfig.from_dict(data)
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 400


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\ufeff{}", "[" * 100_000,
                                  '{"model_type": ' + "[" * 900 + "]" * 900 + "}"])
def test_unreadable_file_is_one_line(text: str, tmp_path: Path) -> None:
    """Guards: an empty, cut, nested or foreign file under the name config.json."""
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        ModelConfig.from_checkpoint(tmp_path)
    assert "\n" not in str(caught.value) and "config.json" in str(caught.value)


def test_absent_file_or_folder(tmp_path: Path) -> None:
    """Guards: a mistyped path; the message says which of the two is absent."""
    with pytest.raises(FileNotFoundError, match="holds no config.json"):
        ModelConfig.from_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no directory"):
        ModelConfig.from_checkpoint(tmp_path / "absent")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="UnicodeDecodeError"):
        ModelConfig.from_checkpoint(tmp_path)
