"""A small llama with every tensor type, once as GGUF and once as Hugging Face would have it, for
tests/unit/test_checkpoint.c. Usage: make_checkpoint_gguf.py tests/data/checkpoint

Blocks are random bytes with small scales. q and k are stored as llama.cpp's converter orders them (rotary pairs side by
side); small.safetensors holds the dequantised values in Hugging Face's order, F32, under Hugging Face's names."""
import sys

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES
from safetensors.numpy import save_file

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB = 256, 2, 1, 16, 64, 12
SCALES = {T.Q8_0: [0], T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q4_K: [0, 2], T.Q5_K: [0, 2],
          T.Q6_K: [208]}
TENSORS = [  # GGUF name, Hugging Face name, rows, columns (0: one dimension), type
    ("token_embd.weight", "model.embed_tokens.weight", VOCAB, HIDDEN, T.Q6_K),
    ("output_norm.weight", "model.norm.weight", HIDDEN, 0, T.F32),
    ("output.weight", "lm_head.weight", VOCAB, HIDDEN, T.Q8_0),
    ("blk.0.attn_norm.weight", "model.layers.0.input_layernorm.weight", HIDDEN, 0, T.F32),
    ("blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight", HEADS * HEAD_DIM, HIDDEN, T.Q4_K),
    ("blk.0.attn_k.weight", "model.layers.0.self_attn.k_proj.weight", KV_HEADS * HEAD_DIM, HIDDEN, T.Q5_K),
    ("blk.0.attn_v.weight", "model.layers.0.self_attn.v_proj.weight", KV_HEADS * HEAD_DIM, HIDDEN, T.F16),
    ("blk.0.attn_q.bias", "model.layers.0.self_attn.q_proj.bias", HEADS * HEAD_DIM, 0, T.F32),
    ("blk.0.attn_k.bias", "model.layers.0.self_attn.k_proj.bias", KV_HEADS * HEAD_DIM, 0, T.F32),
    ("blk.0.attn_v.bias", "model.layers.0.self_attn.v_proj.bias", KV_HEADS * HEAD_DIM, 0, T.F32),
    ("blk.0.attn_output.weight", "model.layers.0.self_attn.o_proj.weight", 24, HEADS * HEAD_DIM, T.Q4_0),
    ("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight", HIDDEN, 0, T.F32),
    ("blk.0.ffn_gate.weight", "model.layers.0.mlp.gate_proj.weight", 16, HIDDEN, T.Q4_1),
    ("blk.0.ffn_up.weight", "model.layers.0.mlp.up_proj.weight", 16, HIDDEN, T.BF16),
    ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight", 24, FFN, T.Q5_0),
    ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight", 24, FFN, T.Q5_1),
]


def random_bytes(rng, kind, rows, cols):
    size, n_bytes = GGML_QUANT_SIZES[kind]
    if kind in SCALES:
        blocks = rng.integers(0, 256, (rows * cols // size, n_bytes), dtype=np.uint8)
        for at in SCALES[kind]:
            blocks[:, at : at + 2] = rng.normal(0, 0.02, len(blocks)).astype(np.float16).view(np.uint8).reshape(-1, 2)
        return blocks.reshape(rows, -1)
    values = rng.normal(0, 1, (rows, cols)).astype(np.float32)
    return values if kind == T.F32 else quants.quantize(values, kind)


def unpermute(values, heads):
    """Rows of GGUF's q and k in Hugging Face's order."""
    shape = values.shape
    return values.reshape(heads, shape[0] // heads // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(shape).copy()


def main(folder):
    rng = np.random.default_rng(3)
    writer = gguf.GGUFWriter(folder + "/small.gguf", "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    expected = {}
    for name, hf_name, rows, cols, kind in TENSORS:
        data = random_bytes(rng, kind, rows, cols or 1) if cols else rng.normal(0, 1, rows).astype(np.float32)
        values = data if kind == T.F32 else quants.dequantize(data, kind)
        if ".attn_q." in name:
            values = unpermute(values, HEADS)
        if ".attn_k." in name:
            values = unpermute(values, KV_HEADS)
        expected[hf_name] = values.astype(np.float32)
        if kind == T.F16:
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(expected, folder + "/small.safetensors")


main(sys.argv[1])
