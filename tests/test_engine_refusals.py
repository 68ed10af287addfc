"""What the engine refuses, with value and limit, before it works: prompts, requests, sizes, a cache larger than memory."""
import pytest
from test_engine import S, V, model, run, tiny

import engine.engine
from engine import Engine, SamplingParams
from model import ModelConfig
from weights import EMBEDDED


@pytest.mark.parametrize("prompts, message", [
    ([[]], "the prompt is empty .*at least one token"), ([[5], []], "prompt 1 is empty"),
    ([list(range(33))], "33 tokens, the capacity is 32; .*--max-seq-len"),
    ([[5, V]], f"the id {V}, .*{V - 1}"), ([[-1, 5]], "the id -1")])
def test_bad_prompts_are_refused_before_any_work(prompts: list[list[int]], message: str) -> None:
    """Guards: an index error from inside the model, after other prompts have cost time; a message with the wrong value."""
    e = tiny(2, capacity=32)
    with pytest.raises(ValueError, match=message) as caught:
        e.generate(prompts, SamplingParams())       # itself, not its first step
    assert "\n" not in str(caught.value)


def test_bad_requests_are_refused_before_any_work() -> None:
    """Guards: stop ids that are dropped silently, params that pair with no prompt, a conversation without a row."""
    e = tiny(2)
    with pytest.raises(ValueError, match="17 stop ids, at most 16"):
        e.generate([[5]], SamplingParams(stop_ids=tuple(range(17))))
    with pytest.raises(ValueError):
        e.generate([[5], [6]], [SamplingParams()])
    with pytest.raises(ValueError, match="3 conversations, but max_batch_size is 2"):
        e.generate([[5], [6], [7]], SamplingParams(), reuse=True)
    assert list(e.generate([], SamplingParams())) == []
    many = SamplingParams(max_new_tokens=2, top_k=2 ** 70, temperature=1.0)
    assert run(e, [[5]], many)[1] == {0: "length"}, "a top_k above any vocabulary keeps everything"


@pytest.mark.parametrize("sizes, message", [
    ({"max_batch_size": 0}, "max_batch_size is 0"), ({"max_seq_len": 0}, "max_seq_len is 0"), ({"max_seq_len": -5}, "max_seq_len is -5"),
    ({"prefill_chunk": 0}, "prefill_chunk is 0"), ({"max_seq_len": S + 1}, f"{S + 1}, the model has {S} positions")])
def test_sizes_that_make_no_sense(sizes: dict[str, int], message: str) -> None:
    """Guards: an empty tensor or an index error from deep inside instead of one line."""
    with pytest.raises(ValueError, match=message) as caught:
        Engine(model(), **{"max_batch_size": 1, "max_seq_len": 8} | sizes)
    assert "\n" not in str(caught.value)


def test_a_cache_larger_than_memory_is_refused_with_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: bytes forecast otherwise than allocated; the boundary itself must pass."""
    need = 2 * 2 * 3 * 2 * S * 12 * 4
    monkeypatch.setattr(engine.engine, "available_bytes", lambda device: need)
    tiny(3)
    monkeypatch.setattr(engine.engine, "available_bytes", lambda device: need - 1)
    with pytest.raises(ValueError, match=f"3 rows x {S} tokens takes {need:,} bytes, {need - 1:,} are free on cpu; 2 rows would fit"):
        tiny(3)
    for rows in (10 ** 6, 10 ** 12, 10 ** 18):      # the last: a product beyond 64 bits
        with pytest.raises(ValueError, match=f"{rows} rows x {S} tokens takes [0-9,]* bytes, .*; 2 rows would fit"):
            tiny(rows)


def test_nonsense_sizes_are_refused_before_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: minutes of loading before a typing error in --max-seq-len is told."""
    monkeypatch.setattr(engine.engine, "load_model", lambda *a, **b: pytest.fail("the weights were read first"))
    n = ModelConfig.from_checkpoint(EMBEDDED).max_position_embeddings
    with pytest.raises(ValueError, match=f"max_seq_len is {n + 1}, the model has {n} positions"):
        Engine.from_pretrained(EMBEDDED, max_seq_len=n + 1)
