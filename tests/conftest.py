"""Tiny random checkpoints of every family, saved by `transformers` as it saves real ones, and the parity table.

Contract: `tiny_checkpoint(name)` returns a directory, made once a session; `name` is a key of CHECKPOINTS.
Trap: freshly made models have flat attention and norms of one; these have sharp attention and random norms, or a
swapped norm or a wrong mask would hide below any tolerance.
"""
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tokenizer_files import write_json, write_tiktoken, write_with_added

from tokenizer import load_tokenizer

torch.set_num_threads(1)        # tiny models are ten times faster with one thread
settings.register_profile("repeatable", derandomize=True)       # a run that fails fails again
settings.load_profile("repeatable")


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Command lines take a GPU by themselves where there is one; all figures here are a CPU's, but for those of the CUDA kernels."""
    with pytest.MonkeyPatch.context() as patch:
        if not any(name in request.module.__name__ for name in ("kernel_triton", "kernel_engine")):
            patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
         "initializer_range": 0.15, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PHI3 = {"hidden_size": 192, "num_attention_heads": 2, "initializer_range": 0.1}       # head_dim 96, as the real one
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 128}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0 + 0.02 * i for i in range(48)],
            "long_factor": [1.0 + 0.25 * i for i in range(48)]}


def old_keys(config: dict) -> dict:
    """config.json as transformers 4 wrote it."""
    rope = config.pop("rope_parameters")
    rope.pop("partial_rotary_factor", None)
    config |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": config.pop("dtype")}
    kind = rope.pop("rope_type")
    return config | {"rope_scaling": None if kind == "default" else {"type": kind, **rope}}


@dataclass(frozen=True)
class Tiny:
    """One checkpoint: the class in transformers, changes to SIZES, how it is saved, an edit of its config.json."""

    model: str
    changes: dict = field(default_factory=dict)
    save: dict = field(default_factory=dict)
    edit: Callable[[dict], dict] = dict

    @property
    def rope(self) -> str:
        return self.changes.get("rope_parameters", {}).get("rope_type", "default")


CHECKPOINTS = {
    "llama": Tiny("Llama"),
    "llama-mha": Tiny("Llama", {"num_key_value_heads": 4}),
    "llama-wide-head": Tiny("Llama", {"head_dim": 32}),
    "llama-theta": Tiny("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama-sharded": Tiny("Llama", save={"max_shard_size": "60KB"}),
    "llama-old-keys": Tiny("Llama", edit=old_keys),
    "llama-linear": Tiny("Llama", {"rope_parameters": LINEAR}),
    "llama-linear-old-keys": Tiny("Llama", {"rope_parameters": LINEAR}, edit=old_keys),
    "llama3": Tiny("Llama", {"rope_parameters": LLAMA3}),
    "llama3-old-keys": Tiny("Llama", {"rope_parameters": LLAMA3}, edit=old_keys),
    "llama3-tied": Tiny("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mistral": Tiny("Mistral", {"sliding_window": None}),
    "mistral-window": Tiny("Mistral", {"sliding_window": 9}, {"max_shard_size": "60KB"}),
    "phi3": Tiny("Phi3", PHI3),
    "phi3-window": Tiny("Phi3", PHI3 | {"sliding_window": 13}, {"max_shard_size": "400KB"}, old_keys),
    "phi3-short": Tiny("Phi3", PHI3 | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128}),
    "phi3-long": Tiny("Phi3", PHI3 | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
    "phi3-long-old-keys": Tiny("Phi3", PHI3 | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
                               edit=old_keys),
    "mixtral": Tiny("Mixtral", {"num_local_experts": 8}, {"max_shard_size": "100KB"}),
    "mixtral-window": Tiny("Mixtral", {"num_local_experts": 4, "sliding_window": 9}, edit=old_keys),
    "mixtral-stacked": Tiny("Mixtral", {"num_local_experts": 8}, {"save_original_format": False}),
}


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name -> directory with config.json and fp32 weights. Treat it as read-only: it is shared by the session."""
    transformers = pytest.importorskip("transformers", reason="tiny checkpoints are made by transformers")
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name], tiny = tmp_path_factory.mktemp(name), CHECKPOINTS[name]
            torch.manual_seed(list(CHECKPOINTS).index(name))
            config = getattr(transformers, f"{tiny.model}Config")(**(SIZES | tiny.changes))
            model = getattr(transformers, f"{tiny.model}ForCausalLM")(config).float()
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if "norm" in key:
                        parameter.uniform_(0.5, 1.5)
            model.save_pretrained(made[name], **tiny.save)
            path = made[name] / "config.json"
            path.write_text(json.dumps(tiny.edit(json.loads(path.read_text()))))
        return made[name]

    return make


@pytest.fixture(scope="module")
def backends(tmp_path_factory) -> dict:
    """One tokenizer per file format, from files that every clone has."""
    writers = {"sentencepiece": write_with_added, "tiktoken": write_tiktoken, "json": write_json}
    return {name: load_tokenizer(write(tmp_path_factory.mktemp(name))) for name, write in writers.items()}


@pytest.fixture(scope="session")
def tales(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """times -> path of a text: six sentences of a story, so many times over."""
    def write(times: int) -> str:
        path = tmp_path_factory.mktemp("text") / "tales.txt"
        path.write_text(" ".join(f"The {a} dog saw {n} birds and ran to the {b}." for n, (a, b) in enumerate(
            [("old", "lake"), ("small", "house"), ("happy", "big tree"), ("red", "girl"), ("slow", "hill"), ("sad", "river")] * times)))
        return str(path)
    return write


@pytest.fixture
def parity_table(record_property: Callable[[str, object], None]) -> Callable[[tuple[str, str, str, float, float]], None]:
    """Takes a row (checkpoint, family, rope kind, max difference in prefill, in decode), printed when the run ends."""
    return lambda row: record_property("parity", row)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = [value for report in terminalreporter.getreports("passed") for name, value in report.user_properties if name == "parity"]
    if rows:
        terminalreporter.section("parity with transformers, fp32: largest difference of a logit")
        terminalreporter.line(f"{'checkpoint':<24}{'family':<10}{'rope':<10}{'prefill':>10}{'decode':>10}")
        for name, family, rope, prefill, decode in rows:
            terminalreporter.line(f"{name:<24}{family:<10}{rope:<10}{prefill:>10.1e}{decode:>10.1e}")
