"""Run a checkpoint from a terminal: one prompt, a file of prompts, or a chat.

Contract: results go to stdout; progress, notices and --stats to stderr. Exit status 0; 130 after Ctrl-C; 2 with one line that
says what was wrong. What can be refused without the weights is refused before they are read.
Trap: torch and all that needs it are imported inside functions, so that --help and a mistyped option answer at once.
"""
from __future__ import annotations

import argparse
import json
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from options import Parser, add_alignment_option, add_model_options, device_and_dtype, exit_status, open_checkpoint, read_text, settle_cpu

if TYPE_CHECKING:
    from engine import Engine, SamplingParams, Stats, Step
    from model import ModelConfig
    from tokenizer import Tokenizer

ROWS = 8                # prompts of a file that run together; the others wait for a free row
CHAT_CAPACITY = 4096    # tokens of a conversation without --max-seq-len; the model's positions may be fewer
EPILOG = """In a chat /reset starts over, /exit or end of input ends it, Ctrl-C ends a reply.
--json prints text (of the new tokens, without the prompt), prompt_ids, tokens (the new ids), prompt_tokens, new_tokens,
finish_reason (stop, length, capacity, interrupted), for --prompt-file in a list under rows; and ttft_s, prefill_tokens_per_s,
decode_tokens_per_s, kv_bytes, kv_bytes_by_kind, bits_per_element, ratio_to_full (a bf16 full cache has 1), peak_bytes, cache, compile,
device, dtype, attend_form; for a coded or merged cache retained_slots, retained_filled, retained_active, retained_overflow, and alignment
(the file in use); for --compare-full nll_full, nll, kl (nats per token), top1_agreement (share), k_error_by_layer, v_error_by_layer
(relative)."""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="generate.py", description=__doc__.partition("\n")[0], epilog=EPILOG, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add, source = parser.add_argument, parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="text to continue (default: Once upon a time)")
    source.add_argument("--prompt-file", metavar="F", help=f"UTF-8 text, one prompt a line, blank lines skipped; {ROWS} run at once")
    source.add_argument("--chat", action="store_true", help="a conversation; one line of input is one message")
    add("--system", metavar="TEXT", help="the system message of a chat")
    add_model_options(parser)
    add("--max-new-tokens", metavar="N", type=int, default=256, help="limit for each prompt or reply (default: 256)")
    add("--temperature", metavar="X", type=float, help="0: always the likeliest token (default: the checkpoint's own, else 0.8)")
    add("--top-k", metavar="K", type=int, help="sample from the K likeliest tokens (default: the checkpoint's own, else 0, from all)")
    add("--top-p", metavar="P", type=float, help="sample from the likeliest that reach probability P (default likewise, else 1, all)")
    add("--seed", metavar="N", type=int, help="the same seed gives the same text (default: another text each run)")
    add("--max-seq-len", metavar="S", type=int, help="capacity: tokens of prompt and new text (default: the longest prompt + "
        f"--max-new-tokens, in a chat {CHAT_CAPACITY}, at most the model's positions)")
    add("--compile", action=argparse.BooleanOptionalAction, help="compile the decode step (default: on a GPU)")
    add("--cache", metavar="SPEC", default="full", help="how K and V are stored (default: full)")
    add_alignment_option(parser)
    add("--compare-full", action="store_true", help="then feed the same tokens to a full cache: what SPEC loses, with --stats")
    add("--stats", action="store_true", help="times, rates and bytes on stderr")
    add("--json", action="store_true", help="one JSON object on stdout and nothing else; not for a chat")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line -> exit status. argparse's own refusals raise SystemExit(2)."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.chat and args.json:
        parser.error("argument --json: not allowed with argument --chat")
    if args.chat and args.compare_full:
        parser.error("argument --compare-full: not allowed with argument --chat")
    if args.system is not None and not args.chat:
        parser.error("argument --system: needs argument --chat")
    return exit_status(parser.prog, lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Check, load, run one of the modes."""
    from cache import CacheConfig, check_layout
    from engine import Engine, SamplingParams, check_sizes, figures
    from engine.compare import check_room_for_full, compare_to_full
    from tokenizer import ChatTemplate, sampling_settings, stop_ids
    from tokenizer.chat_loop import ChatLoop
    from weights import find_alignment

    # 1. all that needs no weights
    (device, dtype), cache = device_and_dtype(args), CacheConfig.parse(args.cache)
    checkpoint, config, tokenizer = open_checkpoint(args.checkpoint)
    alignment = find_alignment(args.alignment, checkpoint, config, cache)
    given = {key: value for key in ("temperature", "top_k", "top_p") if (value := getattr(args, key)) is not None}
    params = SamplingParams(max_new_tokens=args.max_new_tokens, seed=args.seed, stop_ids=stop_ids(checkpoint, tokenizer),
                            **{"temperature": 0.8} | sampling_settings(checkpoint) | given)
    results = [] if args.chat else [Result(text, tokenizer.encode(text)) for text in read_prompts(args)]
    max_seq_len = args.max_seq_len
    if max_seq_len is None:
        wanted = CHAT_CAPACITY if args.chat else max(len(r.prompt_ids) for r in results) + args.max_new_tokens
        max_seq_len = min(wanted, config.max_position_embeddings)
    check_prompts(results, tokenizer.encode(""), max_seq_len, config)
    rows = max(1, min(len(results), ROWS))
    check_sizes(config, rows, max_seq_len)
    check_layout(cache, device=device, dtype=dtype or config.dtype, n_layer=config.n_layer, n_kv_head=config.n_kv_head,
                 head_dim=config.head_dim, batch=rows, max_seq_len=max_seq_len)
    if args.chat:
        loop = ChatLoop(ChatTemplate.from_checkpoint(checkpoint, tokenizer), tokenizer, capacity=max_seq_len, system=args.system,
                        reply=lambda ids: reply(engine, ids, params, tokenizer, stats=args.stats))
    # 2. the weights and the cache
    dtype = settle_cpu(config, device, dtype)
    engine = Engine.from_pretrained(checkpoint, device=device, dtype=dtype, max_batch_size=rows, max_seq_len=max_seq_len,
                                    cache=cache, alignment=alignment, compile=args.compile)
    if args.compare_full:
        check_room_for_full(engine)
    # 3. the work
    if engine.compile:
        remark("compiling the decode step; a later run finds most of it done")
    if args.chat:
        loop.run()
        return 0
    if args.json:
        stats = generate(engine, results, params)
    elif args.prompt_file is not None:
        stats = generate(engine, results, params, show=rows_in_order(results, tokenizer))
    else:
        print(results[0].prompt, end="", flush=True)
        stats = generate(engine, results, params, show=stream(tokenizer, continues=True))
        print(flush=True)
        if results[0].finish_reason in ("length", "capacity"):
            remark(f"cut after {len(results[0].tokens)} tokens, see --max-new-tokens and --max-seq-len")
    report = figures(engine, stats) | ({"alignment": alignment.source} if alignment else {})
    if args.compare_full:
        report |= compare_to_full(engine, [r.prompt_ids for r in results], [r.tokens for r in results])
    if args.json:
        texts = [r.as_json(tokenizer) for r in results]
        print(json.dumps((texts[0] if args.prompt_file is None else {"rows": texts}) | report))
    if args.stats or args.compare_full:
        print_stats(engine, results, report)
    return 130 if any(r.finish_reason == "interrupted" for r in results) else 0


def remark(text: str) -> None:
    """For a person at a terminal, in brackets; a pipe gets results and errors alone."""
    from tokenizer.chat_loop import notice
    if sys.stderr and sys.stderr.isatty():
        notice(text)


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The texts to continue. ValueError for a --prompt-file that cannot be read or holds none."""
    if args.prompt_file is None:
        return ["Once upon a time" if args.prompt is None else args.prompt]
    text = read_text(args.prompt_file, "--prompt-file", "a text file with one prompt a line")
    prompts = [line for line in text.split("\n") if line.strip()]       # splitlines() would also cut at form feeds and U+2028
    if not prompts:
        raise ValueError(f"--prompt-file {args.prompt_file} holds no prompt in {len(text)} characters; write one a line")
    return prompts


def check_prompts(results: list[Result], nothing: list[int], max_seq_len: int, config: ModelConfig) -> None:
    """ValueError for a prompt without tokens (`nothing`: what an empty text gives, BOS at most) or beyond the capacity."""
    for number, result in enumerate(results, 1):
        where, n = "the prompt" if len(results) == 1 else f"prompt {number} of {len(results)}", len(result.prompt_ids)
        if result.prompt_ids == nothing:
            raise ValueError(f"{where} is empty (0 tokens); give at least one word")
        if n > max_seq_len:
            cure = "shorten it" + " or raise --max-seq-len" * (max_seq_len < config.max_position_embeddings)
            raise ValueError(f"{where} has {n} tokens, the capacity is {max_seq_len}; {cure}")


@dataclass
class Result:
    """A prompt and what came of it so far; finish_reason None: not finished."""

    prompt: str
    prompt_ids: list[int]
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def as_json(self, tokenizer: Tokenizer) -> dict:
        return {"text": tokenizer.decode(self.tokens, continues=True), "prompt_ids": self.prompt_ids, "tokens": self.tokens,
                "prompt_tokens": len(self.prompt_ids), "new_tokens": len(self.tokens), "finish_reason": self.finish_reason}


def generate(engine: Engine, results: list[Result], params: SamplingParams, *, reuse: bool = False,
             show: Callable[[Step | None], None] = lambda step: None) -> Stats:
    """Fill in `results`; `show` sees each step and, at the end, None. Ctrl-C ends it after the current step, a second one at once."""
    from engine import Stats
    stats = Stats()
    steps = engine.generate([r.prompt_ids for r in results], params, reuse=reuse)
    with suppress(KeyboardInterrupt), ctrl_c_ends(engine), closing(steps):
        for step in steps:
            stats.add(step)
            for i, token in step.tokens:
                results[i].tokens.append(token)
            for i, reason in step.finished:
                results[i].finish_reason = reason
            show(step)
    for r in results:
        r.finish_reason = r.finish_reason or "interrupted"
    show(None)
    return stats


@contextmanager
def ctrl_c_ends(engine: Engine) -> Iterator[None]:
    """Ctrl-C asks the engine to end after its current step; from then on it does what it did before."""
    def handler(*_: object) -> None:
        engine.interrupt()
        signal.signal(signal.SIGINT, before)
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def stream(tokenizer: Tokenizer, *, continues: bool) -> Callable[[Step | None], None]:
    """A `show` for one prompt: text as it comes."""
    decoder = tokenizer.stream(continues=continues)
    return lambda step: print("".join(decoder.put(token) for _, token in step.tokens) if step else decoder.flush(), end="", flush=True)


def rows_in_order(results: list[Result], tokenizer: Tokenizer) -> Callable[[Step | None], None]:
    """A `show` for many prompts: each whole, in the file's order, once it and those before it have finished."""
    waiting = deque(enumerate(results, 1))

    def show(step: Step | None) -> None:
        while waiting and waiting[0][1].finish_reason:
            number, r = waiting.popleft()
            if r.tokens or r.finish_reason != "interrupted":        # after Ctrl-C: not those that never began
                print(f"--- {number} of {len(results)}: {len(r.prompt_ids)} + {len(r.tokens)} tokens, {r.finish_reason}\n"
                      f"{r.prompt}{tokenizer.decode(r.tokens, continues=True)}\n", flush=True)
    return show


def reply(engine: Engine, ids: list[int], params: SamplingParams, tokenizer: Tokenizer, *, stats: bool) -> tuple[list[int], str]:
    """Continue a conversation on row 0, whose cache keeps what it stores of `ids` -> new ids, finish reason."""
    result = Result("", ids)
    done = generate(engine, [result], params, reuse=True, show=stream(tokenizer, continues=False))
    print(flush=True)
    if stats:
        fed = sum(s.n_fed for s in done.steps if s.phase == "prefill")
        print(f"[prefilled {fed} of {len(ids)} tokens, first token after {done.ttft_s:.2f} s; {len(result.tokens)} new, "
              f"{done.decode_tokens_per_s:.1f} tokens/s]", file=sys.stderr)
    return result.tokens, result.finish_reason


def print_stats(engine: Engine, results: list[Result], report: dict) -> None:
    """Every figure of --json by the same name, for reading, on stderr."""
    counts = {"rows": f"{engine.max_batch_size} x {engine.max_seq_len} tokens", "prompt_tokens": sum(len(r.prompt_ids) for r in results),
              "new_tokens": sum(len(r.tokens) for r in results)}
    for key, value in (counts | report).items():
        if isinstance(value, dict):
            value = ", ".join(f"{kind} {n:,}" for kind, n in value.items())
        elif isinstance(value, list):
            value = " ".join(f"{x:.2g}" for x in value)
        text = f"{value:,.4g}" if isinstance(value, float) and value < 100 else f"{value:,.0f}" if isinstance(value, float) else value
        print(f"{key:<22}{f'{text:,}' if type(text) is int else text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
