"""Other engines on our weights: which can run here, and the caches of Hugging Face transformers (gpt-fast: gpt_fast.py).

A transformers peer shares the parameters themselves; prompts, dtype, threads and process layout are those of our own cells.

Contract: `Peer.generate` yields the engine's Steps for greedy decoding of a batch of prompts of one length, each step synchronised.
StaticCache decodes compiled where our engine does, as its documentation shows; the others grow as they decode and run eagerly.
Trap: transformers builds rotary tables outside the parameters, so a model made on "meta" needs them made anew. All rows pass
their prompts at once, so under --fill-memory what a prompt needs, not the cache, may bound a peer's rows.
"""
import importlib.util
import time
from collections.abc import Iterator, Sequence

import torch

from engine.measure.gpt_fast import check_checkout, why_not
from engine.sampling import SamplingParams
from engine.stats import Step
from model import ModelConfig, Transformer
from weights.names import tensor_slots

PEERS = {"transformers": 0, "gpt-fast": 1}              # name -> words after it
COMPILED = ("StaticCache", "gpt-fast")                  # the peers whose own documentation compiles the step
Peered = tuple[str, str | None]                         # a cache class of transformers or "gpt-fast", and its folder


def read_peers(given: Sequence[Sequence[str]], config: ModelConfig, capacity: int,
               batches: Sequence[int]) -> tuple[list[Peered], list[str]]:
    """--peer as given, [["transformers"], ["gpt-fast", DIR]] -> what can run here, and a line for each that cannot."""
    peers: list[Peered] = []
    notes: list[str] = []
    for name, *rest in given:
        if name not in PEERS:
            raise ValueError(f"--peer {name!r} is not known; give transformers, or gpt-fast DIR")
        if len(rest) != PEERS[name]:
            raise ValueError(f"--peer {' '.join([name, *rest])}: {name} takes {PEERS[name]} words more, got {len(rest)}; "
                             "write --peer transformers, --peer gpt-fast DIR, or both")
        if name == "transformers":
            kinds, missing = available_caches()
            peers += [(kind, None) for kind in kinds]
            notes += missing
            continue
        check_checkout(rest[0])
        why = why_not(config, capacity) or (None if 1 in batches else "it decodes one row here, and 1 is not among --batch-sizes")
        if why:
            notes.append(f"gpt-fast is left out: {why}")
        else:
            peers.append((name, rest[0]))
    return peers, notes


def available_caches() -> tuple[list[str], list[str]]:
    """Cache classes of transformers that can run here, and a line for each that cannot. ValueError without transformers."""
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("--peer transformers needs the library, which is not installed; pip install transformers, or leave --peer out")
    if quantizer() is None:
        return ["StaticCache", "DynamicCache"], ["transformers QuantizedCache is left out: neither optimum-quanto nor hqq is installed"]
    return ["StaticCache", "DynamicCache", "QuantizedCache"], []


def quantizer() -> str | None:
    """A backend of QuantizedCache whose package is installed."""
    from transformers.utils import is_hqq_available, is_optimum_quanto_available
    return "quanto" if is_optimum_quanto_available() else "hqq" if is_hqq_available() else None


class Peer:
    """A transformers model over `model`'s own parameters, with one of its caches: StaticCache, DynamicCache, QuantizedCache (4 bit)."""

    def __init__(self, model: Transformer, kind: str, *, checkpoint: str | None, capacity: int, compile: bool) -> None:
        """checkpoint None: the config is made from the model's own."""
        import transformers
        config = transformers.AutoConfig.from_pretrained(checkpoint) if checkpoint else named_hf_config(model.config)
        self.device = model.embed.weight.device
        with torch.device("meta"):
            self.model = transformers.AutoModelForCausalLM.from_config(config, dtype=model.embed.weight.dtype).eval()
        share_parameters(self.model, model)
        with torch.device(self.device):
            self.model.model.rotary_emb = type(self.model.model.rotary_emb)(config)
        if kind == "StaticCache":
            self.cache = transformers.StaticCache(config=config, max_cache_len=capacity)
        self.new_cache = {"StaticCache": lambda: self.cache, "DynamicCache": lambda: transformers.DynamicCache(config=config),
                          "QuantizedCache": lambda: transformers.QuantizedCache(quantizer(), config=config, nbits=4)}[kind]
        options = {"mode": "reduce-overhead"} if self.device.type == "cuda" else {}
        self.step = torch.compile(self.feed, dynamic=False, **options) if compile and kind == "StaticCache" else self.feed

    def feed(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [B, T] after what the cache holds -> the likeliest next id [B, 1]."""
        return self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> Iterator[Step]:
        self.cache, n_new, begin = self.new_cache(), params[0].max_new_tokens, time.perf_counter()
        self.cache.reset()
        token = torch.tensor(prompts, device=self.device)
        for i in range(n_new):
            t = time.perf_counter()
            if i:
                torch.compiler.cudagraph_mark_step_begin()
            token = (self.step if i else self.feed)(token).clone()      # a graph's output is overwritten by its next replay
            ids = token[:, 0].tolist()
            now, fed = time.perf_counter(), len(prompts) * (1 if i else len(prompts[0]))
            yield Step("decode" if i else "prefill", list(enumerate(ids)), [], fed, now - t, now - begin, True)

    def kv_bytes(self) -> int | None:
        """Of K and V as allocated; None where the cache keeps them in objects of another library."""
        layers = self.cache.layers
        if any(hasattr(layer, "_quantized_keys") for layer in layers):
            return None
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


def share_parameters(peer: torch.nn.Module, model: Transformer) -> None:
    """Point the peer's parameters at ours; `tensor_slots` says which slice is which, as for a checkpoint's files."""
    names, parameters = peer.state_dict().keys(), dict(model.named_parameters())
    state = {name: parameters[own][index] for name, (own, index) in tensor_slots(model.config, names).items()}
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"] = model.embed.weight
    peer.load_state_dict(state, assign=True)
    peer.requires_grad_(False)


def named_hf_config(c: ModelConfig):
    """The transformers config of a NAMED_CONFIGS entry (plain rotary positions)."""
    from transformers import AutoConfig
    keys = {"vocab_size": c.vocab_size, "hidden_size": c.dim, "intermediate_size": c.intermediate_size, "num_hidden_layers": c.n_layer,
            "num_attention_heads": c.n_head, "num_key_value_heads": c.n_kv_head, "max_position_embeddings": c.max_position_embeddings,
            "rms_norm_eps": c.norm_eps, "tie_word_embeddings": c.tie_word_embeddings, "pad_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": c.rope.theta}}
    if c.family != "llama":
        keys["sliding_window"] = c.sliding_window
    if c.family != "phi3":
        keys["head_dim"] = c.head_dim
    if c.n_expert:
        keys |= {"num_local_experts": c.n_expert, "num_experts_per_tok": c.n_expert_per_token}
    return AutoConfig.for_model(c.family, **keys)
