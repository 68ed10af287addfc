"""Tasks of lm-evaluation-harness, or a task file of the user's own, answered with any cache: `pip install -e ".[eval]"`.

Contract: the harness makes requests of text and turns answers into metrics; `adapter` is its model over `Answers`, which knows token ids.
Scores are of the stored context, token by token as in decoding: see answers.py for why a plain pass would not do.
Trap: the harness is an extra and slow to import, so it is imported inside functions; its data sets come from the hub.
"""
import argparse
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cache import bits_per_element
from engine.engine import Engine, check_sizes
from engine.measure.answers import Answers
from engine.measure.quality import merges
from engine.measure.report import check_outputs, machine, new_figure, print_table, progress, save_figure, write_json
from engine.measure.rivals import Rival, parse_cache
from engine.sampling import SamplingParams
from options import device_and_dtype, open_checkpoint, settle_cpu
from tokenizer import stop_ids
from weights import aligned, find_alignment, load_model

if TYPE_CHECKING:
    from lm_eval.api.model import LM

CAPACITY = 4096             # tokens of a row without --max-seq-len; the model's positions may be fewer
FEWSHOT_SEED = 1234         # the harness's own default: the same examples for every cache, and as in published figures
COLUMNS = {"cache": ("cache", ""), "kv_bytes": ("KV bytes", ","), "bits_per_element": ("bits/element", ".2f")}


def run(args: argparse.Namespace) -> int:
    """The subject `tasks` of bench.py -> exit status, 130 where Ctrl-C ended it early; the caches that were done are reported."""
    # 1. all that needs no weights
    check_outputs(args.out, args.plot)
    for option in ("limit", "num_fewshot"):
        value, least = getattr(args, option), int(option == "limit")
        if value is not None and value < least:
            raise ValueError(f"--{option.replace('_', '-')} is {value}; give at least {least}")
    (device, dtype), (checkpoint, config, tokenizer) = device_and_dtype(args), open_checkpoint(args.checkpoint)
    capacity = min(CAPACITY, config.max_position_embeddings) if args.max_seq_len is None else args.max_seq_len
    check_sizes(config, args.batch_size, capacity)
    dtype = settle_cpu(config, device, dtype) or config.dtype
    caches = {spec: parse_cache(spec) for spec in args.cache or ["full"]}
    shape = dict(n_layer=config.n_layer, n_kv_head=config.n_kv_head, head_dim=config.head_dim, max_seq_len=capacity,
                 batch=args.batch_size, dtype=dtype, sliding_window=config.sliding_window)
    nbytes = {spec: sum(cache.build(**shape, device="meta").nbytes().values()) for spec, cache in caches.items()}
    alignments = {spec: find_alignment(args.alignment, checkpoint, config, cache) for spec, cache in caches.items() if merges(cache)}
    tasks = load_tasks(args.tasks, args.include_path, num_fewshot=args.num_fewshot)
    from lm_eval import __version__, evaluate
    # 2. the work: one cache is alive at a time
    model, rows, interrupted = load_model(checkpoint, device=device, dtype=dtype), [], False
    try:
        for spec, cache in caches.items():
            with aligned(model, alignments.get(spec), cache):
                engine = Engine(model, max_batch_size=args.batch_size, max_seq_len=capacity, cache=cache,
                                compile=False if isinstance(cache, Rival) else None)
                say = lambda text, spec=spec: progress(f"{spec}: {text}")       # noqa: E731
                answers = Answers(engine, tokenizer, stop_ids(checkpoint, tokenizer), progress=say)
                results = evaluate(adapter(answers), tasks, limit=args.limit, log_samples=False)
            if answers.shortened:
                say(f"{answers.shortened} of {answers.requests} requests did not fit into {capacity} tokens and lost their beginning")
            rows.append({"cache": spec + " (simulated)" * isinstance(cache, Rival), "cache_settings": str(cache),
                         "alignment": alignments[spec].source if alignments.get(spec) else None, "kv_bytes": nbytes[spec],
                         "bits_per_element": bits_per_element(nbytes[spec], **shape), "requests": answers.requests,
                         "shortened_requests": answers.shortened, "answers_ended_by_capacity": answers.full, "metrics": metrics(results),
                         "lm_eval": json.loads(json.dumps(results, default=str))})
            del engine, answers
            torch._dynamo.reset()       # where torch cannot tell engines apart, their graphs count against one limit
    except KeyboardInterrupt:
        interrupted = True
        progress("interrupted: the table holds the caches that were done")
    # 3. the report
    settings = {"checkpoint": str(checkpoint), "lm_eval": __version__, "tasks": args.tasks, "limit": args.limit,
                "num_fewshot": args.num_fewshot, "rows": args.batch_size, "capacity_tokens": capacity, "device": str(device),
                "dtype": str(dtype).removeprefix("torch."),
                "scoring": "context stored, its last token and the continuation fed one by one as in decoding"}
    print(f"{args.tasks}{f', the first {args.limit} documents of each' if args.limit else ''}; {checkpoint.name}, {device}, "
          f"{settings['dtype']}\nKV bytes of {args.batch_size} rows x {capacity} tokens, everything counted; +-: standard error\n")
    names = {name: name for row in rows for name in row["metrics"]}
    print_table([row | {name: cell(*value) for name, value in row["metrics"].items()} for row in rows],
                COLUMNS | {name: (name, "") for name in names})
    write_json(args.out, {"subject": "tasks", "machine": machine(device), "settings": settings, "rows": rows, "interrupted": interrupted})
    if args.plot is not None and rows:
        plot(rows, list(names), args.plot)
    return 130 if interrupted else 0


def load_tasks(names: str, include_path: str | None, *, num_fewshot: int | None) -> dict[str, Any]:
    """What `lm_eval.evaluate` takes, data included. ValueError without the harness, for a name it does not know, for data out of reach."""
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"the subject tasks needs lm-evaluation-harness ({error}); pip install -e \".[eval]\"") from None
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"--include-path {include_path} is no folder; give the one that holds your task's YAML")
    manager, wanted = TaskManager(include_path=include_path), [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in manager.all_tasks and not Path(name).is_file():
            near = ", ".join(difflib.get_close_matches(name, manager.all_tasks)) or "none alike"
            raise ValueError(f"task {name!r} is not one of lm_eval {lm_eval.__version__} ({near}); correct it, or give the folder of "
                             "your own YAML as --include-path")
    try:
        tasks = manager.load(wanted)
    except Exception as error:                  # of the hub, of datasets, of a task's own code: whatever it is, no weights were read for it
        raise ValueError(f"--tasks {names} cannot be loaded ({type(error).__name__}: {error}); data sets come from the Hugging Face hub "
                         "or from its cache on this machine, modules that a task imports from the extra eval") from None
    for task in tasks["tasks"].values():        # as the harness does: a task that says 0 examples stays with them
        own = task.get_config("num_fewshot")
        if own is None or own and num_fewshot is not None:
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return tasks


def adapter(answers: Answers) -> "LM":
    """The harness's view of `answers`: requests in text, with its own rules where a context ends and a continuation begins."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs

    class EngineLM(TemplateLM):
        """What the harness asks of a model, answered by `answers`."""

        tokenizer, eot_token_id, prefix_token_id = answers.tokenizer, answers.tokenizer.eos_id, answers.prefix[0]

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return answers.tokenizer.encode(string, bos=add_special_tokens is not False)

        def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any) -> list[tuple[float, bool]]:
            return answers.loglikelihoods([(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            texts = [answers.tokenizer.encode(request.args[0], bos=False) for request in requests]
            return [nats for nats, _ in answers.loglikelihoods([(answers.prefix, ids) for ids in texts])]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            return answers.generate([request_of(i, *request.args) for i, request in enumerate(requests)])

    def request_of(i: int, context: str, given: Mapping[str, Any]) -> tuple[list[int], list[str], SamplingParams]:
        wish = normalize_gen_kwargs(dict(given))
        special = {answers.tokenizer.special_tokens[text] for text in wish["until"] if text in answers.tokenizer.special_tokens}
        return answers.tokenizer.encode(context), wish["until"], SamplingParams(
            max_new_tokens=wish["max_gen_toks"], temperature=wish.get("temperature", 0.0) if wish["do_sample"] else 0.0,
            top_k=wish.get("top_k", 0), top_p=wish.get("top_p", 1.0), seed=i, stop_ids=tuple(sorted({*answers.stop_ids, *special})))

    return EngineLM()


def metrics(results: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """The harness's results -> "task metric filter" to value and standard error; of a group that sums up its tasks, the group alone."""
    figures = {task: {key.partition(",")[::2]: value for key, value in entries.items() if "," in key}
               for task, entries in results["results"].items()}
    groups = {group: entries for group, entries in results.get("group_subtasks", {}).items() if figures.get(group)}
    inside = {task for children in groups.values() for task in children}
    number = lambda x: x if isinstance(x, int | float) else None       # noqa: E731
    return {" ".join([task, metric] + [label] * (label != "none")): (value, number(entries.get((f"{metric}_stderr", label))))
            for task, entries in figures.items() if task not in inside
            for (metric, label), value in entries.items() if not metric.endswith("_stderr") and number(value) is not None}


def cell(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} +- {error:.4f}"


def plot(rows: Sequence[Mapping[str, Any]], names: Sequence[str], path: str) -> None:
    """One picture for each metric: its value over bits per element, a mark for each cache, bars of one standard error."""
    figure, (axes,) = new_figure(1, len(names))
    for ax, name in zip(axes, names, strict=True):
        for row in rows:
            value, error = row["metrics"][name]
            ax.errorbar(row["bits_per_element"], value, yerr=error, fmt="o", capsize=2, label=row["cache"])
        ax.set(title=name, xlabel="bits per element, everything counted")
        ax.grid(alpha=.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    save_figure(figure, path)
