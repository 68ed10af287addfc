"""bench.py tasks: what is scored against what, where answers stop, what is cut; and the real harness end to end where it is installed."""
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import bench
from engine import Engine, SamplingParams
from engine.compare import compare
from engine.measure import tasks
from engine.measure.answers import Answers, fitting
from engine.measure.rivals import parse_cache
from model import Rope
from tokenizer import load_tokenizer, stop_ids
from weights import EMBEDDED, load_model

ROOT = Path(__file__).resolve().parents[1]
TEXTS = [("Once upon a time there was a little", " girl named Lily who liked to play"), ("The dog ran to the big", " tree"),
         ("One day Tom and his friend saw a red bird on the fence near the old house and they", " were very happy"), ("", "The cat")]
CACHES = ["full", "quant,bits=2,window=0,sinks=0", "minicache,bits=4", "kivi,bits=2,group=8,residual=8"]


@pytest.fixture(scope="module")
def model():
    return load_model(EMBEDDED, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(EMBEDDED)


@pytest.fixture(scope="module")
def pairs(tokenizer) -> list[tuple[list[int], list[int]]]:
    return [(tokenizer.encode(a), tokenizer.encode(a + b)[len(tokenizer.encode(a)):]) for a, b in TEXTS]


def make(model, tokenizer, spec: str = "full", *, batch: int = 1, capacity: int = 64) -> Answers:
    engine = Engine(model, max_batch_size=batch, max_seq_len=capacity, cache=parse_cache(spec), compile=False)
    return Answers(engine, tokenizer, stop_ids(EMBEDDED, tokenizer))


def plain_pass(model, context: list[int], continuation: list[int]) -> float:
    """The same log-likelihood from one pass over all tokens, without anything of the engine."""
    ids = torch.tensor([context + continuation])
    pos, c = torch.arange(ids.shape[1])[None], model.config
    cache = parse_cache("full").build(n_layer=c.n_layer, n_kv_head=c.n_kv_head, head_dim=c.head_dim, batch=1, max_seq_len=ids.shape[1],
                                      dtype=torch.float32, device="cpu")
    with torch.inference_mode():
        log_p = model(ids, pos, pos >= 0, cache, Rope(c, ids.shape[1])).log_softmax(-1)
    return log_p[0, len(context) - 1:-1].gather(1, ids[0, len(context):, None]).sum().item()


@pytest.mark.parametrize("spec", CACHES)
def test_scores_are_those_of_compare_batched_and_alone(spec: str, model, tokenizer, pairs) -> None:
    """Guards each token's place: the continuation's alone counts, each row's own, whatever stands beside it, an empty context included."""
    together, alone = make(model, tokenizer, spec, batch=3), make(model, tokenizer, spec)
    scores = together.loglikelihoods(pairs)
    full = make(model, tokenizer).engine
    for pair, score in zip(pairs, scores, strict=True):
        assert alone.loglikelihoods([pair])[0] == (pytest.approx(score[0], abs=1e-4), score[1])
        context, continuation = pair
        if len(context) > 1:        # `compare` also counts the context's last token, the first target: taken off again
            nll = [len(t) * compare(full, alone.engine, [context[:-1]], [t])["nll"] for t in (context[-1:] + continuation, context[-1:])]
            assert score[0] == pytest.approx(nll[1] - nll[0], abs=1e-3)
    assert together.requests == 4 and not together.shortened


def test_full_cache_scores_a_plain_pass_and_a_lossy_one_does_not(model, tokenizer, pairs) -> None:
    """Guards the point of the subject: a score that attends to exact K and V would be the same for every cache, one token or many."""
    want = [plain_pass(model, *pair) for pair in pairs]
    full, lossy = ([nats for nats, _ in make(model, tokenizer, spec, batch=4).loglikelihoods(pairs)] for spec in CACHES[:2])
    assert full == pytest.approx(want, abs=1e-3)
    assert len(pairs[1][1]) == 1 and all(abs(a - b) > 1e-3 for a, b in zip(full[:3], lossy[:3], strict=True))


def test_greedy_is_said_of_what_generate_says(model, tokenizer, pairs) -> None:
    """Guards the second half of a score: it holds for the greedy continuation and for no other, last token and first token alike."""
    answers, context = make(model, tokenizer), pairs[0][0]
    new = [token for step in answers.engine.generate([context], SamplingParams(max_new_tokens=4)) for _, token in step.tokens]
    wrong_end, wrong_start = new[:3] + [new[3] ^ 1], [new[0] ^ 1, *new[1:]]
    assert [greedy for _, greedy in answers.loglikelihoods([(context, x) for x in (new, wrong_end, wrong_start)])] == [True, False, False]


def test_what_is_too_long_is_cut_into_what_fits() -> None:
    """Guards the harness's rule (its own example first): each token once, each row within the capacity, a context's end kept."""
    assert list(fitting([-1], [*range(10)], 4)) == [([-1], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]
    assert list(fitting([*range(10)], [10, 11], 20)) == [([*range(10)], [10, 11])]
    assert list(fitting([*range(10)], [10, 11], 4)) == [([7, 8, 9], [10, 11])]
    assert list(fitting([0], [], 4)) == []
    for n_context in range(1, 9):
        for n in range(1, 14):
            for capacity in range(1, 9):
                parts = list(fitting([*range(n_context)], [*range(n_context, n_context + n)], capacity))
                assert sum((y for _, y in parts), []) == [*range(n_context, n_context + n)]
                assert all(x and y[0] == x[-1] + 1 and len(x + y) - 1 <= capacity for x, y in parts)


def test_requests_longer_than_the_capacity_are_answered_and_counted(model, tokenizer, pairs) -> None:
    """Guards against a crash in the thousandth question: a long context keeps its end, a long text is scored in pieces, both count."""
    answers, (context, continuation) = make(model, tokenizer, batch=2, capacity=8), pairs[2]
    long, short = answers.loglikelihoods([(context, continuation), (context[-2:], continuation[:2])])
    assert long[0] == pytest.approx(plain_pass(model, context[-(9 - len(continuation)):], continuation), abs=1e-3)
    assert short[0] == pytest.approx(plain_pass(model, context[-2:], continuation[:2]), abs=1e-3) and answers.shortened == 1
    rolled, = answers.loglikelihoods([([], context[1:])])
    assert rolled[0] == pytest.approx(sum(plain_pass(model, *part) for part in fitting(context[:1], context[1:], 8)), abs=1e-3)
    params = SamplingParams(max_new_tokens=3)
    assert answers.generate([(context, [], params)]) == answers.generate([(context[-5:], [], params)]) != [""]
    assert answers.shortened == 3 and answers.requests == 5 and not answers.full
    assert len(answers.generate([(context, [], SamplingParams(max_new_tokens=100))])) == 1 and answers.full == 1


def test_answers_end_before_their_stop_string(model, tokenizer, pairs) -> None:
    """Guards the cut, at the first of several strings and across tokens, and the work saved: a row whose stop came is given away."""
    params, prompts = SamplingParams(max_new_tokens=40), [context for context, _ in pairs[:3]]
    free = make(model, tokenizer).generate([(prompt, [], params) for prompt in prompts])
    assert all(len(text) > 60 for text in free)
    stops = [[free[0][20:26], free[0][10:17]], ["", "never said"], [free[2][:3]]]
    want = [free[0][:10], free[1], ""]
    assert all(free[0].find(stop) == at for stop, at in zip(stops[0], (20, 10), strict=True))
    for batch in (1, 2, 3):
        answers, fed = make(model, tokenizer, batch=batch), []
        generate = answers.engine.generate
        answers.engine.generate = lambda *args, generate=generate, fed=fed: (fed.append(step.n_fed) or step for step in generate(*args))
        assert answers.generate([(prompt, stop, params) for prompt, stop in zip(prompts, stops, strict=True)]) == want
        assert sum(fed) - sum(map(len, prompts)) < 39 + 20


def test_an_ended_request_leaves_the_others_alone(model, tokenizer, pairs) -> None:
    """Guards Engine.end: the others' ids are those of a run without it, the freed row serves the next prompt, an old end is forgotten."""
    engine, params = make(model, tokenizer, batch=2).engine, SamplingParams(max_new_tokens=12)
    prompts = [context for context, _ in pairs[:3]]

    def run(end: int | None) -> dict[int, list[int]]:
        ids: dict[int, list[int]] = {0: [], 1: [], 2: []}
        for step in engine.generate(prompts, params):
            for i, token in step.tokens:
                ids[i].append(token)
                if i == end and len(ids[i]) == 3:
                    engine.end(i)
        return ids
    whole, ended, again = run(None), run(0), run(None)
    assert ended == whole | {0: whole[0][:3]} and again == whole and all(len(ids) == 12 for ids in whole.values())


def test_a_group_that_sums_up_its_tasks_stands_for_them() -> None:
    """Guards the table's columns: filters apart, no standard error where there is none, 21 tasks of longbench as one figure."""
    results = {"results": {"bench": {"alias": "bench", "score,none": .5, "score_stderr,none": "N/A"},
                           "bench_a": {"alias": " - a", "score,none": .25, "score_stderr,none": .1},
                           "list": {"alias": "list"}, "list_a": {"acc,none": 1, "acc_stderr,none": .2, "sample_len": 4},
                           "gsm": {"exact_match,strict": 0.0, "exact_match_stderr,strict": 0.0, "exact_match,flexible": .75}},
               "group_subtasks": {"bench": ["bench_a"], "list": ["list_a"]}}
    assert tasks.metrics(results) == {"bench score": (.5, None), "list_a acc": (1, .2), "gsm exact_match strict": (0.0, 0.0),
                                      "gsm exact_match flexible": (.75, None)}


@pytest.mark.parametrize(("args", "message"), [
    ([], 'needs lm-evaluation-harness'), (["--limit", "0"], "--limit is 0; give at least 1"), (["--cache", "kivy"], "cache kind 'kivy'"),
    (["--num-fewshot", "-1"], "--num-fewshot is -1; give at least 0"), (["--batch-size", "0"], "max_batch_size is 0"),
    (["--max-seq-len", "9000"], "max_seq_len is 9000, "), (["--out", "absent/x.json"], "--out absent/x.json cannot be written")])
def test_a_mistake_is_one_line_before_any_work(args: list[str], message: str, capsys: pytest.CaptureFixture[str],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a traceback where the harness is not installed, and against weights that are loaded for nothing."""
    monkeypatch.setattr(tasks, "load_model", lambda *args, **settings: pytest.fail("loaded"))
    monkeypatch.setitem(sys.modules, "lm_eval", None)       # import raises, installed or not
    assert bench.main(["tasks", "--tasks", "gsm8k", *args]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch):
    """lm_eval where it is installed, at the place that the task files of tests/data name, and without a hub."""
    lm_eval = pytest.importorskip("lm_eval", reason='the extra `eval` (pip install -e ".[eval]") is not installed')
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return lm_eval


def test_harness_end_to_end(harness, model, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the whole path with the real harness: its metrics are those that our scores and answers give, a lossy cache's differ."""
    said: list[list[str]] = []
    generate = Answers.generate
    monkeypatch.setattr(Answers, "generate", lambda self, requests: said.append(generate(self, requests)) or said[-1])
    out, specs = tmp_path / "t.json", CACHES[:2]
    assert bench.main(["tasks", "--tasks", "gsm8k_20_choice,gsm8k_20_generate", "--include-path", "tests/data", "--limit", "6",
                       "--max-seq-len", "256", "--batch-size", "4", "--cache", *specs, "--out", str(out)]) == 0
    captured, data = capsys.readouterr(), json.loads(out.read_text())
    assert [row["cache"] for row in data["rows"]] == specs and all(spec in captured.out for spec in specs)
    documents = [json.loads(line) for line in (ROOT / "tests/data/gsm8k_20.jsonl").read_text().splitlines()[:6]]
    tokenizer, briers = load_tokenizer(EMBEDDED), []
    for row, spec, texts in zip(data["rows"], specs, said, strict=True):
        assert row["requests"] == 4 * 6 + 6 and row["shortened_requests"] == 0
        assert row["lm_eval"]["n-samples"]["gsm8k_20_choice"]["effective"] == 6
        answers, right, brier = make(model, tokenizer, spec, batch=4, capacity=256), 0, 0.0
        for document in documents:
            context = f"Question: {document['question']}\nAnswer:"
            ids = tokenizer.encode(context)
            scores = torch.tensor([nats for nats, _ in answers.loglikelihoods(
                [(ids, tokenizer.encode(f"{context} {choice}")[len(ids):]) for choice in document["choices"]])])
            right += scores.argmax().item() == document["gold"]
            brier += (scores.softmax(0) - torch.eye(4)[document["gold"]]).square().sum().item()
        found = sum(re.findall("-?[0-9]+", text)[-1:] == [d["final"]] for text, d in zip(texts, documents, strict=True))
        metrics = row["metrics"]
        assert metrics["gsm8k_20_choice acc"][0] == pytest.approx(right / 6)
        assert metrics["gsm8k_20_choice brier_score"][0] == pytest.approx(brier / 6, abs=1e-3)
        assert metrics["gsm8k_20_generate exact_match last-number"][0] == pytest.approx(found / 6)
        assert len(texts) == 6 and all(texts) and not any("Question:" in text for text in texts)
        briers.append(metrics["gsm8k_20_choice brier_score"][0])
    assert abs(briers[0] - briers[1]) > 1e-3 and said[0] != said[1]
    assert data["rows"][0]["bits_per_element"] == 32 and data["rows"][1]["bits_per_element"] < 5


def test_harness_knows_the_tasks_of_the_readme(harness, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the names in the README, and one line for a mistyped one."""
    from lm_eval.tasks import TaskManager
    manager = TaskManager()
    assert {"gsm8k", "coqa", "truthfulqa_mc2", "longbench"} <= set(manager.all_tasks)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_path=None: manager)
    monkeypatch.setattr(tasks, "load_model", lambda *args, **settings: pytest.fail("loaded"))
    assert bench.main(["tasks", "--tasks", "coqa,gsm9k"]) == 2
    captured = capsys.readouterr()
    assert "task 'gsm9k' is not one of lm_eval" in captured.err and "gsm8k" in captured.err and captured.err.count("\n") == 1
    assert bench.main(["tasks", "--tasks", "coqa", "--include-path", "absent"]) == 2
    assert "--include-path absent is no folder" in capsys.readouterr().err
