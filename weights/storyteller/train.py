"""The recipe of the embedded checkpoint: text -> tokenizer -> training -> a folder in Hugging Face Llama form.

    python -m weights.storyteller.train --shape gpu --minutes 20                    one CUDA GPU, or --shape cpu --minutes 150: from nothing
    python -m weights.storyteller.train --shape grown --grow DIR --minutes 90       two cores, from a checkpoint of that size or smaller
    python -m weights.storyteller.train --evaluate weights/storyteller              held-out NLL per byte of any checkpoint

Contract: run from the repository's root; trains the engine's own Transformer, and the engine imports nothing of this folder. All that is
made lies under --work: data (kept for further runs), resume.pt, log.csv, checkpoint. The same --steps, cut by --resume or not, give the
same weights; with --minutes the schedule follows the clock. Trap: the last part of a run is its cooldown, so a run that was cut short
exports nothing: --resume it to its end.
"""
import argparse
import csv
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cache.base import attend_exact
from model import ModelConfig, Rope, Transformer
from tokenizer import load_tokenizer
from weights import EMBEDDED, load_model
from weights.names import tensor_slots
from weights.storyteller.grow import grow
from weights.storyteller.prepare import SOURCES, Windows, prepare
from weights.storyteller.publish import EVAL_CHARACTERS, EVAL_CONTEXT, export, model_card


class Shape(NamedTuple):
    """A model and how it is trained; the rates are Muon's (matrices) and AdamW's (embedding, norms)."""

    dim: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocab_size: int
    batch_tokens: int
    dropout: float              # for texts that are read again and again: a grown model has read the stories before
    muon_rate: float
    adamw_rate: float
    curriculum: tuple[tuple[float, tuple[float, ...]], ...]
    lengths: tuple[tuple[float, int], ...] = ((0., 512), (.8, 2048))


# Share of each source at a point of the run, straight lines between: ends on simple stories, children's books and requests for a story.
# lengths: tokens of a sequence from a point of the run on; the last is the model's context. Two cores see few tokens: stories from the
# start, and short sequences.
CURRICULUM = ((0., (.70, .25, .05, .00)), (.4, (.50, .35, .12, .03)), (.7, (.15, .35, .35, .15)), (1., (.00, .20, .45, .35)))
HURRIED = ((0., (.20, .40, .30, .10)), (.6, (.10, .35, .35, .20)), (1., (.00, .15, .50, .35)))
SHAPES = {"gpu": Shape(320, 640, 16, 8, 4, 4096, 65_536, .1, 6e-3, 3e-3, CURRICULUM),
          "cpu": Shape(256, 512, 16, 4, 2, 4096, 4_096, 0., 9e-3, 4e-3, HURRIED, ((0., 256), (.8, 512), (.92, 2048))),
          "grown": Shape(192, 768, 16, 6, 3, 4098, 4_096, .1, 2.5e-3, 1e-3, HURRIED, ((0., 256), (.5, 512), (.92, 2048))),
          "tiny": Shape(64, 96, 2, 2, 1, 400, 512, 0., 1e-2, 1e-2, CURRICULUM)}
REPEATS = 16                                # a long run takes less of a source than this many readings, about: more teaches it by heart
WARMUP, COOLDOWN = .02, .8                  # shares of the run; the rate is constant between (a trapezoid)
EVALUATED = ("tinystories_valid", "alice", "time_machine")


def deal(windows: Windows, step: int, progress: float, shape: Shape, device: torch.device) -> Tensor:
    """-> ids [B, T + 1], the mixture and the length being those of this point of the run."""
    n_tokens, curriculum = shape.batch_tokens, shape.curriculum
    T = min([length for start, length in shape.lengths if progress >= start][-1], n_tokens)
    total, shares = step * n_tokens / progress if progress else 0., []      # of the whole run, as far as this point tells
    for i, (ids, copies) in enumerate(zip(windows.ids, windows.copies, strict=True)):
        planned = total * sum((b - a) * (x[i] + y[i]) / 2 for (a, x), (b, y) in zip(curriculum, curriculum[1:], strict=False))
        share = np.interp(progress, [at for at, _ in curriculum], [s[i] for _, s in curriculum])
        shares.append(share * min(1., REPEATS * len(ids) / copies / max(planned, 1.)))
    chosen = np.random.default_rng((7, step)).choice(len(SOURCES), n_tokens // T, p=np.array(shares) / sum(shares))
    return torch.from_numpy(np.stack([windows.next(int(source), T) for source in chosen])).to(device)


class CausalLayer:
    """A layer cache that stores nothing: exact causal attention over its own sequence."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, valid: Tensor, rows: Tensor | None = None) -> Tensor:
        return attend_exact(q, k, v, None)


def logits_of(model: Transformer, rope: Rope, ids: Tensor) -> Tensor:
    """ids [B, T] -> logits [B, T, V] fp32, no cache."""
    pos = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    caches = [CausalLayer()] * len(model.layers)
    return model.logits(model.run_layers(model.embed(ids), range(len(caches)), caches, rope(pos), pos, pos >= 0))


def loss_of(model: Transformer, rope: Rope, ids: Tensor) -> Tensor:
    """ids [B, T + 1] -> mean NLL of the last T."""
    return F.cross_entropy(logits_of(model, rope, ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def new_model(config: ModelConfig, *, dropout: float) -> Transformer:
    """Normal matrices of variance 1 / fan-in, what writes to the residual stream zero: at the start each block is the identity."""
    model = Transformer(config)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            nn.init.zeros_(p) if name.endswith(("wo.weight", "w2.weight")) else nn.init.normal_(
                p, std=.02 if name == "embed.weight" else p.shape[1] ** -.5)
    for layer in model.layers if dropout else ():
        for part in (layer.attention, layer.mlp):
            part.register_forward_hook(lambda module, _, y: F.dropout(y, dropout, module.training))
    return model


class Muon:
    """Momentum, made orthogonal (Newton-Schulz) per matrix as the checkpoint stores it: q, k, v, gate and up apart.

    The step of each has the size of an AdamW step of a fifth of the rate (factor .2 sqrt(longer side), Liu et al. 2025, section 2.2).
    """

    def __init__(self, model: Transformer, *, momentum: float = .95, decay: float = .1) -> None:
        parameters = dict(model.named_parameters())
        slots = [s for name, s in tensor_slots(model.config, ()).items() if name.startswith("model.layers.") and "norm" not in name]
        self.parameters = {name: parameters[name] for name, _ in slots}
        self.buffers = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.momentum, self.decay, self.by_shape = momentum, decay, {}
        for name, index in slots:
            self.by_shape.setdefault(self.buffers[name][index].shape, []).append((name, index))

    @torch.no_grad()
    def step(self, rate: float) -> None:
        update = {}
        for name, p in self.parameters.items():
            buffer = self.buffers[name].lerp_(p.grad, 1 - self.momentum)
            update[name] = p.grad.lerp(buffer, self.momentum)
            p.mul_(1 - rate * self.decay)
        for shape, slots in self.by_shape.items():
            x = orthogonal(torch.stack([update[name][index] for name, index in slots]))
            for (name, index), y in zip(slots, x, strict=True):
                self.parameters[name][index].add_(y, alpha=-rate * .2 * math.sqrt(max(shape)))


def orthogonal(x: Tensor) -> Tensor:
    """x [N, a, b] -> about U V^T of each matrix's U S V^T: five steps of Jordan's quintic (2024), bf16 where that is fast."""
    y = x.bfloat16() if bf16_is_fast(x.device) else x
    y = y.mT if x.shape[1] > x.shape[2] else y
    y = y / (y.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = y @ y.mT
        y = 3.4445 * y + (-4.7750 * a + 2.0315 * a @ a) @ y
    return (y.mT if x.shape[1] > x.shape[2] else y).to(x.dtype)


def bf16_is_fast(device: torch.device) -> bool:
    """CUDA, and CPUs with AVX-512 BF16, where a step takes three fifths of its time in fp32."""
    return device.type == "cuda" or torch.cpu.get_capabilities().get("avx512_bf16", False)


def hf_config(shape: Shape) -> dict[str, Any]:
    """config.json. Positions up to the last of the lengths were trained, so theta is Llama's own, made for twice that."""
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape.dim, "intermediate_size": shape.mlp,
            "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": 64,
            "vocab_size": shape.vocab_size, "max_position_embeddings": shape.lengths[-1][1], "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "hidden_act": "silu", "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
            "attention_bias": False, "mlp_bias": False}


def train(work: Path, shape: Shape, *, minutes: float | None = None, steps: int | None = None, resume: bool = False,
          grow_from: Path | None = None, compile: bool = True, stop_after: int | None = None) -> tuple[Transformer, dict[str, Any]]:
    """A run of so many minutes or steps over work/data -> the model, figures. stop_after: leave after that step (to be resumed)."""
    device, started = torch.device("cuda" if torch.cuda.is_available() else "cpu"), time.monotonic()
    n_tokens = shape.batch_tokens
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    config = ModelConfig.from_dict(hf_config(shape))
    model, windows = new_model(config, dropout=shape.dropout).to(device).train(), Windows(work / "data")
    if grow_from is not None:
        grow(model, grow_from)
    muon = Muon(model)
    adamw = torch.optim.AdamW([p for name, p in model.named_parameters() if name not in muon.parameters], betas=(.9, .95), weight_decay=0)
    step, before, rows = 0, 0., []
    if resume:
        if not (work / "resume.pt").is_file():
            raise FileNotFoundError(f"{work} holds no resume.pt: start the run without --resume")
        state = torch.load(work / "resume.pt", map_location=device, weights_only=True)
        if tuple(state["shape"]) != tuple(shape):
            raise ValueError(f"{work}/resume.pt is of the shape {tuple(state['shape'])}, not {tuple(shape)}: give that run's --shape")
        model.load_state_dict(state["model"])
        adamw.load_state_dict(state["adamw"])
        for name, buffer in muon.buffers.items():
            buffer.copy_(state["muon"][name])
        windows.drawn, step, before, rows = state["drawn"], state["step"], state["seconds"], state["rows"]
    rope, cuda = Rope(config, shape.lengths[-1][1]).to(device), device.type == "cuda"
    loss_fn = torch.compile(loss_of, dynamic=False) if compile else loss_of
    losses, marked, saved, compiled = [], started, started, set()

    def save() -> None:
        state = {"shape": tuple(shape), "model": model.state_dict(), "adamw": adamw.state_dict(), "muon": muon.buffers,
                 "drawn": windows.drawn, "step": step, "seconds": before + time.monotonic() - started, "rows": rows}
        torch.save(state, work / "resume.new")
        (work / "resume.new").replace(work / "resume.pt")
        with open(work / "log.csv", "w", newline="") as file:
            csv.writer(file).writerows([("step", "minutes", "tokens", "length", "rate", "loss_nats_per_token", "tokens_per_s"), *rows])

    while True:
        progress = step / steps if steps else (before + time.monotonic() - started) / (60 * minutes)
        if progress >= 1 or step == stop_after:
            break
        factor = min(1, (progress + 1e-3) / WARMUP, (1 - progress) / COOLDOWN)
        begin = time.monotonic()
        torch.manual_seed(step)                                 # dropout
        ids = deal(windows, step, progress, shape, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16_is_fast(device)):
            loss = loss_fn(model, rope, ids)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.)
        for group in adamw.param_groups:
            group["lr"] = shape.adamw_rate * factor
        adamw.step()
        muon.step(shape.muon_rate * factor)
        model.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        step += 1
        if ids.shape not in compiled:                           # a step that compiles takes longer than the whole warm-up
            compiled.add(ids.shape)
            started += time.monotonic() - begin
        if step % 10 == 0:                                      # the only wait for the device
            mean, now = float(torch.stack(losses).mean()), time.monotonic()
            rows.append((step, round((before + now - started) / 60, 3), step * n_tokens, ids.shape[1] - 1, shape.muon_rate * factor, mean,
                         round(10 * n_tokens / (now - marked))))
            losses, marked = [], now
            print(f"step {step} {progress:.1%} loss {mean:.3f} {rows[-1][-1]:,} tokens/s", flush=True)
            if now - saved > 300:
                saved = now
                save()
    save()
    parts = np.array_split(np.array([(row[2], row[3], row[5]) for row in rows]), min(12, len(rows))) if rows else []
    curve = [(int(part[-1, 0]), int(part[-1, 1]), float(part[:, 2].mean())) for part in parts]
    read = {source: sum(n * T for (s, T), n in windows.drawn.items() if s == i) for i, source in enumerate(SOURCES)}
    return model.eval(), {"steps": step, "tokens": step * n_tokens, "minutes": (before + time.monotonic() - started) / 60, "curve": curve,
                          "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
                          "epochs": {s: read[s] * n / len(ids) for s, ids, n in zip(SOURCES, windows.ids, windows.copies, strict=True)}}


@torch.inference_mode()
def evaluate(directory: Path, held_out: Path) -> dict[str, float]:
    """NLL per byte (nats) of the first EVAL_CHARACTERS of each of EVALUATED, fp32: 256 tokens at a time after up to 255 before them."""
    torch.set_float32_matmul_precision("highest")
    device, tokenizer = torch.device("cuda" if torch.cuda.is_available() else "cpu"), load_tokenizer(directory)
    model, nll = load_model(directory, device=device, dtype=torch.float32), {}
    rope, half = Rope(model.config, EVAL_CONTEXT).to(device), EVAL_CONTEXT // 2
    for name in EVALUATED:
        text = (held_out / f"{name}.txt").read_text(encoding="utf-8")[:EVAL_CHARACTERS]
        bos, ids, total = tokenizer.encode(""), tokenizer.encode(text, bos=False), 0.
        for start in range(0, len(ids), half):
            window = torch.tensor([bos + ids[max(0, start - half + 1):start + half]], device=device)
            scored = min(half, len(ids) - start)
            total += float(F.cross_entropy(logits_of(model, rope, window[:, :-1])[0, -scored:], window[0, -scored:], reduction="sum"))
        nll[name] = total / len(text.encode())
    return nll


def main(argv: list[str] | None = None) -> None:
    """The command line. A user's mistake is one line and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--evaluate", type=Path, metavar="DIR", help="held-out NLL per byte of this checkpoint, and nothing else")
    parser.add_argument("--shape", choices=SHAPES, default="gpu")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, help="of training, the cooldown included, compiling not")
    budget.add_argument("--steps", type=int)
    parser.add_argument("--grow", type=Path, metavar="DIR",
                        help="start from this smaller checkpoint: its weights, its tokenizer and two chat tokens")
    parser.add_argument("--resume", action="store_true", help="go on from WORK/resume.pt (written every 5 minutes), same budget")
    parser.add_argument("--data", type=Path, default=Path("data/train"), help="<source>.txt.xz, attribution (default: %(default)s)")
    parser.add_argument("--held-out", type=Path, default=Path("data/text"), help="<name>.txt (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("build/storyteller"), help="what is made (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.evaluate is None and not (args.minutes or 0) > 0 and not (args.steps or 0) > 0:
        parser.error("give --minutes or --steps, above 0")
    try:
        print(json.dumps(evaluate(args.evaluate, args.held_out) if args.evaluate else run(args), indent=1))
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prepare, train, export, evaluate, write the card -> figures."""
    shape, target = SHAPES[args.shape], args.work / "checkpoint"
    attribution = (args.data / "storybooks_ccby_ATTRIBUTION.txt").read_bytes()      # missing, it stops the run here
    report = prepare(args.data, args.held_out, args.work / "data", shape.vocab_size, args.grow and args.grow / "tokenizer.model")
    model, figures = train(args.work, shape, minutes=args.minutes, steps=args.steps, resume=args.resume, grow_from=args.grow)
    export(model, hf_config(shape), args.work / "data", target)
    (target / "ATTRIBUTION.txt").write_bytes(attribution)
    figures |= {"nll": evaluate(target, args.held_out), "nll_before": evaluate(EMBEDDED, args.held_out), "checkpoint": str(target),
                "grown": bool(args.grow),
                "options": f"--shape {args.shape}{' --grow DIR' if args.grow else ''} "
                           + (f"--minutes {args.minutes:g}" if args.minutes else f"--steps {args.steps}")}
    (target / "README.md").write_text(model_card(target, report, figures), encoding="utf-8")
    return figures


if __name__ == "__main__":
    main()
