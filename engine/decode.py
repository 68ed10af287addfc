"""One decode step for every row at once: the only code that is compiled, one graph, no host sync.

All that a step needs or changes is a buffer here or in the cache, at a fixed address, so that the compiled step replays as a CUDA graph.
A row that is done stores nothing more and repeats its token.
"""
from collections.abc import Callable

import torch
import torch.nn as nn

from engine.sampling import SamplingParams, sample

MAX_STOP_IDS = 16


class DecodeStep(nn.Module):
    """State of B rows and the step on it. token [B] is the newest id, not stored yet; input_pos [B] where it will be stored."""

    def __init__(self, model: nn.Module, cache: nn.Module, rope: nn.Module, batch: int, device: torch.device | str) -> None:
        super().__init__()
        self.model, self.cache, self.rope = model, cache, rope
        state = {"token": torch.int64, "input_pos": torch.int64, "alive": torch.bool, "left": torch.int64,       # left: tokens still wanted
                 "temperature": torch.float32, "top_k": torch.int64, "top_p": torch.float32, "seed": torch.int64}
        for name, dtype in state.items():
            self.register_buffer(name, torch.zeros(batch, dtype=dtype, device=device), persistent=False)
        self.register_buffer("stop_ids", torch.full((batch, MAX_STOP_IDS), -1, device=device), persistent=False)

    def forward(self, method: str) -> None:
        """Feed `token` at `input_pos`, store it, sample the next one into `token`."""
        token = self.draw(self.logits(self.token, self.input_pos, self.alive), method, slice(None), self.input_pos + 1)
        self.token.copy_(torch.where(self.alive, token, self.token))
        self.input_pos.add_(self.alive.long())
        self.left.sub_(self.alive.long())
        self.alive.logical_and_(~self.finished(slice(None)))

    def logits(self, token: torch.Tensor, input_pos: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
        """Feed one token per row, all [B] -> logits [B, V] fp32 for the next; rows not alive store nothing."""
        position = input_pos[:, None]
        x = self.model.run_layers(self.model.embed(token[:, None]), range(len(self.model.layers)), self.cache.layers,
                                  self.rope(position), position, alive[:, None])
        return self.model.logits(x[:, -1])

    def first_token(self, rows: torch.Tensor, logits: torch.Tensor, method: str) -> None:
        """After a prefill: sample from logits [B', V] for `rows` [B'], whose state `set_rows` has laid down."""
        self.token[rows] = self.draw(logits, method, rows, self.input_pos[rows])
        self.alive[rows] = ~self.finished(rows)

    def draw(self, logits: torch.Tensor, method: str, rows: torch.Tensor | slice, position: torch.Tensor) -> torch.Tensor:
        return sample(logits, method, self.temperature[rows], self.top_k[rows], self.top_p[rows], self.seed[rows], position)

    def finished(self, rows: torch.Tensor | slice) -> torch.Tensor:
        return (self.token[rows][:, None] == self.stop_ids[rows]).any(-1) | (self.left[rows] <= 0)

    def set_rows(self, rows: torch.Tensor, params: list[SamplingParams], seed: list[int], input_pos: list[int], left: list[int]) -> None:
        """Give slots `rows` [B'] to requests whose prompts are stored: `input_pos` tokens, `left` more wanted. Host side, between steps."""
        values = {"input_pos": input_pos, "left": left, "alive": [True] * len(params), "temperature": [p.temperature for p in params],
                  "top_k": [min(p.top_k, self.model.config.vocab_size) for p in params], "top_p": [p.top_p for p in params], "seed": seed,
                  "stop_ids": [[*p.stop_ids, *[-1] * (MAX_STOP_IDS - len(p.stop_ids))] for p in params]}
        for name, value in values.items():
            state = getattr(self, name)
            state[rows] = torch.tensor(value, dtype=state.dtype, device=state.device)


class Replayed:
    """A step on CUDA as a CUDA graph for each method: the first call runs the step, the second captures it, every later one only replays.

    It can because the step takes nothing and returns nothing; so the host checks no guards and hands over no pointers.
    Trap: without a stream of the model's device the current device is captured, where nothing is launched.
    """

    def __init__(self, step: Callable[[str], None], device: torch.device) -> None:
        self.step, self.graphs, self.stream = step, {}, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()          # graphs run one at a time: they share scratch

    def __call__(self, method: str) -> None:
        if method not in self.graphs:
            torch.cuda.empty_cache()        # what a prefill left cached is free for what compiling tries
            self.step(method)
            self.graphs[method] = None
            return
        if self.graphs[method] is None:
            graph = torch.cuda.CUDAGraph()          # another thread's calls are its own affair
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                self.step(method)
            self.graphs[method] = graph
        self.graphs[method].replay()
