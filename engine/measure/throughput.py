"""How many rows fit and how fast they run: a card from integers first, then measurements, one process a cell.

Contract: every cache (and peer) runs the same prompts of random ids, greedy, without stop ids; caches alternate within each batch size.
Ceiling and achieved GB/s count what a step must read: see card.py. Ctrl-C and SIGTERM keep the cells that are done; --out is written anew
after each. Trap: on CPU peak bytes are the resident set with Python, torch and its compiler in it, and --fill-memory is a count of rows,
not an enforced limit.
"""
import argparse
import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch

from cache import CacheConfig
from cache.codec import rotation_matrix
from engine.measure.card import ceiling_tokens_per_s, kv_bytes, make_card, step_cost, whole_rows
from engine.measure.cell import Cell, measure_apart
from engine.measure.peers import COMPILED, read_peers
from engine.measure.report import check_outputs, machine, new_figure, print_table, progress, save_figure, write_json
from model import ModelConfig
from model.config import named_config
from options import device_and_dtype, settle_cpu
from weights import EMBEDDED, available_bytes

CACHES = ["full", "minicache", "minicache,bits=4", "quant,bits=4"]
PROMPT_TOKENS, NEW_TOKENS, REQUESTS = 161, 338, 64          # the first two: the ShareGPT-like load of arXiv 2405.14366
CUDA_BYTES = 600_000_000        # for a graph's own pool and the libraries' workspaces, which the card does not count: a guess
TRACE_COLUMNS = ("ContextTokens", "GeneratedTokens")
CARD = {"cache": ("cache", ""), "kv_bytes_per_row": ("KV bytes/row", ","), "kv_bytes_per_token": ("per token", ",.0f"),
        "bits_per_element": ("bits/element", ".2f"), "ratio_to_full": ("x bf16", ".2f"), "rows_that_fit": ("rows that fit", ",")}
STEP = {"cache": ("cache", ""), "batch": ("rows", ","), "step_bytes": ("bytes read/step", ","),
        "ceiling_tokens_per_s": ("ceiling tok/s", ",.0f")}
SPEED = {"cache": ("cache", ""), "batch": ("rows", ","), "ttft_s": ("TTFT s", ".3f"), "ttft_last_row_s": ("last row", ".3f"),
         "prefill_tokens_per_s": ("prefill tok/s", ",.0f"),
         "median_step_s": ("step s", ".4f"), "p95_step_s": ("p95", ".4f"), "decode_tokens_per_s": ("decode tok/s", ",.1f"),
         "tokens_per_s": ("with prefill", ",.1f"), "achieved_gb_per_s": ("GB/s", ",.2f"), "share_of_ceiling": ("of ceiling", ".0%")}
MEMORY = {"cache": ("cache", ""), "batch": ("rows", ","), "kv_bytes": ("KV bytes (formula)", ","),
          "kv_bytes_allocated": ("KV bytes (allocated)", ","), "peak_bytes": ("peak bytes", ","),
          "peak_reserved_bytes": ("reserved", ","), "peak_above_weights_bytes": ("peak above weights", ",")}


@dataclass(frozen=True)
class Load:
    """Requests as (prompt tokens, new tokens). One pair: every row runs it; a list: a queue that refills the rows."""

    lengths: tuple[tuple[int, int], ...]
    queued: bool = False
    clipped: int = 0

    @property
    def capacity(self) -> int:
        return max(p + n for p, n in self.lengths)

    @property
    def prompt_tokens(self) -> int:
        return max(p for p, _ in self.lengths)

    def requests(self, batch: int) -> tuple[tuple[int, int], ...]:
        return self.lengths if self.queued else self.lengths * batch

    @property
    def stored_tokens(self) -> int:
        """What a row holds in the average decode step."""
        return round(sum(n * (p + n / 2) for p, n in self.lengths) / sum(n for _, n in self.lengths))


def run(args: argparse.Namespace) -> int:
    """Check, print the cards, measure, report. Exit status 130 after Ctrl-C."""
    # 1. all that can be refused
    if args.card_only and args.plot:
        raise ValueError(f"--plot {args.plot} draws what was measured, --card-only measures nothing; leave one of them out")
    check_outputs(args.out, args.plot)
    device, dtype = device_and_dtype(args)
    checkpoint, config = read_model(args)
    dtype = settle_cpu(config, device, dtype) or config.dtype
    specs = list(dict.fromkeys(args.cache or CACHES))
    for spec in specs:
        if CacheConfig.parse(spec).code_widths(config.n_layer):
            rotation_matrix(config.head_dim)
    if args.fill_memory is not None and not 0 < args.fill_memory < 1e6:
        raise ValueError(f"--fill-memory is {args.fill_memory:g} GB; give more than 0, at most what the device has")
    limit = None if args.fill_memory is None else int(args.fill_memory * 1e9)
    batches = read_batch_sizes(args.batch_sizes, limit)
    load = read_load(args, config)
    if args.peer and load.queued:
        raise ValueError("--peer runs prompts of one length; leave out --trace or --peer")
    peers, notes = read_peers(args.peer or [], config, load.capacity, batches)
    base = Cell(device=str(device), dtype=str(dtype).removeprefix("torch."), threads=torch.get_num_threads(), checkpoint=checkpoint,
                model=args.model, layers=args.layers, capacity=load.capacity,
                compile=device.type == "cuda" if args.compile is None else args.compile, memory_limit=limit)

    # 2. the cards
    rates = {"memory_bytes": available_bytes(device)} if args.card_only else measure_apart(base)
    if "error" in rates:
        raise ValueError(rates["error"])
    cuda, memory = device.type == "cuda", limit or rates["memory_bytes"]
    if cuda and not args.card_only:
        memory = max(0, memory - CUDA_BYTES)
    speeds = None if args.card_only else rates
    shape = dict(capacity=load.capacity, prompt_tokens=load.prompt_tokens, length=load.stored_tokens, dtype=dtype)
    cards = [make_card(config, spec, batches=batches, memory=memory, rates=speeds, **shape) for spec in specs]
    payload = {"subject": "throughput", "machine": machine(device),
               "settings": vars(args) | {"cache": specs, "dtype": base.dtype, "device": base.device, "compile": base.compile},
               "capacity_tokens": load.capacity, "requests_clipped": load.clipped, "rates": rates, "cards": cards, "rows": [],
               "interrupted": not args.card_only}       # until the last cell is done
    print_cards(cards, base, load, memory, speeds)
    if args.card_only:
        write_json(args.out, payload)
        return 0

    # 3. the measurements: caches and peers alternate within a batch size
    for note in notes:
        print(note)
    kinds = [replace(base, cache=spec) for spec in specs] + [replace(base, peer=peer, peer_dir=folder) for peer, folder in peers]
    fits = {card["cache"]: card["rows_that_fit"] for card in cards}
    if limit and peers and "full" not in fits:
        fits["full"] = make_card(config, "full", batches=[1], memory=memory, **shape)["rows_that_fit"]
    rows = payload["rows"]
    fits = {spec: n - n % whole_rows(n, base.device) for spec, n in fits.items()}
    todo = [(kind, fits[kind.cache] if batch is None else batch) for batch in batches or [None] for kind in kinds
            if kind.peer != "gpt-fast" or batch == 1]
    try:
        for kind, size in todo:
            cell = replace(kind, batch=size, lengths=load.requests(size))
            progress(f"{len(rows) + 1} of {len(todo)}: {name_of(cell)}, batch {size}")
            cell, figures = measure_apart_or_fewer(cell, load) if limit else (cell, measure_apart(cell))
            rows.append(row_of(cell, figures, config, load, rates))
            write_json(args.out, payload)
        payload["interrupted"] = False
    except KeyboardInterrupt:
        progress("interrupted: the table holds what was measured until here")
    # 4. the report
    measured = [row for row in rows if "error" not in row]
    if rows and not measured:
        raise ValueError(rows[0]["error"])
    for columns in (SPEED, MEMORY) if measured else ():
        print_table(measured, {key: column for key, column in columns.items() if any(row.get(key) is not None for row in measured)})
        print()
    for row in rows:
        if "error" in row:
            print(f"{row['cache']}, batch {row['batch']}: {row['error']}")
    write_json(args.out, payload)
    if args.plot and measured:
        plot(measured, args.plot)
    return 130 if payload["interrupted"] else 0


def read_model(args: argparse.Namespace) -> tuple[str | None, ModelConfig]:
    """The checkpoint's folder (None: random weights) and the model's integers."""
    if args.model is None:
        if args.layers is not None:
            raise ValueError(f"--layers {args.layers} cuts a named shape; give --model NAME")
        checkpoint = Path(args.checkpoint or EMBEDDED).resolve()
        return str(checkpoint), ModelConfig.from_checkpoint(checkpoint)
    if args.checkpoint is not None:
        raise ValueError(f"--model {args.model} is random weights, --checkpoint {args.checkpoint} is real ones; give one of them")
    config = named_config(args.model)
    if args.layers is not None and not 1 <= args.layers <= config.n_layer:
        raise ValueError(f"--layers is {args.layers}, {args.model} can have 1 to {config.n_layer}; give a number inside")
    return None, replace(config, n_layer=args.layers or config.n_layer)


def read_batch_sizes(text: str | None, limit: int | None) -> list[int]:
    """"1,8,32" -> [1, 8, 32]; [] where memory decides."""
    if limit is not None:
        if text is not None:
            raise ValueError(f"--batch-sizes {text} and --fill-memory exclude each other; give one of them")
        return []
    sizes = (text or "1,8,32").split(",")
    if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise ValueError(f"--batch-sizes {text} is not a list of whole numbers from 1 on; write for example 1,8,32")
    return [int(size) for size in sizes]


def read_load(args: argparse.Namespace, config: ModelConfig) -> Load:
    """--trace: lengths of a file's first N requests, clipped to --prompt-tokens and --new-tokens or to what the model's positions hold."""
    most = config.max_position_embeddings
    for option, value in (("--prompt-tokens", args.prompt_tokens), ("--new-tokens", args.new_tokens), ("--requests", args.requests)):
        if value is not None and value < 1:
            raise ValueError(f"{option} is {value}; give at least 1")
    if args.trace is None:
        if args.requests is not None:
            raise ValueError(f"--requests {args.requests} counts requests of a trace; give --trace FILE")
        load = Load(((args.prompt_tokens or PROMPT_TOKENS, args.new_tokens or NEW_TOKENS),))
    else:
        wanted = read_trace(args.trace, args.requests or REQUESTS)
        new = args.new_tokens or min(max(n for _, n in wanted), most // 2)
        if new >= most:
            raise ValueError(f"--new-tokens {new} leaves no room for a prompt, the model has {most} positions; lower it")
        prompt = args.prompt_tokens or min(max(p for p, _ in wanted), most - new)
        lengths = tuple((min(p, prompt), min(n, new)) for p, n in wanted)
        load = Load(lengths, queued=True, clipped=sum(a != b for a, b in zip(lengths, wanted, strict=True)))
    if load.capacity > most:
        raise ValueError(f"{load.capacity} tokens a row, the model has {most} positions; lower --prompt-tokens or --new-tokens")
    return load


def read_trace(path: str, n: int) -> list[tuple[int, int]]:
    """CSV with TRACE_COLUMNS -> the first n (prompt tokens, new tokens)."""
    needed = " and ".join(TRACE_COLUMNS)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(islice(csv.DictReader(file), n))
        prompt, new = ([int(row[column]) for row in rows] for column in TRACE_COLUMNS)
    except OSError as error:
        raise ValueError(f"--trace {path} cannot be read ({error.strerror}); give a CSV with {needed}") from None
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"--trace {path} is not a CSV of whole numbers under {needed} ({error}); give one with these columns") from None
    if len(rows) < n:
        raise ValueError(f"--trace {path} holds {len(rows)} requests, wanted are {n}; lower --requests")
    if min(prompt + new) < 1:
        raise ValueError(f"--trace {path} has a request of {min(prompt + new)} tokens; lengths start at 1")
    return list(zip(prompt, new, strict=True))


def name_of(cell: Cell) -> str:
    if cell.peer is None:
        return cell.cache
    return "transformers " * (cell.peer != "gpt-fast") + cell.peer + ", compiled" * (cell.compile and cell.peer in COMPILED)


def measure_apart_or_fewer(cell: Cell, load: Load) -> tuple[Cell, dict]:
    """The largest batch up to cell.batch that runs within the memory limit, to 1 in 32 or to `whole_rows`: down in growing steps, as the
    card is nearly right, then halving between what ran and what did not. An error that says nothing of memory ends the search."""
    nothing = {"error": "0 rows fit beside the weights and a prefill's scratch; raise --fill-memory"}
    best, low, high, size, whole = (cell, nothing), 0, cell.batch + 1, cell.batch, whole_rows(cell.batch, cell.device)
    down = grain = max(1, cell.batch // 32 // whole) * whole
    while high - low > grain:
        trial = replace(cell, batch=size, lengths=load.requests(size))
        figures = measure_apart(trial)
        if "error" in figures:
            high, best = size, best if low else (trial, figures)
            if not figures.get("no_room"):
                break
            progress(f"  {size} rows do not fit: {figures['error']}")
            size, down = max((low + high) // 2 // whole * whole, high - down), 2 * down
        else:
            low, best = size, (trial, figures)
            size = (low + high) // 2 // whole * whole
    return best


def row_of(cell: Cell, figures: dict, config: ModelConfig, load: Load, rates: dict[str, float]) -> dict:
    """A row of the result: what was measured, and what the formulas say of it."""
    row = {"cache": name_of(cell), "batch": cell.batch, "compile": cell.compile and cell.peer in (None, *COMPILED)} | figures
    if "error" in figures:
        return row
    cache, shape = CacheConfig.parse(cell.cache), dict(capacity=load.capacity, dtype=getattr(torch, cell.dtype))
    row["kv_bytes"] = sum(kv_bytes(config, cache, batch=cell.batch, **shape).values()) if cell.peer != "QuantizedCache" else None
    if figures["decode_steps"] and cell.peer != "QuantizedCache":
        active = max(1, round(figures["decoded_tokens"] / figures["decode_steps"]))
        cost = step_cost(config, cache, batch=active, length=load.stored_tokens, **shape)
        row["step_bytes"], row["ceiling_tokens_per_s"] = cost[0] + cost[1], ceiling_tokens_per_s(cost, active, rates)
        row["achieved_gb_per_s"] = row["step_bytes"] / figures["median_step_s"] / 1e9
        row["share_of_ceiling"] = figures["decode_tokens_per_s"] / row["ceiling_tokens_per_s"]
    return row


def print_cards(cards: Sequence[dict], base: Cell, load: Load, memory: int | None, rates: dict[str, float] | None) -> None:
    (p, n), requests = load.lengths[0], len(load.lengths)
    what = f"{requests} requests of a trace, {load.clipped} clipped" if load.queued else f"{p} + {n} tokens a row"
    name = base.checkpoint or base.model + (f", {base.layers} layers" if base.layers else "")
    print(f"{name}, {base.dtype} on {base.device}: {cards[0]['weight_bytes']:,} bytes of weights; {what}, capacity {load.capacity}")
    if memory is not None:
        kept = f" (and {CUDA_BYTES:,} kept for CUDA's own)" if rates and base.device.startswith("cuda") else ""
        print(f"memory: {memory:,} bytes{kept}, shared by the weights, the rows that fit, and prefill scratch (estimated)")
    if rates:
        print(f"measured: reads {rates['read_bytes_per_s'] / 1e9:.1f} GB/s, linear layers {rates['matmul_flop_per_s'] / 1e12:.3f} TFLOP/s")
    print("\nKV cache, everything counted; x bf16: how many times smaller than a bf16 full cache of this capacity")
    print_table(cards, CARD)
    print("\nbytes of a row by kind")
    kinds = {kind: (kind, ",") for card in cards for kind in card["kv_bytes_by_kind"]}
    print_table([{"cache": card["cache"]} | card["kv_bytes_by_kind"] for card in cards], {"cache": ("cache", "")} | kinds)
    print(f"\none decode step with {load.stored_tokens} tokens stored in each row")
    print_table([{"cache": card["cache"]} | step for card in cards for step in card["steps"]], STEP)
    print(flush=True)


def plot(rows: Sequence[dict], path: str) -> None:
    """Tokens/s and memory beyond the weights over the batch, one line a cache."""
    figure, ((speed, memory),) = new_figure(1, 2)
    for name in dict.fromkeys(row["cache"] for row in rows):
        points = sorted((row for row in rows if row["cache"] == name), key=lambda row: row["batch"])
        batch = [row["batch"] for row in points]
        line, = speed.plot(batch, [row["tokens_per_s"] for row in points], marker="o", label=name)
        for key, style in (("peak_above_weights_bytes", "o-"), ("kv_bytes_allocated", ".:")):
            if all(row[key] for row in points):         # gpt-fast's peak is that of its own process
                memory.plot(batch, [row[key] / 1e9 for row in points], style, color=line.get_color())
    speed.set(title="New tokens a second, prompts included (higher is better)", xlabel="rows decoded together", ylabel="tokens/s")
    memory.set(title="Memory: solid, peak above the weights; dotted, KV cache alone", xlabel="rows decoded together",
               ylabel="GB (1e9 bytes)")
    speed.set_ylim(bottom=0)
    for axes in (speed, memory):
        axes.set_xticks(sorted({row["batch"] for row in rows}))
        axes.grid(alpha=0.3)
    speed.legend()
    save_figure(figure, path)
