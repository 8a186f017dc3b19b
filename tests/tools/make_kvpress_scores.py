"""Scores of kvpress's presses for one layer of a small random Llama, for tests/multirank/test_kvpress.
Usage: make_kvpress_scores.py tests/data/oracles/kvpress.json

Needs torch, transformers and kvpress. The file is {"inputs": {"layer": an input as the oracles' inputs.json has them, but
with Q before its rotation}, "rope_theta", "scores": {press: [KV head][token]}, "budgets": [...]}. Q, K and V come out of
the model and are rounded to int8 multiples; the presses are called on just these numbers."""
import base64
import json
import sys
from types import SimpleNamespace

import numpy as np
import torch
from kvpress import ExpectedAttentionPress, ObservedAttentionPress, PyramidKVPress, SnapKVPress, TOVAPress
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

H, G, D, M, LAYER, THETA = 8, 4, 16, 150, 1, 10000.0
WINDOW, KERNEL = 32, 5
SHOWN = 8  # digits


def build():
    torch.manual_seed(7)
    config = LlamaConfig(vocab_size=97, hidden_size=H * D, intermediate_size=160, num_hidden_layers=3, num_attention_heads=H,
                         num_key_value_heads=G, max_position_embeddings=1024, initializer_range=0.13,
                         attn_implementation="eager")
    model = LlamaForCausalLM(config).float().eval()
    for layer in model.model.layers:  # queries with a mean, as trained models have them
        layer.input_layernorm.weight.data += 0.3 * torch.randn(H * D)
    return model


def watch(model):
    """Q before its rotation, K after it, V of LAYER: [heads, M, D] as the model computes them."""
    seen, module = {}, model.model.layers[LAYER].self_attn
    for name in "qkv":
        getattr(module, name + "_proj").register_forward_hook(lambda m, i, out, name=name: seen.update({name: out[0].detach()}))
    ids = torch.randint(3, 97, (1, M), generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        model(ids)
    q, k, v = (seen[n].view(M, -1, D).transpose(0, 1) for n in "qkv")
    bias = torch.randn(H, 1, D, generator=torch.Generator().manual_seed(9))
    cos, sin = rotation(model, torch.arange(M))
    _, k = apply_rotary_pos_emb(k[None], k[None], cos, sin)
    return q + bias, k[0], v, cos, sin


def rotation(model, positions):
    return model.model.rotary_emb(torch.zeros(1), positions[None])


def rounded(x):
    """x as int8 multiples, and the record of them."""
    scale = float(2.0 ** np.ceil(np.log2(float(x.abs().max()) / 127)))
    codes = torch.round(x / scale).clamp(-127, 127).to(torch.int8)
    record = {"type": "i8", "shape": [1] + list(x.shape), "scale": scale,
              "base64": base64.b64encode(codes.numpy().tobytes()).decode()}
    return codes.float() * scale, record


def attention(q, k, cos, sin):
    """The layer's eager attention, [1, H, M, M]."""
    q, _ = apply_rotary_pos_emb(q[None], q[None], cos, sin)
    logits = q @ k.repeat_interleave(H // G, 0).transpose(1, 2) / D ** 0.5
    return (logits + torch.full((M, M), float("-inf")).triu(1)).softmax(-1)


def budgets():
    found = []
    for layers, tokens, ratio in ((32, 1000, 0.5), (32, 4000, 0.75), (4, 600, 0.5), (4, 600, 0.9), (3, 150, 0.2), (1, 500, 0.5)):
        press = PyramidKVPress(compression_ratio=ratio, window_size=WINDOW)
        config = SimpleNamespace(num_hidden_layers=layers)
        found.append({"layers": layers, "tokens": tokens, "ratio": ratio, "window": WINDOW, "beta": press.beta, "budgets": [
            press.get_layer_budget(SimpleNamespace(config=config, layer_idx=i), tokens) for i in range(layers)]})
    return found


def main(path):
    model = build()
    q, k, v, cos, sin = watch(model)
    (q, q_record), (k, k_record), (v, v_record) = rounded(q), rounded(k), rounded(v)
    module = model.model.layers[LAYER].self_attn
    module.q_proj, module.rotary_emb = torch.nn.Identity(), model.model.rotary_emb  # what the presses ask of a layer
    hidden, weights = q.transpose(0, 1).reshape(1, M, H * D), attention(q, k, cos, sin)
    presses = {"snapkv": SnapKVPress(window_size=WINDOW, kernel_size=KERNEL), "tova": TOVAPress(),
               "tova_per_kv_head": SnapKVPress(window_size=1, kernel_size=1), "observed": ObservedAttentionPress(),
               "expected": ExpectedAttentionPress(), "expected_epsilon": ExpectedAttentionPress(epsilon=0.01),
               "expected_near": ExpectedAttentionPress(n_future_positions=5, n_sink=0)}
    scores = {}
    for name, press in presses.items():
        with torch.no_grad():
            seen = press.score(module, hidden, k[None], v[None], weights if name == "observed" else None,
                               {"position_embeddings": (cos, sin)})
        scores[name] = [[float(f"%.{SHOWN}g" % x) for x in head] for head in seen[0].tolist()]
    layer = {"L": 1, "H": H, "G": G, "d": D, "m": M, "extra": 0, "q_first": 0, "spans": [], "last_turn_start": 0,
             "v_layers": [0], "Q": q_record, "K": k_record, "V": v_record}
    out = {"method": "kvpress", "format": 1, "inputs": {"layer": layer}, "rope_theta": THETA, "window": WINDOW,
           "kernel": KERNEL, "scores": scores, "budgets": budgets()}
    with open(path, "w") as f:
        json.dump(out, f, separators=(",", ":"))
        f.write("\n")


main(sys.argv[1])
