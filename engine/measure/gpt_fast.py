"""gpt-fast on our weights: a user's own checkout, in a process of its own because its modules are called `model` and `generate`, too.

Contract: `GptFast.generate` yields the engine's Steps for one prompt, greedy; each step is timed there, synchronised (gpt_fast_child.py).
Trap: its rotary pairs are neighbours (2i, 2i+1), ours (i, i + D/2): the rows of q and k change places on the way.
"""
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.sampling import SamplingParams
from engine.stats import Step
from model import ModelConfig, Transformer

FILES = ("model.py", "generate.py")
CHILD = Path(__file__).with_name("gpt_fast_child.py")


def check_checkout(directory: str) -> None:
    missing = [name for name in FILES if not (Path(directory) / name).is_file()]
    if missing:
        raise ValueError(f"--peer gpt-fast {directory}: no {' and no '.join(missing)} there; give a checkout of meta-pytorch/gpt-fast")


def why_not(c: ModelConfig, capacity: int) -> str | None:
    """What it lacks for this model, or None."""
    if c.n_expert or c.family == "phi3":
        return f"it has no {c.family} model in this form"
    if c.sliding_window is not None and c.sliding_window < capacity:
        return f"it has no sliding window, the model's is {c.sliding_window}"
    if c.rope.kind != "default":
        return f"rope type {c.rope.kind} is not compared, only default"
    if c.n_head * c.head_dim != c.dim:
        return f"its head_dim is width / heads = {c.dim / c.n_head:g}, the model's is {c.head_dim}"
    return None


def model_args(c: ModelConfig, capacity: int) -> dict[str, int | float]:
    return {"block_size": capacity, "vocab_size": c.vocab_size, "n_layer": c.n_layer, "n_head": c.n_head, "n_local_heads": c.n_kv_head,
            "dim": c.dim, "intermediate_size": c.intermediate_size, "rope_base": c.rope.theta, "norm_eps": c.norm_eps}


def state_dict(model: Transformer) -> dict[str, Tensor]:
    """Our parameters under its names; q and k rows of a head interleaved: row i + D/2 stands behind row i."""
    c = model.config
    rotated = (c.n_head + c.n_kv_head) * c.head_dim
    state = {"tok_embeddings.weight": model.embed.weight, "norm.weight": model.norm.weight, "output.weight": model.head.weight}
    for i, layer in enumerate(model.layers):
        qk, v = layer.attention.wqkv.weight[:rotated], layer.attention.wqkv.weight[rotated:]
        gate, up = layer.mlp.w13.weight.chunk(2)
        state |= {f"layers.{i}.{name}.weight": weight for name, weight in {
            "attention.wqkv": torch.cat((qk.view(-1, 2, c.head_dim // 2, c.dim).transpose(1, 2).reshape(qk.shape), v)),
            "attention.wo": layer.attention.wo.weight, "attention_norm": layer.attention_norm.weight, "ffn_norm": layer.mlp_norm.weight,
            "feed_forward.w1": gate, "feed_forward.w3": up, "feed_forward.w2": layer.mlp.w2.weight}.items()}
    return {name: weight.detach().cpu().clone() for name, weight in state.items()}     # clone: torch.save writes a slice's whole storage


class GptFast:
    """One process of the checkout over a copy of `model`'s weights, which it reads from a temporary model.pth. One row."""

    def __init__(self, model: Transformer, directory: str, *, capacity: int, compile: bool) -> None:
        """RuntimeError where the checkout does not load."""
        self.answer: dict = {}
        with tempfile.TemporaryDirectory() as folder:
            torch.save(state_dict(model), Path(folder, "model.pth"))
            setup = {"weights": str(Path(folder, "model.pth")), "args": model_args(model.config, capacity), "capacity": capacity,
                     "device": str(model.embed.weight.device), "threads": torch.get_num_threads(), "compile": compile}
            self.child = subprocess.Popen([sys.executable, str(CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                          cwd=directory, env=os.environ | {"PYTHONPATH": str(Path(directory).resolve())})
            self.ask(setup)

    def ask(self, request: dict) -> dict:
        """One JSON line there, one back. RuntimeError with its last words."""
        print(json.dumps(request), file=self.child.stdin, flush=True)
        line = self.child.stdout.readline()
        if not line:
            raise RuntimeError(f"gpt-fast ended with status {self.child.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"gpt-fast: {answer['error']}")
        return answer

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> Iterator[Step]:
        """The whole run at once, so that no pipe stands between two steps."""
        self.answer, now = self.ask({"prompt": list(prompts[0]), "new_tokens": params[0].max_new_tokens}), 0.0
        for i, (token, seconds) in enumerate(zip(self.answer["tokens"], self.answer["seconds"], strict=True)):
            now += seconds
            yield Step("decode" if i else "prefill", [(0, token)], [], 1 if i else len(prompts[0]), seconds, now, True)

    def kv_bytes(self) -> int:
        return self.answer["kv_bytes"]

    def peak_bytes(self) -> int:
        """Of its process; on CUDA of its tensors."""
        return self.answer["peak_bytes"]
