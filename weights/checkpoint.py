"""The files of a checkpoint directory: which ones hold the weights and what their headers say, before data is read.

Contract: only *.safetensors is opened, only inside the directory; every problem is one line that names file and cure.
Trap: files are often symlinks into a download cache, so a shard's path is judged by its name and never resolved.
"""
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

DTYPES = ("BF16", "F16", "F32")
ALIGNMENT = "alignment.safetensors"     # may lie beside the weights: see alignment.py


@dataclass(frozen=True)
class StoredTensor:
    """One header entry."""

    file: Path
    shape: tuple[int, ...]


def read_headers(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint by name, rotary tables left out. Refuses bad files, dtypes and duplicates."""
    found: dict[str, StoredTensor] = {}
    for file in weight_files(directory):
        with open_safetensors(file) as shard:
            for name in shard.keys():
                if name.endswith("rotary_emb.inv_freq"):        # old exports: a table that we compute
                    continue
                if name in found:
                    raise ValueError(f"tensor {name!r} is in {found[name].file} and again in {file}: keep one of them")
                header = shard.get_slice(name)
                if header.get_dtype() not in DTYPES:
                    raise ValueError(f"{file}: tensor {name!r} is stored as {header.get_dtype()}; "
                                     f"supported: {', '.join(DTYPES)} (unquantised weights)")
                found[name] = StoredTensor(file, tuple(header.get_shape()))
    return found


@contextmanager
def open_safetensors(file: Path) -> Iterator[safe_open]:
    """safe_open on the CPU (memory-mapped: data is read when copied); a broken file is one ValueError."""
    try:
        with safe_open(file, framework="pt", device="cpu") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is truncated or no safetensors file ({str(error)!r}): download it again") from None


def weight_files(directory: Path) -> list[Path]:
    """model.safetensors, else the index's shards, else every *.safetensors. FileNotFoundError where there is none."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        return _indexed_files(index)
    files = sorted(file for file in directory.glob("*.safetensors") if file.name != ALIGNMENT)
    if files:
        return files
    for file in sorted(directory.iterdir()):
        if file.suffix in (".bin", ".pth", ".pt", ".gguf"):
            raise ValueError(f"{directory} holds {file.name!r} but no *.safetensors: convert them to safetensors")
    raise FileNotFoundError(f"{directory} holds no *.safetensors: download the checkpoint's weights into it")


def _indexed_files(index: Path) -> list[Path]:
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        escaping = [name for name in shards if Path(name).name != name]
    except (ValueError, RecursionError, OSError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} is not an index (weight_map: tensor name to file): download it again") from None
    if escaping:
        raise ValueError(f"{index} names the shard {escaping[0]!r}: shards must lie beside the index")
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{index.parent} lacks {len(missing)} of {len(shards)} shards of its index, first "
                                f"{missing[0]!r}: download the missing files")
    return [index.parent / name for name in shards]
