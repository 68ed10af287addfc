"""Measure a cache: its bytes, its speed, its loss.

Contract: a table on stdout, progress on stderr, --out FILE.json one JSON object (machine, versions, settings, all rows),
--plot FILE.png. Exit status 0, or 2 with one line that says what was wrong. Each subject is a module of engine/measure.
"""
from __future__ import annotations

import argparse
import importlib
import sys

from options import Parser, add_alignment_option, add_model_options, exit_status


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="bench.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")

    def subject(name: str, help: str, caches: bool = True, model: bool = True, report: bool = True,
                alignment: bool = True) -> argparse.ArgumentParser:
        sub = subjects.add_parser(name, help=help, description=help, allow_abbrev=False)
        if model:
            add_model_options(sub)
        if caches:
            sub.add_argument("--cache", metavar="SPEC", nargs="+", action="extend", help="caches to measure, written as for generate.py")
        if alignment:
            add_alignment_option(sub)
        if report:
            sub.add_argument("--out", metavar="FILE", help="write one JSON object")
            sub.add_argument("--plot", metavar="FILE", help="write a PNG (needs matplotlib)")
        return sub

    # subjects are added here, each with the options of its module
    sub = subject("quality", "what a cache costs in accuracy, next to its bytes")
    add = sub.add_argument
    add("--text", metavar="FILE", required=True, help="held-out UTF-8 text")
    add("--context", metavar="N", type=int, default=320, help="tokens of a window that are stored first (default: 320)")
    add("--continuation", metavar="M", type=int, default=128, help="tokens after them, fed and scored (default: 128)")
    add("--scoring", choices=("decode", "chunk"), default="decode",
        help="decode: they are fed one by one (default); chunk: all at once over the stored context, faster")
    add("--windows", metavar="K", type=int, default=16, help="windows, spread evenly over the text (default: 16)")
    add("--batch-size", metavar="B", type=int, default=8, help="windows that run together (default: 8)")
    sub = subject("needle", "whether one sentence in a long text is still found, and how likely its answer is")
    add = sub.add_argument
    add("--text", metavar="FILE", required=True, help="held-out UTF-8 text")
    add("--lengths", metavar="N,N", default="128,256,448", help="tokens of the text with the needle (default: 128,256,448)")
    add("--depths", metavar="D", type=int, default=10, help="places from start to end (default: 10)")
    add("--needles", metavar="K", type=int, default=8, help="needles, each at every depth of a text of its own (default: 8)")
    add("--batch-size", metavar="B", type=int, default=22, help="texts that run together (default: 22)")
    add("--seed", metavar="N", type=int, default=0, help="which answers (default: 0)")
    sub = subject("similarity", "how alike K and V of different layers are, and which pairs to merge", caches=False)
    add = sub.add_argument
    add("--text", metavar="FILE", required=True, help="held-out UTF-8 text")
    add("--context", metavar="N", type=int, default=512, help="tokens of a window (default: 512)")
    add("--windows", metavar="K", type=int, default=8, help="windows, spread evenly over the text (default: 8)")
    sub = subject("align", "coordinates in which merging loses least, folded into the weights by --alignment", caches=False,
                  report=False, alignment=False)
    add = sub.add_argument
    add("--text", metavar="FILE", required=True, help="UTF-8 text to calibrate on, not one that is measured on afterwards")
    add("--out", metavar="FILE", required=True, help="the alignment, a .safetensors file")
    add("--cache", metavar="SPEC", default="minicache,merge_from=0", help="whose groups are aligned, for its merge rule, window and sinks "
        "(default: minicache,merge_from=0, which serves every merge_from)")
    add("--map", choices=("invertible", "orthogonal"), default="invertible", help="invertible maps also stretch (default: invertible)")
    add("--pairs", choices=("adjacent", "any"), default="adjacent", help="any: choose which of the merged layers share (default: adjacent)")
    add("--context", metavar="N", type=int, default=448, help="tokens of a window (default: 448)")
    add("--windows", metavar="K", type=int, default=24, help="windows, spread evenly over the text (default: 24)")
    add("--steps", metavar="N", type=int, default=150, help="of the fit, for each group's K and V; 0: the closed form (default: 150)")
    sub = subject("throughput", "how many rows of a cache fit and how fast they run, next to what its bytes allow", alignment=False)
    add = sub.add_argument
    add("--model", metavar="NAME", help="random weights in a named shape, e.g. llama-2-7b, instead of a checkpoint")
    add("--layers", metavar="N", type=int, help="with --model: only so many layers, for a shape that fits here")
    add("--batch-sizes", metavar="B,B", help="rows that run together (default: 1,8,32)")
    add("--fill-memory", metavar="GB", type=float, help="instead: for each cache as many rows as fit beside the weights in GB (1e9 bytes, "
        "on a CPU estimated)")
    add("--prompt-tokens", metavar="N", type=int, help="tokens of a prompt (default: 161), with --trace the most")
    add("--new-tokens", metavar="N", type=int, help="new tokens of a row (default: 338), with --trace the most")
    add("--trace", metavar="FILE", help="CSV of real lengths (ContextTokens, GeneratedTokens); rows that finish take the next request")
    add("--requests", metavar="N", type=int, help="how many requests of the trace, from its start (default: 64)")
    add("--peer", metavar=("NAME", "DIR"), nargs="+", action="append",
        help="another engine on the same weights, in the same run: transformers, or gpt-fast DIR (a checkout); may be given twice")
    add("--card-only", action="store_true", help="print the static card; nothing is measured or allocated")
    add("--compile", action=argparse.BooleanOptionalAction, help="compile the decode step (default: on a GPU)")
    sub = subject("tasks", "tasks of lm-evaluation-harness, or of your own, answered with each cache")
    add = sub.add_argument
    add("--tasks", metavar="A,B", required=True, help="the harness's names, e.g. gsm8k,coqa,truthfulqa_mc2,longbench, or YAML files")
    add("--include-path", metavar="DIR", help="folder with task files of your own")
    add("--limit", metavar="N", type=int, help="only the first N documents of a task")
    add("--num-fewshot", metavar="N", type=int, help="examples before a question (default: the task's own)")
    add("--batch-size", metavar="B", type=int, default=8, help="requests that run together (default: 8)")
    add("--max-seq-len", metavar="S", type=int, help="capacity of a row; what is longer loses its beginning (default: 4096, at most the "
        "model's positions)")
    sub = subject("attention", "how long one layer's attention takes for one new token per row, next to the bytes it reads",
                  model=False, alignment=False)
    add = sub.add_argument
    add("--heads", metavar="H", type=int, required=True, help="query heads")
    add("--kv-heads", metavar="G", type=int, required=True, help="kv heads, a divisor of H")
    add("--head-dim", metavar="D", type=int, required=True, help="width of a head")
    add("--batch", metavar="B", type=int, required=True, help="rows")
    add("--seq", metavar="S", type=int, required=True, help="capacity: tokens that a row has room for")
    add("--filled", metavar="N", type=int, help="tokens stored in each row (default: S - 1); where fewer, a "
        "cache of capacity N + 1 is timed, too; with --plot also N/8, N/4, N/2")
    add("--device", metavar="D", default="auto", help="auto, cpu, cuda or cuda:N (default: auto, a GPU if there is one)")
    add("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"), help="of exact tokens (default: bfloat16)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line -> exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    return exit_status(parser.prog, lambda: importlib.import_module(f"engine.measure.{args.subject}").run(args))


if __name__ == "__main__":
    sys.exit(main())
