"""Requests of an evaluation answered in token ids: how likely a continuation is after a context, and what is generated after a prompt.

Contract: requests of any length in, answers in their order out; what does not fit loses its beginning and is counted.
Trap: in one plain pass over context and continuation attention is exact, and every cache would score the same. Here a context is stored,
all but its last token; that one and the continuation are then fed one by one, as in decoding. So the first token, too, is predicted from
what is stored, and with it answers of one token. Generation is that of generate.py: its first token comes from the exact prompt.
"""
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from torch.nn.utils.rnn import pad_sequence

from engine.compare import forced_logits
from engine.engine import Engine
from engine.sampling import SamplingParams
from tokenizer import Tokenizer


class Answers:
    """An engine that answers requests, and how many there were, how many were too long, how many answers met the capacity's end."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, stop_ids: Sequence[int], *,
                 progress: Callable[[str], None] = lambda text: None) -> None:
        self.engine, self.tokenizer, self.stop_ids, self.progress = engine, tokenizer, tuple(stop_ids), progress
        self.prefix = [next(id for id in (tokenizer.bos_id, tokenizer.eos_id, 0) if id is not None)]     # stands for an empty context
        self.requests = self.shortened = self.full = 0

    def loglikelihoods(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """(context, continuation) ids -> the continuation's log-likelihood in nats, and whether it is what greedy decoding would say."""
        capacity, batch = self.engine.max_seq_len, self.engine.max_batch_size
        pairs = [(list(context) or self.prefix, list(continuation)) for context, continuation in pairs]
        self.requests += len(pairs)
        self.shortened += sum(len(context) + len(continuation) - 1 > capacity for context, continuation in pairs)
        parts = [(i, *part) for i, pair in enumerate(pairs) for part in fitting(*pair, capacity)]
        parts.sort(key=lambda part: (-len(part[2]), -len(part[1])))         # rows of a batch end together
        scores = [(0.0, True)] * len(pairs)
        for first in range(0, len(parts), batch):
            at, contexts, continuations = zip(*parts[first:first + batch], strict=True)
            for i, (nats, greedy) in zip(at, self._score(contexts, continuations), strict=True):
                scores[i] = scores[i][0] + nats, scores[i][1] and greedy
            self._say(first, min(first + batch, len(parts)), len(parts), "continuations scored")
        return scores

    def _say(self, before: int, done: int, total: int, what: str) -> None:
        if done * 10 // total > before * 10 // total:
            self.progress(f"{done} of {total} {what}")

    @torch.inference_mode()
    def _score(self, contexts: Sequence[list[int]], continuations: Sequence[list[int]]) -> Iterator[tuple[float, bool]]:
        n = torch.tensor([len(x) for x in continuations], device=self.engine.device)
        wanted = pad_sequence([torch.tensor(x, device=self.engine.device) for x in continuations])
        total, greedy = torch.zeros(len(n), dtype=torch.float64, device=n.device), n > 0
        steps = forced_logits(self.engine, [x[:-1] for x in contexts], [x[-1:] + y for x, y in zip(contexts, continuations, strict=True)])
        for i, (logits, want) in enumerate(zip(islice(steps, 1, None), wanted, strict=True)):       # the first: of the exact prompt
            log_p, alive = logits[:len(n)].log_softmax(-1), i < n
            total += torch.where(alive, log_p.gather(1, want[:, None])[:, 0].double(), 0)
            greedy &= ~alive | (log_p.argmax(-1) == want)
        return zip(total.tolist(), greedy.tolist(), strict=True)

    def generate(self, requests: Sequence[tuple[Sequence[int], Sequence[str], SamplingParams]]) -> list[str]:
        """(prompt ids, stop strings, params) -> the new text before the first stop string. A prompt keeps its end and at least half the
        capacity; a row whose stop string has come goes to the next prompt."""
        capacity, total = self.engine.max_seq_len, len(requests)
        room = [max(capacity - params.max_new_tokens, capacity // 2, 1) for _, _, params in requests]
        prompts = [list(ids)[-n:] or self.prefix for (ids, _, _), n in zip(requests, room, strict=True)]
        self.requests += total
        self.shortened += sum(len(ids) > n for (ids, _, _), n in zip(requests, room, strict=True))
        stops = [[text for text in until if text] for _, until, _ in requests]
        texts, streams, running = [""] * total, [self.tokenizer.stream() for _ in requests], set(range(total))
        for step in self.engine.generate(prompts, [params for _, _, params in requests]):
            before = len(running)
            for i, token in step.tokens:
                texts[i] += streams[i].put(token)
                if any(stop in texts[i] for stop in stops[i]):
                    self.engine.end(i)
                    running.discard(i)
            for i, reason in step.finished:
                self.full += reason == "capacity"
                running.discard(i)
            self._say(total - before, total - len(running), total, "answers generated")
        texts = [text + stream.flush() for text, stream in zip(texts, streams, strict=True)]
        ends = [min((text.find(stop) for stop in until if stop in text), default=None) for text, until in zip(texts, stops, strict=True)]
        return [text[:end] for text, end in zip(texts, ends, strict=True)]


def fitting(context: list[int], continuation: list[int], capacity: int) -> Iterator[tuple[list[int], list[int]]]:
    """Cut into pairs that store at most `capacity` tokens and score every token of the continuation once, each after as many of those
    before it as fit: one pair with the context's end, unless the continuation itself is longer."""
    ids = context + continuation
    for start in range(len(context), len(ids), capacity):
        end = min(start + capacity, len(ids))
        yield ids[max(end - 1 - capacity, 0):start], ids[start:end]
