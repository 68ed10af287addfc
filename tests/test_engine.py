"""The engine on a tiny random model: queueing, reuse, the ways a request ends. What it refuses: test_engine_refusals.py.

The yardstick is always the same request run alone, from nothing, in one prefill. fp32, greedy unless said otherwise.
"""
import functools
from collections.abc import Sequence

import pytest
import torch

import engine.engine
import weights
from engine import Engine, SamplingParams, Stats, Step
from model import ModelConfig, Transformer
from weights import random_model

V, S, LONG = 97, 64, 24
pytestmark = pytest.mark.usefixtures("ahead")
PROMPTS = [[5], list(range(10, 30)), [7, 7, 7], list(range(60, 71)), [96, 0], list(range(40)), [3, 1, 4, 1, 5]]


@pytest.fixture(params=[(), ("cpu",)], ids=["", "ahead"])
def ahead(request, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Every test twice: steps in turn, and begun ahead as on a GPU."""
    monkeypatch.setattr(engine.engine, "AHEAD", request.param)
    return request.param


@functools.cache
def model(window: int | None = None) -> Transformer:
    return random_model(ModelConfig("mistral", V, 48, 2, 4, 2, 12, 64, S, sliding_window=window, dtype=torch.float32))


def tiny(rows: int = 1, *, capacity: int = S, window: int | None = None, **options: int) -> Engine:
    return Engine(model(window), max_batch_size=rows, max_seq_len=capacity, **options)


def collect(steps: Sequence[Step], n: int) -> tuple[list[list[int]], dict[int, str]]:
    """Tokens by request, and how each ended; every request must end once and get nothing afterwards."""
    tokens, reasons = [[] for _ in range(n)], {}
    for step in steps:
        for i, token in step.tokens:
            assert i not in reasons, f"request {i} goes on after its end"
            tokens[i].append(token)
        for i, reason in step.finished:
            assert i not in reasons, f"request {i} ends twice"
            reasons[i] = reason
    assert len(reasons) == n, "a request got no finish reason"
    return tokens, reasons


def run(e: Engine, prompts: list[list[int]], params: SamplingParams | list[SamplingParams], *, reuse: bool = False):
    return collect(list(e.generate(prompts, params, reuse=reuse)), len(prompts))


def alone(prompt: list[int], params: SamplingParams, window: int | None = None) -> list[int]:
    return run(tiny(window=window), [prompt], params)[0][0]


def read(e: Engine, row: int, length: int) -> torch.Tensor:
    """What one row stores, [2 L, G, S, D]."""
    lengths = torch.zeros(e.max_batch_size, dtype=torch.int64)
    lengths[row] = length
    return torch.stack([x[row] for group in e.cache.groups for x in group.read(0, lengths)])


# ---- batches and the queue


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("rows, options", [(7, {}), (2, {}), (3, {"prefill_budget": 45, "prefill_chunk": 3})])
def test_batched_rows_equal_the_rows_alone(rows: int, options: dict, window: int | None) -> None:
    """Guards: positions or masks shared between rows, and a refilled row that sees its predecessor or disturbs a neighbour."""
    params = [SamplingParams(max_new_tokens=n) for n in (LONG, 3, 17, 1, 9, 20, 6)]
    tokens, reasons = run(tiny(rows, window=window, **options), PROMPTS, params)
    assert tokens == [alone(p, s, window) for p, s in zip(PROMPTS, params, strict=True)]
    assert set(reasons.values()) == {"length"}


def test_two_engines_share_a_model() -> None:
    """Guards: state that hangs on the model instead of the engine (--compare-full interleaves two)."""
    params = SamplingParams(max_new_tokens=9)
    steps = [tiny().generate([p], params) for p in PROMPTS[:2]]
    tokens = [collect(x, 1)[0] for x in zip(*zip(*steps, strict=True), strict=True)]
    assert [t[0] for t in tokens] == [alone(p, params) for p in PROMPTS[:2]]


# ---- a second turn


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("end", ["stop", "length", "interrupted", "closed"])
def test_second_turn_equals_a_fresh_prefill(end: str, window: int | None, ahead: tuple[str, ...]) -> None:
    """Guards: the newest token, which is not stored yet or by a step that nobody reads, lost or stored twice, however the reply ended."""
    reply = alone(PROMPTS[1], SamplingParams(max_new_tokens=8), window)
    e = tiny(2, window=window)
    params = SamplingParams(max_new_tokens=8, stop_ids=(reply[5],) if end == "stop" else ())
    got = []
    for step in e.generate([PROMPTS[1], PROMPTS[2]], params, reuse=True):
        got += [token for i, token in step.tokens if i == 0]
        if len(got) == 4 and end == "interrupted":
            e.interrupt()
        if len(got) == 4 and end == "closed":
            break
    assert got == reply[:{"stop": reply.index(reply[5]), "length": 8, "interrupted": 4, "closed": 4}[end]]
    unread = ahead and end in ("interrupted", "closed")
    stored = len(got) if end == "stop" or unread else len(got) - 1          # a stop id is drawn, but no reply's token
    turn, more = PROMPTS[1] + got + [50, 51, 52], SamplingParams(max_new_tokens=6)
    steps = list(e.generate([turn], more, reuse=True))
    assert steps[0].n_fed == len(got) - stored + 3, "history was prefilled again"
    assert collect(steps, 1)[0] == [alone(turn, more, window)]
    fresh = tiny(window=window)
    run(fresh, [turn], more)
    torch.testing.assert_close(read(e, 0, len(turn) + 5), read(fresh, 0, len(turn) + 5), rtol=0, atol=1e-5)


def test_changed_history_is_prefilled_anew() -> None:
    """Guards: a reply to a conversation that is no longer the one in the cache; an equal prompt has no token left to feed."""
    e, params = tiny(), SamplingParams(max_new_tokens=6)
    first = PROMPTS[1] + run(e, [PROMPTS[1]], params)[0][0]
    for turn in (first[:3] + [0] + first[4:] + [50], first[:10], first[:10] + [9], [9]):
        steps = list(e.generate([turn], params, reuse=True))
        assert steps[0].n_fed == len(turn) and collect(steps, 1)[0] == [alone(turn, params)]
    e = tiny()
    run(e, [PROMPTS[1]], SamplingParams(max_new_tokens=1))          # stores exactly the prompt
    assert run(e, [PROMPTS[1]], params, reuse=True)[0] == [alone(PROMPTS[1], params)]


def test_conversations_side_by_side() -> None:
    """Guards: rows with pasts of different length in one prefill; a conversation handed the row of another."""
    e, params, history = tiny(3), SamplingParams(max_new_tokens=4), [PROMPTS[1], PROMPTS[2], PROMPTS[4]]
    for turn in range(3):
        tokens, _ = run(e, history, params, reuse=True)
        assert tokens == [alone(p, params) for p in history]
        history = [p + t + [60 + turn] * (i + 1) for i, (p, t) in enumerate(zip(history, tokens, strict=True))]
    history[1] = [8]                                                # one starts over, the others go on
    steps = list(e.generate(history, params, reuse=True))
    fed = sum(step.n_fed for step in steps if step.phase == "prefill")
    assert fed == (1 + 1) + 1 + (1 + 3)                             # each: the token not stored yet and the new ones
    assert collect(steps, 3)[0] == [alone(p, params) for p in history]


# ---- how a request ends


def test_stop_ids_are_several_and_per_request() -> None:
    """Guards: only the first stop id checked; a neighbour's id stopping a row; the stop id shown as text; a list refused late."""
    full = [alone(p, SamplingParams(max_new_tokens=LONG)) for p in PROMPTS[:4]]
    stops = [(91, full[0][6]), (), tuple(range(70, 85)) + (full[2][0],), [full[3][2], full[3][1]]]
    tokens, reasons = run(tiny(4), PROMPTS[:4], [SamplingParams(max_new_tokens=LONG, stop_ids=s) for s in stops])
    ends = [min((full[i].index(s) for s in stops[i] if s in full[i]), default=LONG) for i in range(4)]
    assert 0 in ends and tokens == [f[:end] for f, end in zip(full, ends, strict=True)]
    assert reasons == {0: "stop", 1: "length", 2: "stop", 3: "stop"}


def test_stop_id_as_the_last_wanted_token() -> None:
    """Guards: a stop id that arrives with the last wanted token counted as `length`, and shown."""
    full = alone(PROMPTS[0], SamplingParams(max_new_tokens=4))
    assert run(tiny(), [PROMPTS[0]], SamplingParams(max_new_tokens=4, stop_ids=(full[3],))) == ([full[:3]], {0: "stop"})


def test_a_row_that_ended_stores_and_counts_nothing() -> None:
    """Guards: decode of a finished row overwriting its columns, moving its position or inflating tokens per second."""
    e, snapshot = tiny(3), None
    for step in e.generate(PROMPTS[:2], [SamplingParams(max_new_tokens=n) for n in (3, 12)]):
        if snapshot is not None:
            assert step.n_fed == 1 and [i for i, _ in step.tokens] == [1]
        elif (0, "length") in step.finished:
            snapshot = [buffer[0].clone() for buffer in e.cache.buffers()], int(e.step.input_pos[0])
    assert snapshot and snapshot[1] == e.step.input_pos[0] == 3
    assert all(torch.equal(before, now[0]) for before, now in zip(snapshot[0], e.cache.buffers(), strict=True))
    assert all(not buffer[2].any() for buffer in e.cache.buffers()), "a row never given out was written"


@pytest.mark.parametrize("length", [32, 31, 24, 20])
def test_capacity_is_used_up_to_its_last_column(length: int) -> None:
    """Guards: off by one at S, and a full row that wraps around into its own column 0 while a neighbour goes on."""
    prompt, e = list(range(length)), tiny(2, capacity=32)
    params = [SamplingParams(max_new_tokens=60), SamplingParams(max_new_tokens=25)]
    expected = [alone(prompt, SamplingParams(max_new_tokens=33 - length)), alone([5], params[1])]
    assert run(e, [prompt, [5]], params) == (expected, {0: "capacity", 1: "length"})
    assert all(buffer[0].any(-1).all() for buffer in e.cache.buffers()), "a column stayed empty"
    wide = tiny()
    run(wide, [prompt], SamplingParams(max_new_tokens=33 - length))
    torch.testing.assert_close(read(e, 0, 32), read(wide, 0, 32)[:, :, :32], rtol=0, atol=1e-5)
    exact = SamplingParams(max_new_tokens=33 - length)
    assert run(tiny(capacity=32), [prompt], exact)[1] == {0: "length"}


@pytest.mark.parametrize("budget", [1, 3])
def test_interrupt_ends_every_request(budget: int) -> None:
    """Guards: a waiting prompt that never gets a finish reason, also when nothing is running at that moment."""
    e = tiny()
    steps = []
    for step in e.generate(PROMPTS[:3], SamplingParams(max_new_tokens=budget)):
        steps.append(step)
        e.interrupt()
    first = "length" if budget == 1 else "interrupted"
    assert collect(steps, 3)[1] == {0: first, 1: "interrupted", 2: "interrupted"}
    assert run(e, PROMPTS[:1], SamplingParams(max_new_tokens=3))[1] == {0: "length"}, "the flag outlived its run"


def test_an_interrupted_run_has_a_decode_rate() -> None:
    """Guards: the closing step, which decodes nothing, counted as the only warm one: 0 tokens/s."""
    e, stats = tiny(), Stats()
    for step in e.generate([[5]], SamplingParams(max_new_tokens=9)):
        stats.add(step)
        if len(stats.steps) == 2:
            e.interrupt()
    assert stats.decode_tokens_per_s > 1 and stats.median_step_s > 0


def test_a_run_left_early_leaves_the_engine_usable() -> None:
    """Guards: rows that stay taken after `break`; a run closed late that rewrites what the rows are believed to hold."""
    e, params = tiny(2), SamplingParams(max_new_tokens=5)
    for _ in e.generate(PROMPTS, params):
        break
    left = e.generate(PROMPTS[:2], params)
    next(left)
    tokens, _ = run(e, PROMPTS[2:4], params)
    assert tokens == [alone(p, params) for p in PROMPTS[2:4]]
    believed = [list(ids) for ids in e.stored]
    left.close()
    assert e.stored == believed
    turn = PROMPTS[0] + [1, 2]
    assert run(e, [turn], params, reuse=True)[0] == [alone(turn, params)]


def test_a_row_is_forgotten_whose_step_ahead_was_begun_but_its_last_one_not_read(ahead: tuple[str, ...]) -> None:
    """Guards: a row believed to hold a token less than it does, after a second Ctrl-C: its next turn would begin one column early."""
    e, steps, params = tiny(), [], SamplingParams(max_new_tokens=9)
    step = e.decode_one_token

    def fail_after_four(method: str) -> None:
        step(method)
        steps.append(method)
        if len(steps) == 4:
            raise KeyboardInterrupt

    e.decode_one_token = fail_after_four
    with pytest.raises(KeyboardInterrupt):
        list(e.generate(PROMPTS[1:2], params))
    e.decode_one_token, turn = step, PROMPTS[1] + [50, 51]
    assert e.stored == [[]] or not ahead
    assert run(e, [turn], params, reuse=True)[0] == [alone(turn, params)]


def test_embedded_checkpoint_from_pretrained() -> None:
    """Guards: dtype and sizes lost on the way from a directory; a real model in a batch against alone."""
    e = Engine.from_pretrained(weights.EMBEDDED, dtype=torch.float32, max_batch_size=2, max_seq_len=32)
    assert e.dtype == torch.float32 and e.device.type == "cpu" and not e.compile
    params = SamplingParams(max_new_tokens=8)
    tokens, _ = run(e, [[1, 300, 301], [1]], params)
    one = Engine(e.model, max_seq_len=32)
    assert tokens == [run(one, [p], params)[0][0] for p in ([1, 300, 301], [1])]


def test_a_prompt_of_many_chunks_runs_on_the_kernels_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a choice of SDPA kernels that holds for the first chunk alone, and logits that depend on it."""
    choose, prompt = engine.engine.fused_attention, [PROMPTS[0] * 3]
    want = run(tiny(1, prefill_chunk=4), prompt, SamplingParams(max_new_tokens=4))
    monkeypatch.setattr(engine.engine, "fused_attention", lambda device: choose(torch.device("cuda")))
    assert run(tiny(1, prefill_chunk=4), prompt, SamplingParams(max_new_tokens=4)) == want
