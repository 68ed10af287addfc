"""How a measurement is handed over: a table on stdout, one JSON object with the machine and the versions, a PNG.

Contract: figures carry their unit in the key, None is "not measured" ("-" in the table, null in JSON). `check_outputs` runs before any
work, so that an hour's figures are not lost to a mistyped folder. Trap: matplotlib is an extra, imported only where a plot is asked for.
"""
import importlib.metadata
import json
import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Where figures come from: processor, cores, threads, accelerator (None: not used), versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
    return {"processor": names[0] if names else platform.processor() or platform.machine(), "cpu_cores": os.cpu_count(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "torch_threads": torch.get_num_threads(), "gpu": gpu, "system": f"{platform.system()} {platform.release()}",
            "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
            **{package: version(package) for package in ("triton", "transformers")}}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def print_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[str, str]]) -> None:
    """rows: dicts of raw values; columns: key -> (heading, format spec), as {"kv_bytes": ("KV bytes", ",")}. Absent or None prints "-"."""
    def cell(value: Any, spec: str) -> str:
        return "-" if value is None else format(value, spec)
    text = [[heading for heading, _ in columns.values()]]
    text += [[cell(row.get(key), spec) for key, (_, spec) in columns.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    left = [all(isinstance(row.get(key), str | None) for row in rows) for key in columns]
    for line in text:
        cells = (c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in zip(line, widths, left, strict=True))
        print("  ".join(cells).rstrip())


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def check_outputs(out: str | None, plot: str | None) -> None:
    """ValueError if --out or --plot could not be written once the work is done."""
    for option, name in (("--out", out), ("--plot", plot)):
        if name is not None and (Path(name).is_dir() or not os.access(Path(name).parent, os.W_OK)):
            raise ValueError(f"{option} {name} cannot be written; give a file in an existing folder that you may write to")
    if plot is not None:
        if Path(plot).suffix.lower() != ".png":
            raise ValueError(f"--plot {plot} is not a .png file; plots are written as PNG")
        new_figure(1, 1)


def write_json(path: str | None, payload: Mapping[str, Any]) -> None:
    """One JSON object, indented; infinities and nan become null. None: nothing is written."""
    if path is not None:
        Path(path).write_text(json.dumps(_plain(payload), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def new_figure(n_rows: int, n_columns: int, *, width: float = 6, height: float = 4.5) -> "tuple[Figure, Sequence[Sequence[Axes]]]":
    """A figure of n_rows x n_columns axes, each of width x height inches, to be saved with `save_figure`. ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib, which is not installed; pip install matplotlib, or leave --plot out") from None
    figure = Figure(figsize=(width * n_columns, height * n_rows), layout="constrained")
    return figure, figure.subplots(n_rows, n_columns, squeeze=False)


def save_figure(figure: "Figure", path: str) -> None:
    figure.savefig(path, dpi=120)
