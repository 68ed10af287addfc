"""Fill a Transformer: from a checkpoint, tensor by tensor into the slice that each belongs to, or with random numbers.

Contract: names, shapes, dtypes and memory are checked from the headers first; then parameters are allocated once on the
device in their final dtype and filled in place. Peak memory is the model plus one tensor.
Trap: a tied head is the embedding's own Parameter; allocation must keep them one, or the head stays empty.
"""
import sys
import time
from pathlib import Path

import torch
from torch import nn

from model.config import ModelConfig
from model.transformer import Transformer
from weights.checkpoint import StoredTensor, open_safetensors, read_headers
from weights.names import Slot, tensor_slots


def load_model(checkpoint_dir: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Transformer:
    """config.json + *.safetensors -> Transformer in eval mode on `device`, in `dtype` (None: the checkpoint's own).

    Raises FileNotFoundError for absent files and ValueError for anything else that does not fit, before allocation.
    """
    directory = Path(checkpoint_dir)
    config = ModelConfig.from_checkpoint(directory)
    stored = read_headers(directory)
    model = _empty_model(config)
    slots = _match(config, stored, dict(model.named_parameters()), directory)
    _allocate(model, torch.device(device), dtype or config.dtype)

    parameters = dict(model.named_parameters())
    progress = _Progress(sum(p.nbytes for p in parameters.values()))
    for file in sorted({stored[name].file for name in slots}):
        with open_safetensors(file) as shard:
            for name, (parameter, index) in slots.items():
                if stored[name].file == file:
                    target = parameters[parameter][index]
                    target.copy_(shard.get_tensor(name))
                    progress.advance(target.nbytes)
    progress.close()
    return model


def random_model(config: ModelConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
                 seed: int = 0) -> Transformer:
    """A Transformer of this shape with normal weights of variance 1 / fan-in (norms: ones): activations stay finite."""
    model = _empty_model(config)
    _allocate(model, torch.device(device), dtype or config.dtype)
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
    return model


def _empty_model(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config).eval()


def _match(config: ModelConfig, stored: dict[str, StoredTensor], parameters: dict[str, nn.Parameter],
           directory: Path) -> dict[str, Slot]:
    """The slot of every stored tensor. ValueError where one is missing, left over or of another shape."""
    slots = tensor_slots(config, stored)
    missing, left_over = slots.keys() - stored.keys(), stored.keys() - slots.keys()
    if config.tie_word_embeddings and "lm_head.weight" in left_over:
        left_over.remove("lm_head.weight")
        _check_tied(stored["model.embed_tokens.weight"], stored["lm_head.weight"])
    problems = [f"{len(names)} {what} (first {min(names)!r})"
                for what, names in (("missing", missing), ("left over", left_over)) if names]
    if problems:
        raise ValueError(f"{directory}: the weights do not fit config.json, tensors {' and '.join(problems)}: "
                         "download config.json and all weight files of one model")
    for name, (parameter, index) in slots.items():
        expected = tuple(parameters[parameter][index].shape)
        if stored[name].shape != expected:
            raise ValueError(f"{stored[name].file}: tensor {name!r} has shape {stored[name].shape} where config.json "
                             f"means {expected}: download config.json and weights of one model")
    return slots


def _check_tied(embed: StoredTensor, head: StoredTensor) -> None:
    """A tied checkpoint may store its head as well; a head of other values is another model."""
    with open_safetensors(embed.file) as a, open_safetensors(head.file) as b:
        x, y = a.get_tensor("model.embed_tokens.weight"), b.get_tensor("lm_head.weight")
    if x.dtype != y.dtype or not torch.equal(x, y):
        raise ValueError(f"{head.file}: lm_head.weight differs from the embedding but config.json ties the two: "
                         "set tie_word_embeddings to false")


def _allocate(model: Transformer, device: torch.device, dtype: torch.dtype) -> None:
    """Replace each meta parameter by an empty one, a shared one by a shared one. ValueError where memory is short."""
    needed, free = sum(p.numel() for p in model.parameters()) * dtype.itemsize, available_bytes(device)
    if free is not None and needed > free:
        raise ValueError(f"the weights need {needed:,} bytes in {str(dtype).removeprefix('torch.')} but {device} has "
                         f"{free:,} free: use a smaller dtype or model, or another device")
    new: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            if old not in new:
                new[old] = nn.Parameter(torch.empty(old.shape, device=device, dtype=dtype), requires_grad=False)
            setattr(module, name, new[old])


def available_bytes(device: torch.device) -> int | None:
    """What the device can still give, or None where the system does not say."""
    if device.type == "cuda":       # what the allocator keeps for reuse is ours to take
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    meminfo = Path("/proc/meminfo")
    if device.type == "cpu" and meminfo.is_file():
        available = [line.split()[1] for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")]
        return int(available[0]) * 1024 if available else None
    return None


class _Progress:
    """A line on stderr for long loads: on a terminal every 2 s in place, elsewhere every 10 s."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.shown, self.printed = total, 0, time.monotonic(), False
        self.terminal = sys.stderr.isatty()

    def advance(self, nbytes: int) -> None:
        self.done += nbytes
        if time.monotonic() - self.shown > (2 if self.terminal else 10):
            self.shown, self.printed = time.monotonic(), True
            print(f"loading weights: {self.done / 1e9:.1f} of {self.total / 1e9:.1f} GB", file=sys.stderr,
                  end="\r" if self.terminal else "\n", flush=True)

    def close(self) -> None:
        if self.terminal and self.printed:
            print(file=sys.stderr)
