"""Token ids in, token ids out. The engine knows nothing about text: prompts are lists of ids, steps are streams of ids.

`generate` is a generator of Steps; streaming, chat and benchmarks read the same one. More prompts than rows are queued, and a
row that ends is refilled while the others keep their state. A request's ids do not depend on its neighbours (fp32).
"""
import inspect
import secrets
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from cache import CacheConfig, GroupPrefill, bits_per_element
from engine.decode import MAX_STOP_IDS, DecodeStep, Replayed
from engine.sampling import METHODS, SamplingParams
from engine.stats import Step
from model import ModelConfig, Rope, Transformer
from weights import Alignment, align, available_bytes, load_model

PREFILL_CHUNK = 512         # tokens a row: bounds the MLP's activations; the logits do not depend on it
PREFILL_MASK = 2 ** 23      # entries of a chunk's mask over the whole prompt: past 16k tokens chunks become shorter
PREFILL_BUDGET = 16384      # rows x tokens of one prefill: bounds hidden states and one group's exact K, V; one row always fits
AHEAD = ("cuda",)           # devices that begin a step before the last one's tokens are handed out; a row ended from outside has stored it


@dataclass
class Request:
    """A prompt on its way: `row` is its slot while it runs, `tokens` what came so far."""

    index: int
    prompt: list[int]
    params: SamplingParams
    row: int = -1
    tokens: list[int] = field(default_factory=list)


def check_sizes(config: ModelConfig, max_batch_size: int, max_seq_len: int, prefill_chunk: int = PREFILL_CHUNK) -> None:
    """ValueError where a size cannot be, whatever the memory: before weights are read."""
    for name, value in (("max_batch_size", max_batch_size), ("max_seq_len", max_seq_len), ("prefill_chunk", prefill_chunk)):
        if value < 1:
            raise ValueError(f"{name} is {value}; give at least 1")
    if max_seq_len > config.max_position_embeddings:
        raise ValueError(f"max_seq_len is {max_seq_len}, the model has {config.max_position_embeddings} positions; ask for no more")


def check_memory(cache: CacheConfig, need: int, rows: int, max_seq_len: int, device: torch.device, room: int | None) -> None:
    """ValueError where a cache of `need` bytes passes the `room` on `device` (None: unknown)."""
    if room is not None and need > room:
        raise ValueError(f"a {cache} cache of {rows} rows x {max_seq_len} tokens takes {need:,} bytes, {max(room, 0):,} are free on "
                         f"{device}; {max(room, 0) * rows // need} rows would fit: lower the batch size or --max-seq-len")


def fused_attention(device: torch.device) -> AbstractContextManager:
    """For a prompt on CUDA: SDPA without cuDNN's kernel, which plans anew for every length. Good for one `with`."""
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(kernels) if device.type == "cuda" else nullcontext()


class Engine:
    """A model, a cache of `max_batch_size` rows by `max_seq_len` tokens, and one decode step over all rows."""

    def __init__(self, model: Transformer, *, max_batch_size: int = 1, max_seq_len: int, cache: CacheConfig = CacheConfig(),
                 compile: bool | None = None, prefill_chunk: int = PREFILL_CHUNK, prefill_budget: int = PREFILL_BUDGET) -> None:
        """Allocates the cache. `compile` None: on for CUDA, off on CPU. ValueError for sizes that cannot be or that memory cannot hold."""
        c, weight = model.config, model.embed.weight
        check_sizes(c, max_batch_size, max_seq_len, prefill_chunk)
        self.model, self.config, self.cache_config = model, c, cache
        self.device, self.dtype = weight.device, weight.dtype
        self.max_batch_size, self.max_seq_len = max_batch_size, max_seq_len
        self.prefill_chunk, self.prefill_budget = prefill_chunk, prefill_budget
        self.compile = self.device.type == "cuda" if compile is None else compile
        self.shape = dict(n_layer=c.n_layer, n_kv_head=c.n_kv_head, head_dim=c.head_dim, batch=max_batch_size, max_seq_len=max_seq_len,
                          dtype=self.dtype)
        need = sum(cache.nbytes(**self.shape).values())
        check_memory(cache, need, max_batch_size, max_seq_len, self.device, available_bytes(self.device))
        self.cache = cache.build(**self.shape, device=self.device, sliding_window=c.sliding_window)
        self.rope = Rope(c, max_seq_len).to(self.device)
        self.step = DecodeStep(model, self.cache, self.rope, max_batch_size, self.device)
        self.decode_one_token = self._compiled(self.step) if self.compile else self.step
        self.stored: list[list[int]] = [[] for _ in range(max_batch_size)]      # the ids that each row's cache holds
        self._steps = Counter()         # by phase and method: the first ones compile
        self._running: Iterator[Step] | None = None
        self._interrupted = False
        self._ended: set[int] = set()

    @classmethod
    def from_pretrained(cls, checkpoint: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
                        max_batch_size: int = 1, max_seq_len: int, cache: CacheConfig = CacheConfig(),
                        alignment: Alignment | None = None, compile: bool | None = None) -> "Engine":
        """An engine on a checkpoint directory, aligned for what `cache` merges. dtype None: the checkpoint's own."""
        check_sizes(ModelConfig.from_checkpoint(checkpoint), max_batch_size, max_seq_len)
        if alignment:
            alignment.wanted(cache, ModelConfig.from_checkpoint(checkpoint).n_layer)
        model = load_model(checkpoint, device=device, dtype=dtype)
        align(model, alignment, cache)
        return cls(model, max_batch_size=max_batch_size, max_seq_len=max_seq_len, cache=cache, compile=compile)

    def _compiled(self, step: DecodeStep):
        """One graph, or an error; an engine's recompiles do not count against those of another where torch can tell them apart."""
        isolate = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
        cuda = self.device.type == "cuda"
        # reordering moves a layer's reads behind the group's commit, which then copies every buffer it writes; what several read and itself
        # reads two is stored: else each norm adds up the layers before it, and each layer computes cos and sin
        options = {"reorder_for_locality": False, "realize_reads_threshold": 1}
        if cuda and self.max_batch_size == 1:       # the products of one row: see Linear
            options["coordinate_descent_tuning"] = True
        if cuda:        # timing two ways to write a whole cache would clone it
            options["triton.autotune_pointwise"] = False
        compiled = torch.compile(step, fullgraph=True, dynamic=False, options=options, **isolate)
        return Replayed(compiled, self.device) if cuda else compiled

    @property
    def bits_per_element(self) -> float:
        """Bits of the cache for each number of K and V that it has room for, everything counted; a bf16 full cache has 16."""
        return bits_per_element(sum(self.cache.nbytes().values()), **self.shape)

    def interrupt(self) -> None:
        """Ask a running generate() to end after the current step: safe to call from a signal handler."""
        self._interrupted = True

    def end(self, index: int) -> None:
        """Between two Steps of generate(): prompt `index` has said enough, its row goes to the next. No Step reports it finished."""
        self._ended.add(index)

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams], *,
                 reuse: bool = False) -> Iterator[Step]:
        """Continue every prompt; yields Steps until all have finished. Everything is checked before any work is done.

        reuse (chat): prompt i goes to row i, and what the row already stores is kept where it is a prefix of the prompt.
        Raises ValueError for an empty prompt, one longer than the capacity, ids outside the vocabulary.
        """
        params = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        queue = deque(Request(i, list(p), s) for i, (p, s) in enumerate(zip(prompts, params, strict=True)))
        self._check(queue, reuse)
        if self._running is not None:
            self._running.close()       # a run left early gives its rows back now, not when it is collected
        self._running, self._interrupted, self._ended = self._run(queue, reuse), False, set()
        return self._running

    def _check(self, queue: Sequence[Request], reuse: bool) -> None:
        for r in queue:
            where = f"prompt {r.index}" if len(queue) > 1 else "the prompt"
            if not r.prompt:
                raise ValueError(f"{where} is empty (0 tokens); give at least one token")
            if len(r.prompt) > self.max_seq_len:
                raise ValueError(f"{where} has {len(r.prompt)} tokens, the capacity is {self.max_seq_len}; "
                                 "shorten it or raise --max-seq-len")
            bad = next((token for token in r.prompt if not 0 <= token < self.config.vocab_size), None)
            if bad is not None:
                raise ValueError(f"{where} has the id {bad}, the model's vocabulary is 0 to {self.config.vocab_size - 1}; "
                                 "does the tokenizer belong to this checkpoint?")
            if len(r.params.stop_ids) > MAX_STOP_IDS:
                raise ValueError(f"{len(r.params.stop_ids)} stop ids, at most {MAX_STOP_IDS} are supported; pass fewer")
        if reuse and len(queue) > self.max_batch_size:
            raise ValueError(f"{len(queue)} conversations, but max_batch_size is {self.max_batch_size}; raise it")

    @torch.inference_mode()
    def _run(self, queue: deque[Request], reuse: bool) -> Iterator[Step]:
        begin = time.perf_counter()
        self.step.alive.fill_(False)
        free, active = deque(range(self.max_batch_size)), {}
        method = max((r.params.method for r in queue), key=METHODS.index, default="greedy")
        ahead = None        # when the next step was begun, if before its turn
        try:
            while (queue or active) and not self._interrupted:
                t = ahead or time.perf_counter()
                # 1. free rows take waiting prompts; the others keep their state
                if queue and free:
                    phase, batch = "prefill", []
                    while queue and free and self._fits(batch, queue[0]):
                        batch.append(queue.popleft())
                        batch[-1].row = free.popleft()
                    fed = self._prefill(batch, method, reuse)
                    active.update((r.row, r) for r in batch)
                # 2. or every running row moves one token on
                else:
                    phase, batch, fed = "decode", list(active.values()), len(active)
                    if ahead is None:
                        self.decode_one_token(method)
                # 3. the host reads what came out and sorts out who is finished; where no prompt waits a GPU goes on meanwhile
                token, alive, length = torch.stack((self.step.token, self.step.alive.long(), self.step.input_pos)).tolist()
                ahead = None
                if self.device.type in AHEAD and any(alive) and not (queue or self._interrupted) and self._steps["decode" + method] > 1:
                    ahead = time.perf_counter()
                    self.decode_one_token(method)
                tokens, finished = [], []
                for r in batch:
                    stopped = token[r.row] in r.params.stop_ids
                    if not stopped:
                        r.tokens.append(token[r.row])
                        tokens.append((r.index, token[r.row]))
                    if not alive[r.row]:
                        full = len(r.tokens) < r.params.max_new_tokens
                        finished.append((r.index, "stop" if stopped else "capacity" if full else "length"))
                        self._release(active.pop(r.row), free, length[r.row])
                now, key = ahead or time.perf_counter(), phase + method
                # CUDA graphs: the first step compiles, the second one is captured
                warm = self._steps[key] >= (2 if phase == "decode" and self.compile and self.device.type == "cuda" else 1)
                self._steps[key] += 1
                yield Step(phase, tokens, finished, fed, now - t, now - begin, warm)
                for row in [row for row, r in active.items() if r.index in self._ended]:
                    self.step.alive[row] = False
                    self._release(active.pop(row), free)
            if active or queue:
                now = time.perf_counter()
                yield Step("decode", [], [(r.index, "interrupted") for r in [*active.values(), *queue]], 0, 0.0, now - begin, False)
        finally:
            for r in list(active.values()):
                self._release(r, free)

    def _release(self, r: Request, free: deque[int], length: int | None = None) -> None:
        """Free a row, and remember which ids its cache holds, `length` of them (None: asks the device): its newest token is not stored yet.
        Nothing is known of a row that holds more than was read: a step was begun ahead, and the last one not read to its end."""
        known, length = r.prompt + r.tokens, int(self.step.input_pos[r.row]) if length is None else length
        self.stored[r.row] = known[:length] if length <= len(known) else []
        free.append(r.row)

    def _fits(self, batch: list[Request], r: Request) -> bool:
        """One prefill takes prompts as long as they keep within the budget, and padding below half of it."""
        lengths = [len(x.prompt) for x in [*batch, r]]
        padded = len(lengths) * max(lengths)
        return not batch or padded <= self.prefill_budget and padded <= 2 * sum(lengths)

    def _prefill(self, batch: list[Request], method: str, reuse: bool) -> int:
        """Store the prompts of `batch` and lay down the state of their rows, first token included. Returns how many tokens were fed."""
        kept = []
        for r in batch:
            old = self.stored[r.row]
            keep = reuse and len(old) < len(r.prompt) and r.prompt[:len(old)] == old
            kept.append(len(old) if keep else 0)
            self.stored[r.row] = []
        tensor = lambda x: torch.tensor(x, device=self.device)              # noqa: E731
        fresh = [r.row for r, n in zip(batch, kept, strict=True) if not n]
        if fresh:
            self.cache.reset(tensor(fresh))
        new = [r.prompt[n:] for r, n in zip(batch, kept, strict=True)]
        rows, length, n_new = tensor([r.row for r in batch]), tensor(kept), tensor([len(p) for p in new])
        width = max(map(len, new))
        ids = tensor([p + [0] * (width - len(p)) for p in new])
        x = self.prefill(ids, length, n_new, rows, past=max(kept))
        seeds = [r.params.seed if r.params.seed is not None else secrets.randbits(63) for r in batch]
        self.step.set_rows(rows, [r.params for r in batch], seeds, [len(r.prompt) for r in batch],
                           [min(r.params.max_new_tokens - 1, self.max_seq_len - len(r.prompt)) for r in batch])
        self.step.first_token(rows, self.model.logits(x[torch.arange(len(batch), device=self.device), n_new - 1]), method)
        return sum(map(len, new))

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor, length: torch.Tensor, n_new: torch.Tensor, rows: torch.Tensor, *, past: int) -> torch.Tensor:
        """Store ids [B', P] (right padded, n_new [B'] valid) after `length` [B'] stored tokens -> hidden states [B', P, C].

        Group-major: all chunks pass a group's layers, which attend to exact K and V, then it commits; groups that interleave pass
        together. `past` bounds `length`.
        """
        P = ids.shape[1]
        chunk = min(self.prefill_chunk, max(PREFILL_MASK // P, 64))
        x = self.model.embed(ids)
        column = torch.arange(P, device=self.device)
        input_pos, valid = length[:, None] + column, column < n_new[:, None]
        for groups in self.cache.spans():
            exact = [GroupPrefill(group, P, past=past) for group in groups]
            handles = {layer: handle for e in exact for layer, handle in zip(e.group.layers, e.layers, strict=True)}
            layers = sorted(handles)
            for start in range(0, P, chunk):
                at = slice(start, start + chunk)
                pos = input_pos[:, at]
                caches = [handles[layer] for layer in layers]
                with fused_attention(self.device):
                    x[:, at] = self.model.run_layers(x[:, at], layers, caches, self.rope(pos), pos, valid[:, at], rows)
            for e in exact:
                e.commit(length, n_new, rows)
        return x
