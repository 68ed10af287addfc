"""What the recipe publishes: a trained Transformer as a folder in Hugging Face Llama form, with its card and samples.

Contract: `export` writes what `weights.load_model`, `load_tokenizer` and transformers read; the weights go through the loader's own
name table, the other way round, and are rounded to bf16. Trap: figures in the card must be those of the rounded weights, so it is
written from the folder and not from the model in memory.
"""
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from engine import Engine, SamplingParams
from model import Transformer
from tokenizer import ChatTemplate, load_tokenizer, sampling_settings
from weights import load_model
from weights.names import tensor_slots
from weights.storyteller.prepare import ASSISTANT, COPIES, USER

EVAL_CHARACTERS, EVAL_CONTEXT = 150_000, 512        # of each held-out text; 512 tokens: all that the first checkpoint had
# The space stands for the dummy prefix that requests and stories were tokenized with; "legacy": false keeps a second one away.
TEMPLATE = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '" + USER + " ' + m['content'] }}"
            "{% elif m['role'] == 'assistant' %}{{ '" + ASSISTANT + " ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}")
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}        # less runs in circles, more is hard to follow
SAMPLES = ("Once upon a time", "The little dragon was afraid of the dark.", "One day, Lily and Ben went to the sea.")
CONVERSATIONS = ("Tell me a story about a fox named Rusty in the forest.", "The hero is Mia. It happens at the beach.")


def export(model: Transformer, config: dict[str, Any], data: Path, directory: Path) -> None:
    """The folder that `weights.load_model` and transformers read: the name table the other way round, bf16."""
    directory.mkdir(parents=True, exist_ok=True)
    parameters = dict(model.named_parameters())
    tensors = {name: parameters[p].detach()[index].to("cpu", torch.bfloat16).contiguous()
               for name, (p, index) in tensor_slots(model.config, ()).items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(data / "tokenizer.model", directory / "tokenizer.model")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    for name, content in {
            "config.json": config,
            "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "max_length": config["max_position_embeddings"], **SAMPLING},
            "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "add_eos_token": False,
                                      **special, "chat_template": TEMPLATE}}.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def samples(directory: Path, *, max_new_tokens: int = 200) -> str:
    """Unedited continuations, greedy and sampled by the checkpoint's own settings (seeds 0, 1, ...), as Markdown."""
    tokenizer = load_tokenizer(directory)
    chat = ChatTemplate.from_checkpoint(directory, tokenizer)
    asked = [(text, tokenizer.encode(text)) for text in SAMPLES]
    asked += [(f"(chat) {text}", chat.encode([{"role": "user", "content": text}])) for text in CONVERSATIONS]
    longest, stop = max(len(ids) for _, ids in asked), (tokenizer.eos_id,)
    engine, parts = Engine.from_pretrained(directory, dtype=torch.float32, max_seq_len=longest + max_new_tokens), []
    for seed, (text, ids) in enumerate(asked):
        for how, settings in (("greedy", {}), (f"sampled, seed {seed}", sampling_settings(directory))):
            params = SamplingParams(max_new_tokens=max_new_tokens, seed=seed, stop_ids=stop, **settings)
            new = [token for step in engine.generate([ids], params) for _, token in step.tokens]
            reply = tokenizer.decode(new, continues=True).replace("\n", "\n> ")
            parts.append(f"**{text}** ({how})\n>{'' if reply.startswith(' ') else ' '}{reply}\n")
    return "\n".join(parts)


def model_card(directory: Path, report: dict[str, Any], figures: dict[str, Any]) -> str:
    """README.md of the folder. report: of `prepare`; figures: of `train`; nll, nll_before (embedded now): nats per byte by text."""
    model, mb = load_model(directory), (directory / "model.safetensors").stat().st_size / 1e6
    c, millions = model.config, sum(p.numel() for p in model.parameters()) / 1e6
    data = "\n".join(f"| {s} | {r['documents']:,} | {r['tokens']:,} | {figures['epochs'][s]:.2f} |" for s, r in report["sources"].items())
    held = "\n".join(f"| {name} | {nats:.4f} | {nats / math.log(2):.4f} | {figures['nll_before'][name]:.4f} |"
                     for name, nats in figures["nll"].items())
    origin = "\nDIR: the checkpoint before this one.\n" if figures["grown"] else ""
    curve = "\n".join(f"| {tokens:,} | {length} | {loss:.3f} |" for tokens, length, loss in figures["curve"])
    return f"""# storyteller

A story model of {millions:.1f} M parameters ({mb:.1f} MB in bf16) in Llama format: {c.n_layer} layers, {c.n_head} query and
{c.n_kv_head} kv heads of {c.head_dim}, width {c.dim}, MLP {c.intermediate_size}, vocabulary {c.vocab_size},
context {c.max_position_embeddings}. It writes simple stories in English and knows nothing else.

Made by `python -m weights.storyteller.train {figures['options']}`: {figures['steps']:,} steps, {figures['tokens']:,} tokens,
{figures['minutes']:.0f} minutes on {figures['device']}. Muon and AdamW, trapezoidal schedule; sequences become longer, up to the context.
{origin}
## Data
| source | documents | tokens | times read |
|---|---|---|---|
{data}

novels, children_classics: before 1930, public domain in the US. simple_stories: excerpts of TinyStories (Eldan and Li,
CDLA-Sharing-1.0), African Storybook and Pratham Books stories (CC BY; authors, illustrators, translators: ATTRIBUTION.txt).
requests: those stories after a request made by rule from their own opening (hero, place), for `--chat`. Both hold each story
{COPIES} times, all but the first with other names for its girls and boys; "times read" counts any of them.
Documents removed, as they share {report['overlap_words']} words in a row with a held-out text: {len(report['removed'])}.

## Loss curve
Nats per token of the mixture at that point of the run (it becomes simpler), means between the rows.

| tokens seen | sequence | loss |
|---|---|---|
{curve}

## Held-out NLL per byte
By `--evaluate`: the first {EVAL_CHARACTERS:,} characters of each text, fp32, at most {EVAL_CONTEXT} tokens of context.

| text | nats | bits | nats, the checkpoint before |
|---|---|---|---|
{held}

## Samples, unedited
{samples(directory)}"""
