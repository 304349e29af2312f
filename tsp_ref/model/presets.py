"""Models by name, each as what differs from the defaults of `Config`."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(hidden_size=64, num_layers=2, num_heads=8, num_kv_heads=8, ffn_size=128, seq_len=64, batch_size=2,
                 steps=20, warmup_steps=5, validation_batches=1),
    "small": {},
    "bench": dict(hidden_size=512, num_layers=4, num_heads=8, num_kv_heads=8, ffn_size=1408, seq_len=2048,
                  blocks=2, tiles=4, batch_size=1, steps=5, warmup_steps=1, learning_rate=3e-4),
    "smollm-135m": dict(vocab_size=49152, hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3, ffn_size=1536,
                        seq_len=2048, tied_head=True, blocks=3, batch_size=1, learning_rate=1e-3),
    "tinyllama-1.1b": dict(vocab_size=32000, hidden_size=2048, num_layers=22, num_heads=32, num_kv_heads=4,
                           ffn_size=5632, seq_len=2048, blocks=4, batch_size=1),
    "llama-3-8b": dict(vocab_size=128256, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8,
                       ffn_size=14336, seq_len=8192, rope_theta=500000.0, tiles=32, batch_size=1),
    "qwen3-0.6b": dict(vocab_size=151936, hidden_size=1024, num_layers=28, num_heads=16, num_kv_heads=8, head_dim=128,
                       ffn_size=3072, seq_len=32768, rope_theta=1000000.0, norm_eps=1e-6, tied_head=True, qk_norm=True,
                       tiles=128, batch_size=1),
    "7b": dict(vocab_size=32000, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=32, ffn_size=16384,
               seq_len=16384, blocks=32, tiles=64, batch_size=1),
}
"""`tiny` runs in seconds, `small` is the default, `bench` is for timing on 1 and 2 ranks (few, large blocks and
tiles are fast; more ranks need blocks=4 or 8), `7b` for planning: the paper's layers.

The models that have names of their own have the shapes of the `config.json` beside their model cards, and as many
blocks as key/value heads: HuggingFaceTB/SmolLM-135M, TinyLlama/TinyLlama-1.1B-Chat-v1.0, meta-llama/Meta-Llama-3-8B and
Qwen/Qwen3-0.6B. seq_len is the context length of the card; batches, steps and grids are ours."""

PLANNING_ONLY = ("tinyllama-1.1b", "llama-3-8b", "qwen3-0.6b", "7b")
"""Too large to compute with NumPy on one machine: for the formulas."""
