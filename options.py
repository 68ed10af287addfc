"""What the two command lines share: options of a model, how they are read, and what becomes of a mistake.

Trap: torch and all that needs it are imported inside functions, so that --help and a mistyped option answer at once.
"""
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from model import ModelConfig
    from tokenizer import Tokenizer

SMALL = 100e6           # parameters, about: below, a matrix product is over before a second thread is awake
CURES = {               # torch's own errors that say something of the machine, not of the code
    "OutOfMemoryError": "lower the batch size or --max-seq-len, or choose a smaller --cache",
    "InductorError": "torch.compile needs a working C++ compiler (CUDA: Triton); leave --compile out, or use --no-compile",
}


class Parser(argparse.ArgumentParser):
    """A mistake is one line, without the usage text."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}; --help lists the options\n")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, where: read by `open_checkpoint` and `device_and_dtype`."""
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", help="folder of config.json, *.safetensors, tokenizer (default: the embedded model)")
    add("--device", metavar="D", default="auto", help="auto, cpu, cuda or cuda:N (default: auto, a GPU if there is one)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
        help="default: auto, the checkpoint's own, but float32 for a small model on a CPU (quality, needle, similarity: its own)")


def add_alignment_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--alignment", metavar="FILE", help="coordinates for the layers that SPEC merges, from bench.py align, or none "
                        "(default: alignment.safetensors beside the checkpoint, if it is there and fits)")


def exit_status(prog: str, run: Callable[[], int]) -> int:
    """What `run` returns; a user's mistake (ValueError, OSError) or a machine's limit (CURES) is one line and 2, Ctrl-C 130, a reader that
    went away 141."""
    for file in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(file, "reconfigure"):                    # a character that the terminal lacks must not end the program
            file.reconfigure(errors="replace")
    try:
        status = run()
        if sys.stdout:                                      # None where the caller closed it
            sys.stdout.flush()
        return status
    except BrokenPipeError:                                 # `| head`: as quiet as a tool that SIGPIPE ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # else the interpreter complains at its last flush
        return 141
    except (ValueError, OSError) as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        cure = next((CURES[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in CURES), None)
        if cure is None:
            raise
        print(f"{prog}: error: {' '.join(str(error).split())[:300]}; {cure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def device_and_dtype(args: argparse.Namespace) -> tuple[torch.device, torch.dtype | None]:
    """dtype None: the checkpoint's own. ValueError for a device that is unknown or not there."""
    import torch
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    name = args.device if args.device != "auto" else "cuda" if count else "cpu"
    kind, _, index = name.partition(":")
    if name not in ("cpu", "cuda") and not (kind == "cuda" and index.isdecimal()):
        raise ValueError(f"device {name!r} is not supported; choose auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(index or 0) >= count:
        raise ValueError(f"device {name!r} is not there, torch sees {count} CUDA GPUs; choose --device auto or cpu")
    return torch.device(name), None if args.dtype == "auto" else getattr(torch, args.dtype)


def settle_cpu(config: ModelConfig, device: torch.device, dtype: torch.dtype | None) -> torch.dtype | None:
    """On a CPU a small model runs faster in float32 (where dtype is auto) and on one thread (where OMP_NUM_THREADS is not set)."""
    import torch
    n = config.n_layer * config.dim * (2 * config.dim + 3 * config.intermediate_size * max(config.n_expert, 1))
    if device.type != "cpu" or n > SMALL:
        return dtype
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    return dtype or torch.float32


def open_checkpoint(name: str | None) -> tuple[Path, ModelConfig, Tokenizer]:
    """The folder (None: the embedded model), its config and its tokenizer. ValueError if the two do not belong together."""
    from model import ModelConfig
    from tokenizer import load_tokenizer
    from weights import EMBEDDED
    checkpoint = EMBEDDED if name is None else Path(name)
    config, tokenizer = ModelConfig.from_checkpoint(checkpoint), load_tokenizer(checkpoint)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{checkpoint}: the tokenizer has {tokenizer.vocab_size} ids, the model's vocabulary {config.vocab_size}; "
                         "download config.json and tokenizer of one model")
    return checkpoint, config, tokenizer


def read_text(path: str, option: str, wanted: str) -> str:
    """A UTF-8 file, a byte order mark left out. ValueError names the option and what it wants."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"byte {error.object[error.start]:#04x} at {error.start}"
        raise ValueError(f"{option} {path} is not UTF-8 ({where}); save it as UTF-8") from None
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be read ({error.strerror}); give {wanted}") from None
