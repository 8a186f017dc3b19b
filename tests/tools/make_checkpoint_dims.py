"""Configs and what transformers makes of them, for tests/unit/test_dims.c.
Usage: make_checkpoint_dims.py tests/data/checkpoint/dims.json

Each case: {"name", "config", "generation"?, "want": {field: value}, "rope": [inverse frequencies]}. The configs are those
of well-known checkpoints and of what transformers writes, among them ones that omit most keys."""
import json
import sys
import tempfile

from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
          "rope_type": "llama3"}
CASES = {
    "llama, nothing given": ({"model_type": "llama"}, None),
    "llama-3.1-8b": ({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False,
                      "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu",
                      "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072,
                      "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 32,
                      "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_scaling": LLAMA3,
                      "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
                      "vocab_size": 128256},
                     {"bos_token_id": 128000, "do_sample": True, "eos_token_id": [128001, 128008, 128009],
                      "temperature": 0.6, "top_p": 0.9}),
    "linear, old form": ({"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}, "head_dim": 96,
                          "num_attention_heads": 7, "num_key_value_heads": 7, "hidden_size": 700,
                          "max_position_embeddings": 16384}, None),
    "rope_parameters": (LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, vocab_size=100,
                                    attention_bias=True, mlp_bias=True, tie_word_embeddings=True, dtype="float16",
                                    rope_parameters={"rope_theta": 250000.0, "rope_type": "linear", "factor": 2.5},
                                    ).to_dict(), {"eos_token_id": 7, "top_k": 20, "max_new_tokens": 64,
                                                  "repetition_penalty": 1.1}),
    "mistral-v0.2": ({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096,
                      "max_position_embeddings": 32768, "rope_theta": 1e6, "sliding_window": None,
                      "torch_dtype": "bfloat16"}, None),
    "llava-1.5-7b": ({"architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100,
                      "image_token_index": 32000, "model_type": "llava", "pad_token_id": 32001,
                      "projector_hidden_act": "gelu", "text_config": {
                          "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"],
                          "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05,
                          "torch_dtype": "float16", "vocab_size": 32064},
                      "tie_word_embeddings": False, "torch_dtype": "float16", "vision_config": {
                          "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
                          "model_type": "clip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 24,
                          "patch_size": 14, "projection_dim": 768, "vocab_size": 32000},
                      "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
                      "vocab_size": 32064}, {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 32001}),
    "llava, no vision_config": ({"model_type": "llava", "text_config": {"vocab_size": 33000}}, None),
    "llava of transformers 5": (LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=64, num_attention_heads=4, image_size=70, patch_size=16),
        text_config=LlamaConfig(hidden_size=64, num_attention_heads=4, vocab_size=300, tie_word_embeddings=True),
        image_token_index=5, vision_feature_select_strategy="full", vision_feature_layer=3,
        projector_hidden_act="gelu_pytorch_tanh", multimodal_projector_bias=False).to_dict(), None),
}


def text_fields(text):
    rope = text.rope_parameters
    want = {"vocab_size": text.vocab_size, "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size, "n_layers": text.num_hidden_layers,
            "n_heads": text.num_attention_heads, "n_kv_heads": text.num_key_value_heads, "head_dim": text.head_dim,
            "max_position_embeddings": text.max_position_embeddings, "rms_norm_eps": text.rms_norm_eps,
            "theta": rope["rope_theta"], "qkv_bias": int(getattr(text, "attention_bias", False)),
            "mlp_bias": int(getattr(text, "mlp_bias", False)), "tie_word_embeddings": int(text.tie_word_embeddings),
            "scaling": {"default": 0, "linear": 1, "llama3": 2}[rope["rope_type"]]}
    return want


def vision_fields(config):
    v = config.vision_config
    n = (v.image_size // v.patch_size) ** 2
    layer = config.vision_feature_layer
    return {"image_size": v.image_size, "patch_size": v.patch_size, "n_patches": n, "vision_hidden": v.hidden_size,
            "vision_intermediate": v.intermediate_size, "vision_layers": v.num_hidden_layers,
            "vision_heads": v.num_attention_heads, "layer_norm_eps": v.layer_norm_eps,
            "n_run_layers": layer if layer >= 0 else v.num_hidden_layers + 1 + layer,
            "n_image_tokens": n + (config.vision_feature_select_strategy == "full"),
            "image_token_id": config.image_token_index, "image_seq_length": config.image_seq_length,
            "projector_bias": int(config.multimodal_projector_bias)}


def main(path):
    out = []
    for name, (config, generation) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            with open(folder + "/config.json", "w") as f:
                json.dump(config, f, default=str)
            loaded = AutoConfig.from_pretrained(folder)
        with_vision = loaded.model_type == "llava"
        text = loaded.text_config if with_vision else loaded
        want = text_fields(text)
        if with_vision:
            want["tie_word_embeddings"] = int(loaded.tie_word_embeddings)
            want.update(vision_fields(loaded))
        rope = [float("%.9g" % x) for x in LlamaRotaryEmbedding(text).inv_freq.tolist()]
        case = {"name": name, "config": json.loads(json.dumps(config, default=str)), "want": want, "rope": rope}
        if generation:
            case["generation"] = generation
        out.append(case)
    with open(path, "w") as f:
        json.dump(out, f, indent=1)


main(sys.argv[1])
