"""Writes NARROW and DEEP, the random Llama checkpoints on which docs/speed.md measures long contexts (needs transformers)."""
from transformers import LlamaConfig, LlamaForCausalLM


def make(name: str, *, layers: int, heads: int, dim: int, mlp: int, positions: int) -> None:
    config = LlamaConfig(vocab_size=512, hidden_size=dim, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
                         num_key_value_heads=heads, head_dim=128, max_position_embeddings=positions)
    LlamaForCausalLM(config).bfloat16().save_pretrained(name)


if __name__ == "__main__":
    make("NARROW", layers=4, heads=2, dim=256, mlp=512, positions=8192)
    make("DEEP", layers=32, heads=1, dim=32, mlp=32, positions=32768)
