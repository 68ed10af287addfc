"""One cell of a throughput table: one cache, one batch, in a process of its own.

Contract: `measure_apart(cell)` starts `python -m engine.measure.cell`, which reads a Cell as JSON and answers with one JSON line: figures,
or `error`. A process a cell because the resident set never falls, because the graphs of one cache must not count against the recompile
limit of another, and because running out of memory then ends one cell alone. Warm-up, with all compiling, is a run of its own, not counted.
"""
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from cache import CacheConfig
from engine.engine import Engine
from engine.measure.card import measure_rates
from engine.measure.gpt_fast import GptFast
from engine.measure.peers import Peer
from engine.sampling import SamplingParams
from engine.stats import Stats, Step, peak_bytes, resident_bytes
from model.config import named_config
from weights import available_bytes, load_model, random_model

WARM_UP_TOKENS = 8          # CUDA graphs: one step compiles, one records, the next ones replay
WARM_UP_PROMPT = 1024       # on a CPU a prompt of any length runs the same code, and a long one takes minutes
# a cache that grows by concatenation asks for a little more each step: near the limit of a GPU's memory, blocks that grow serve it best
PEER_ENV = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
NO_ROOM = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "previous error during capture")


@dataclass(frozen=True)
class Cell:
    """What is run. `lengths`: (prompt tokens, new tokens) of each request; more of them than `batch` are queued."""

    device: str
    dtype: str
    threads: int = 1                        # of torch on the CPU
    checkpoint: str | None = None           # a folder, or else:
    model: str | None = None                # a named shape with random weights,
    layers: int | None = None               # cut to so many layers
    cache: str = "full"
    peer: str | None = None                 # a cache class of transformers, or gpt-fast, instead of `cache`
    peer_dir: str | None = None             # gpt-fast's checkout
    batch: int = 1
    capacity: int = 1
    lengths: Sequence[tuple[int, int]] = () # empty: measure the machine's rates instead
    compile: bool = False
    memory_limit: int | None = None         # bytes; enforced on CUDA only


def measure_apart(cell: Cell) -> dict:
    """The figures of `cell`, or {"error": one line, "no_room": whether fewer rows may help}. Ctrl-C and SIGTERM raise KeyboardInterrupt and
    end the child, too."""
    root = Path(__file__).resolve().parents[2]
    before = signal.signal(signal.SIGTERM, interrupt)
    # a session of its own: Ctrl-C reaches this process alone, which then ends the child and the child's children
    child = subprocess.Popen([sys.executable, "-m", "engine.measure.cell"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                             cwd=root, start_new_session=True, env=PEER_ENV | os.environ if cell.peer else None)
    try:
        answer, _ = child.communicate(json.dumps(asdict(cell)))
        signal.signal(signal.SIGTERM, before)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if child.returncode:
        killed = child.returncode == -signal.SIGKILL
        why = " (killed: out of memory?)" if killed else ""
        return {"error": f"the measuring process ended with status {child.returncode}{why}", "no_room": killed}
    return json.loads(answer.splitlines()[-1])


def interrupt(*_: object) -> None:
    """SIGTERM as Ctrl-C, once: `timeout` sends it twice, and the second must not end the report of what was measured."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    cell = Cell(**json.load(sys.stdin))
    try:
        result = measure(cell)
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:      # RuntimeError: torch out of memory, or its compiler
        text = " ".join(str(error).split())     # ValueError: the arguments were checked before, so a size that memory cannot hold
        no_room = isinstance(error, ValueError | MemoryError) or any(words in text for words in NO_ROOM)
        result = {"error": text[:300] or type(error).__name__, "no_room": no_room}
    print(json.dumps(result))
    return 0


def measure(cell: Cell) -> dict:
    """Run it here. ValueError where weights or cache do not fit."""
    device, dtype = torch.device(cell.device), getattr(torch, cell.dtype)
    torch.set_num_threads(cell.threads)
    if not cell.lengths:
        return {"memory_bytes": available_bytes(device)} | measure_rates(device, dtype)
    if cell.memory_limit and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        if cell.memory_limit > total:
            raise ValueError(f"--fill-memory asks for {cell.memory_limit:,} bytes, {device} has {total:,}; give less")
        torch.cuda.set_per_process_memory_fraction(cell.memory_limit / total, device.index or 0)
    # 1. the model and what runs it
    if cell.model:
        config = named_config(cell.model)
        model = random_model(replace(config, n_layer=cell.layers or config.n_layer), device=device, dtype=dtype)
    else:
        model = load_model(cell.checkpoint, device=device, dtype=dtype)
    config, before = model.config, resident_bytes(device)
    if cell.peer == "gpt-fast":
        runner = GptFast(model, cell.peer_dir, capacity=cell.capacity, compile=cell.compile)
    elif cell.peer:
        runner = Peer(model, cell.peer, checkpoint=cell.checkpoint, capacity=cell.capacity, compile=cell.compile)
    else:
        runner = Engine(model, max_batch_size=cell.batch, max_seq_len=cell.capacity, cache=CacheConfig.parse(cell.cache),
                        compile=cell.compile)
    del model       # a peer of another process needs its room
    prompts = random_prompts(config.vocab_size, [p for p, _ in cell.lengths])
    params, brief = ([SamplingParams(max_new_tokens=min(n, most)) for _, n in cell.lengths] for most in (cell.capacity, WARM_UP_TOKENS))
    # 2. once to warm up, once to measure
    shown = Progress(sum(p + n for p, n in cell.lengths))
    short = prompts[:cell.batch] if device.type == "cuda" else [p[:WARM_UP_PROMPT] for p in prompts[:cell.batch]]
    for _ in range(2 if device.type == "cuda" else 1):      # the first run's compiling gives memory back that a prefill wants again
        for _ in runner.generate(short, brief[:cell.batch]):
            pass
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    begin = time.perf_counter()
    result = figures(shown.watch(runner.generate(prompts, params)))
    wall_s = time.perf_counter() - begin
    allocated = runner.kv_bytes() if cell.peer else sum(runner.cache.nbytes().values())
    form = None if cell.peer else runner.cache.groups[-1].form
    peak = runner.peak_bytes() if cell.peer == "gpt-fast" else peak_bytes(device)
    return result | {"wall_s": wall_s, "tokens_per_s": result["new_tokens"] / wall_s, "attend_form": form, "kv_bytes_allocated": allocated,
                     "peak_bytes": peak, "peak_reserved_bytes": torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None,
                     "peak_above_weights_bytes": None if cell.peer == "gpt-fast" else max(0, peak - before)}


class Progress:
    """A line on stderr for cells that take long: on a terminal every second in place, elsewhere every 30 s."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.shown, self.terminal = total, 0, time.monotonic(), sys.stderr.isatty()

    def watch(self, steps: Iterator[Step]) -> Iterator[Step]:
        for step in steps:
            self.done += step.n_fed
            if time.monotonic() - self.shown > (1 if self.terminal else 30):
                self.shown = time.monotonic()
                print(f"  {self.done:,} of {self.total:,} tokens", file=sys.stderr, end="\r" if self.terminal else "\n", flush=True)
            yield step


def random_prompts(vocab_size: int, lengths: Sequence[int]) -> list[list[int]]:
    """The same ids for every cache and every peer."""
    source = random.Random(0)
    return [[source.randrange(vocab_size) for _ in range(n)] for n in lengths]


def figures(steps: Iterator[Step]) -> dict:
    """Run a warm generate() to its end -> times and rates, prefill and decode apart."""
    stats = Stats()
    for step in steps:
        stats.add(step)
    decode = [s for s in stats.steps if s.phase == "decode"]
    seconds = sorted(s.seconds for s in decode)
    new_tokens, decoded_tokens = (sum(len(s.tokens) for s in steps) for steps in (stats.steps, decode))
    result = {"ttft_s": stats.ttft_s, "ttft_last_row_s": stats.ttft_last_row_s, "prefill_tokens_per_s": stats.prefill_tokens_per_s,
              "new_tokens": new_tokens, "decoded_tokens": decoded_tokens, "decode_steps": len(decode)}
    if decode:
        result |= {"decode_tokens_per_s": stats.decode_tokens_per_s, "median_step_s": stats.median_step_s,
                   "p95_step_s": seconds[math.ceil(0.95 * len(seconds)) - 1]}
    return result


if __name__ == "__main__":
    sys.exit(main())
