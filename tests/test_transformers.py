"""The model against the classes that people load such checkpoints into: transformers' Llama, Qwen2 and Qwen3, scaled
down, with the same random weights, in float64. Nothing is downloaded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import cut, perturbed_parameters, random_batch

from tsp_ref.model.config import Config, make_config
from tsp_ref.model.model import Model
from tsp_ref.model.parameters import zero_parameters
from tsp_ref.reference import naive, single

WHY = "transformers, to compare with, is not installed: pip install -e '.[transformers]'"
transformers = pytest.importorskip("transformers", reason=WHY)
torch = pytest.importorskip("torch", reason=WHY)

CLOSE = 1e-10
SMALL = dict(dtype="float64", num_layers=2, hidden_size=48, ffn_size=96, seq_len=32, tiles=4, blocks=2, batch_size=2,
             num_heads=8, num_kv_heads=4)
LLAMA_3 = dict(rope_theta=500000.0, rope_factor=8.0, rope_original_length=16)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "Llama 3.1, whose rope is scaled": ("Llama", LLAMA_3),
    "Llama with a tied head and an odd vocabulary": ("Llama", dict(tied_head=True, vocab_size=257)),
    "Qwen2, with biases": ("Qwen2", dict(qkv_bias=True, norm_eps=1e-6)),
    "Qwen3, with norms of larger heads": ("Qwen3", dict(qk_norm=True, head_dim=10, norm_eps=1e-6, tied_head=True)),
}


def theirs_of(family: str, config: Config) -> Any:
    """Their model of the same shape."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_factor != 1:
        rope |= {"rope_type": "llama3", "factor": config.rope_factor, "low_freq_factor": config.rope_low_freq_factor,
                 "high_freq_factor": config.rope_high_freq_factor,
                 "original_max_position_embeddings": config.rope_original_length}
    shape = getattr(transformers, f"{family}Config")(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads,
        intermediate_size=config.ffn_size, max_position_embeddings=config.seq_len, rope_parameters=rope,
        rms_norm_eps=config.norm_eps, tie_word_embeddings=config.tied_head, attn_implementation="eager",
        pad_token_id=None, **({} if family == "Qwen2" else {"head_dim": config.head_dim}))
    return getattr(transformers, f"{family}ForCausalLM")(shape).to(torch.float64)


def by_their_names(config: Config, weights: naive.Weights) -> dict[str, np.ndarray]:
    """Weights, or gradients, of the textbook model under the names of their parameters: matrices transposed."""
    h, e = config.hidden_size, config.head_dim
    found = {"model.embed_tokens.weight": weights["embedding"], "model.norm.weight": weights["gains"][-1, :h]}
    if weights["head"] is not None:
        found["lm_head.weight"] = weights["head"]
    for layer, w in enumerate(weights["layers"]):
        at, (attention, mlp) = f"model.layers.{layer}.", weights["gains"][2 * layer : 2 * layer + 2]
        found[at + "input_layernorm.weight"] = attention[:h]
        found[at + "post_attention_layernorm.weight"] = mlp[:h]
        for field, name in (("wq", "self_attn.q_proj"), ("wk", "self_attn.k_proj"), ("wv", "self_attn.v_proj"),
                            ("wo", "self_attn.o_proj"), ("gate", "mlp.gate_proj"), ("up", "mlp.up_proj"),
                            ("down", "mlp.down_proj")):
            found[f"{at}{name}.weight"] = w[field].T
        if config.qkv_bias:
            found |= {f"{at}self_attn.{part}_proj.bias": w[f"b{part}"] for part in "qkv"}
        if config.qk_norm:
            found[at + "self_attn.q_norm.weight"] = attention[h : h + e]
            found[at + "self_attn.k_norm.weight"] = attention[h + e :]
    return found


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their code turns norms, softmax and angles to float32, whatever the model is in: here to float64."""
    for name in ("float", "float32"):
        monkeypatch.setattr(torch, name, torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_every_gradient_are_those_of_transformers(name: str) -> None:
    family, options = MODELS[name]
    config = make_config("tiny", **{**SMALL, **options})
    model = Model(config, np)
    weights, gradients = perturbed_parameters(model), zero_parameters(model, "gradients")
    tokens, targets = random_batch(config)
    loss, saved = single.model_forward(model, weights, cut(model, tokens), cut(model, targets))
    single.model_backward(model, saved, weights, gradients)

    theirs = theirs_of(family, config)
    named = dict(theirs.named_parameters())
    ours = by_their_names(config, naive.assemble(config, weights))
    assert set(ours) == set(named)
    with torch.no_grad():
        for key, parameter in named.items():
            parameter.copy_(torch.from_numpy(ours[key].copy()))
    logits = theirs(torch.from_numpy(tokens)).logits
    their_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).flatten())
    their_loss.backward()

    gaps = {"loss": abs(loss - their_loss.item()) / their_loss.item()}
    for key, gradient in by_their_names(config, naive.assemble(config, gradients)).items():
        wanted = named[key].grad.numpy()
        gaps[key] = np.max(np.abs(gradient - wanted)) / np.max(np.abs(wanted))
    print(f"{name}: loss {gaps['loss']:.1e}, worst gradient {max(gaps.values()):.1e} of its largest entry")
    assert {key: gap for key, gap in gaps.items() if not gap < CLOSE} == {}
