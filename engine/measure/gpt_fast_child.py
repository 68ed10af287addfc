"""The process that runs a checkout of gpt-fast: started by gpt_fast.py with the checkout on PYTHONPATH, imports nothing of ours.

Contract: the first JSON line on stdin sets it up, each further one asks for a greedy run of a prompt; each is answered with one JSON line.
What the checkout itself prints goes to stderr. Trap: it has no greedy mode; temperature 0 divides the logits by 1e-5.
"""
import inspect
import json
import resource
import sys
import time

answers, sys.stdout = sys.stdout, sys.stderr


def main() -> None:
    import torch

    import generate
    from model import ModelArgs, Transformer
    setup = json.loads(sys.stdin.readline())
    device = torch.device(setup["device"])
    torch.set_num_threads(setup["threads"])
    with torch.device("meta"):
        model = Transformer(ModelArgs(**setup["args"]))
    model.load_state_dict(torch.load(setup["weights"], weights_only=True), assign=True)
    model = model.to(device).eval()
    with torch.device(device):
        model.setup_caches(max_batch_size=1, max_seq_length=setup["capacity"])
    decode = generate.decode_one_token
    if setup["compile"]:
        decode = torch.compile(decode, mode="reduce-overhead", fullgraph=True)      # as its own main does
    reply({})
    for line in sys.stdin:
        request = json.loads(line)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        tokens, seconds = run(generate, model, decode, request["prompt"], request["new_tokens"], device)
        caches = [layer.attention.kv_cache for layer in model.layers]
        peak = (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
        reply({"tokens": tokens, "seconds": seconds, "kv_bytes": sum(x.nbytes for cache in caches for x in cache.buffers()),
               "peak_bytes": peak})


def run(generate, model, decode, prompt: list[int], n: int, device) -> tuple[list[int], list[float]]:
    """Its prefill, then its decode_one_token n - 1 times, as its decode_n_tokens does -> ids, and seconds of each with its id read."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    tokens, seconds = [], []
    begin = time.perf_counter()

    def note(token) -> None:
        nonlocal begin
        tokens.append(token.item())
        now = time.perf_counter()
        seconds.append(now - begin)
        begin = now

    with torch.no_grad():
        position = torch.arange(len(prompt), device=device)
        token = generate.prefill(model, torch.tensor(prompt, device=device).view(1, -1), position, temperature=0.0).clone()
        note(token)
        mask, forms = (), [SDPBackend.MATH]       # before it took flex_attention, in 2024, it let the compiler write attention
        if "block_mask" in inspect.signature(generate.decode_one_token).parameters:
            size, forms = model.max_seq_length, list(SDPBackend.__members__.values())
            mask = (generate.create_block_mask(generate.causal_mask, 1, 1, size, size, device=device),)
        position = torch.tensor([len(prompt)], device=device, dtype=torch.int)
        begin = time.perf_counter()
        with sdpa_kernel(forms):
            for _ in range(n - 1):
                token = decode(model, token.view(1, -1), position, *mask, temperature=0.0)[0].clone()
                position += 1
                note(token)
    return tokens, seconds


def reply(answer: dict) -> None:
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    try:
        main()
    except Exception as error:      # of the checkout: it may raise anything, and the parent waits for a line
        reply({"error": " ".join(str(error).split())[:300] or type(error).__name__})
