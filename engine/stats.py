"""What a run did and how long it took, measured where the work is: prefill and decode apart, the compiling step not counted."""
import itertools
import resource
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from engine.engine import Engine


@dataclass(frozen=True)
class Step:
    """One thing the engine did. `tokens`: (request, new id) pairs; `finished`: (request, reason) pairs, a reason being
    "stop" (a stop id, itself not among the tokens), "length", "capacity" or "interrupted"; `n_fed`: tokens the model read."""

    phase: str                                  # "prefill" | "decode"
    tokens: list[tuple[int, int]]
    finished: list[tuple[int, str]]
    n_fed: int
    seconds: float                              # from its start until its tokens are sorted out, or until a next step begun before that;
                                                # of one begun so, what the caller did meanwhile is in it
    since_start: float                          # since generate() was entered
    warm: bool                                  # False: this step compiled, or was the first of its kind


@dataclass
class Stats:
    """Sums over the steps of one generate(). Rates leave out steps that compiled, unless there is nothing else."""

    steps: list[Step] = field(default_factory=list)

    def add(self, step: Step) -> None:
        self.steps.append(step)

    def _timed(self, phase: str) -> list[Step]:
        steps = [s for s in self.steps if s.phase == phase]
        return [s for s in steps if s.warm] or steps

    @property
    def ttft_s(self) -> float:
        """Seconds until the first token of the first prefill."""
        return self.steps[0].since_start if self.steps else 0.0

    @property
    def ttft_last_row_s(self) -> float:
        """Seconds until every row had its first token: the end of the last prefill before the first decode step."""
        before = itertools.takewhile(lambda step: step.phase == "prefill", self.steps)
        return max((step.since_start for step in before), default=0.0)

    @property
    def prefill_tokens_per_s(self) -> float:
        steps = self._timed("prefill")
        return sum(s.n_fed for s in steps) / max(sum(s.seconds for s in steps), 1e-9)

    @property
    def decode_tokens_per_s(self) -> float:
        steps = self._timed("decode")
        return sum(len(s.tokens) for s in steps) / max(sum(s.seconds for s in steps), 1e-9)

    @property
    def median_step_s(self) -> float:
        steps = self._timed("decode")
        return statistics.median(s.seconds for s in steps) if steps else 0.0


def figures(engine: "Engine", stats: Stats) -> dict[str, float | int | str | bool | dict[str, int]]:
    """What one run was and did, units in the keys: the run-wide part of every report."""
    cache, by_kind = engine.cache, engine.cache.nbytes()
    return {"ttft_s": stats.ttft_s, "prefill_tokens_per_s": stats.prefill_tokens_per_s, "decode_tokens_per_s": stats.decode_tokens_per_s,
            "kv_bytes": sum(by_kind.values()), "kv_bytes_by_kind": by_kind, "bits_per_element": engine.bits_per_element,
            "ratio_to_full": 16 / engine.bits_per_element, **cache.report(), "peak_bytes": peak_bytes(engine.device),
            "cache": str(engine.cache_config), "attend_form": cache.groups[-1].form, "compile": engine.compile,
            "device": str(engine.device),
            "dtype": str(engine.dtype).removeprefix("torch.")}


def resident_bytes(device: torch.device) -> int:
    """What is held now: CUDA: bytes of tensors; CPU: the resident set (off Linux its largest so far)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else peak_bytes(device)


def peak_bytes(device: torch.device) -> int:
    """CUDA: most bytes ever allocated by tensors; what a replayed graph needs is reserved, not allocated. CPU: the largest resident set of
    this process so far; it never falls."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
