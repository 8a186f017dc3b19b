"""Tiny random models of every served shape, with transformers' logits, for tests/golden and tests/multirank.
Usage: make_golden_models.py tests/data/golden ORACLES_DIRECTORY [NAME ...]

Each <name>/ is a model directory plus golden.json: {"steps", "prompts": [{"ids", "images": [{"start", "seed"}], "tokens",
"logits", "compressed"?}]}: a prompt (image tokens written out; an image is bytes of a small generator, see pixels), the
greedy tokens of "steps" steps and the float32 logits they were chosen from, [steps, vocab] in base64; "compressed" is the
same with VL-Cache, an item as make_golden_answers.py writes them. The reference runs in float32 with eager attention on
the weights as they are stored, rounded to the file's dtype."""
import base64
import json
import os
import shutil
import sys

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import (CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig,
                          LlavaForConditionalGeneration, MistralConfig, MistralForCausalLM)

from make_golden_answers import Decoder, answer, keep_second, load_oracles

STEPS = 4
BUDGET = 0.3
IMAGE_TOKEN = 3
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64, "rope_theta": 10000.0}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}


def text(**changes):
    base = dict(vocab_size=131, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=4, max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=False,
                bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return {**base, **changes}


def tower(**changes):
    base = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, image_size=28,
                patch_size=7, projection_dim=16, hidden_act="quick_gelu")
    return {**base, **changes}


# name: (storage dtype, text model, its options, tower options or None, llava options, names of tensors, shards)
MODELS = {
    "mha": ("F32", "llama", text(), None, {}, None, 1),
    "gqa_tied": ("BF16", "llama", text(num_key_value_heads=2, tie_word_embeddings=True), None, {}, None, 1),
    "biases": ("F16", "llama", text(num_key_value_heads=2, attention_bias=True, mlp_bias=True), None, {}, None, 1),
    "rope_llama3": ("BF16", "llama", text(num_key_value_heads=2, rope_parameters=LLAMA3), None, {}, None, 1),
    "rope_linear": ("BF16", "llama", text(rope_parameters=LINEAR), None, {}, None, 1),
    "mistral": ("BF16", "mistral", text(num_key_value_heads=1, sliding_window=None), None, {}, None, 1),
    "head_dim": ("BF16", "llama", text(hidden_size=30, num_attention_heads=3, num_key_value_heads=3, head_dim=24), None, {}, None, 2),
    # heads that do not divide by the number of ranks, KV groups fewer than ranks, odd MLPs and vocabularies
    "heads_6": ("BF16", "llama", text(hidden_size=30, num_attention_heads=6, num_key_value_heads=3, head_dim=8, intermediate_size=57,
                                      num_hidden_layers=3, mlp_bias=True, attention_bias=True), None, {}, None, 1),
    "heads_7": ("BF16", "llama", text(hidden_size=28, num_attention_heads=7, num_key_value_heads=7, head_dim=8, intermediate_size=80,
                                      num_hidden_layers=3, vocab_size=127), None, {}, None, 1),
    "heads_9": ("BF16", "llama", text(hidden_size=36, num_attention_heads=9, num_key_value_heads=3, head_dim=8, intermediate_size=3,
                                      num_hidden_layers=5, tie_word_embeddings=True), None, {}, None, 2),
    "heads_14": ("BF16", "llama", text(hidden_size=28, num_attention_heads=14, num_key_value_heads=2, head_dim=8, vocab_size=129,
                                       intermediate_size=83, attention_bias=True), None, {}, None, 1),
    "heads_14_one_kv": ("F16", "llama", text(hidden_size=28, num_attention_heads=14, num_key_value_heads=1, head_dim=8), None, {},
                        None, 1),
    # LLaVA: tensor names before 4.52, from 4.52 on, and as transformers 5 writes them
    "llava": ("BF16", "llama", text(num_key_value_heads=2), tower(),
              dict(vision_feature_layer=-2, vision_feature_select_strategy="default"), "old", 2),
    "llava_full": ("F32", "llama", text(hidden_size=24, head_dim=8), tower(hidden_act="gelu", intermediate_size=20),
                   dict(vision_feature_layer=-1, vision_feature_select_strategy="full",
                        multimodal_projector_bias=False), "new", 1),
    "llava_layer": ("F16", "mistral", text(num_key_value_heads=2, sliding_window=None),
                    tower(image_size=30, hidden_act="gelu_pytorch_tanh", hidden_size=24),
                    dict(vision_feature_layer=1, vision_feature_select_strategy="default",
                         projector_hidden_act="gelu_pytorch_tanh"), "newest", 1),
    "llava_embeddings": ("BF16", "llama", text(hidden_size=28, num_attention_heads=7, num_key_value_heads=1, head_dim=8,
                                               tie_word_embeddings=True), tower(),
                         dict(vision_feature_layer=0, vision_feature_select_strategy="full"), "new", 1),
}
# prompts: numbers are runs of random text ids, "i" is an image
TEXT_PROMPTS = {"rope_llama3": [[180], [5]], "rope_linear": [[150], [2]]}
LLAVA_PROMPTS = [[4, "i", 9], ["i", "i", 3, "i", 2, "i", 20], [3, "i"], [12]]


def pixels(seed, n):
    out, x = np.empty(n, np.uint8), seed
    for i in range(n):
        x = (x * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        out[i] = x >> 56
    return out


def build(row):
    _, kind, options, vision, llava, _, _ = row
    text_config = (LlamaConfig if kind == "llama" else MistralConfig)(**options)
    if not vision:
        return (LlamaForCausalLM if kind == "llama" else MistralForCausalLM)._from_config(
            text_config, attn_implementation="eager")
    config = LlavaConfig(text_config=text_config, vision_config=CLIPVisionConfig(**vision), bos_token_id=1,
                         eos_token_id=2, image_token_index=IMAGE_TOKEN,
                         tie_word_embeddings=options["tie_word_embeddings"], **llava)
    return LlavaForConditionalGeneration._from_config(config, attn_implementation="eager")


def randomise(model, dtype, generator):
    """Values of a size that makes every part matter, as the file will hold them."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name and name.endswith("weight") or "layrnorm.weight" in name:
                value = 1 + 0.2 * noise
            elif p.dim() == 1 or "embed" in name:
                value = 0.3 * noise
            else:
                value = noise * 1.2 / np.sqrt(np.prod(p.shape[1:]))
            p.copy_(value.to(dtype).float())


def stored_names(model, names):
    state = {k: v for k, v in model.state_dict().items()
             if not (k == "lm_head.weight" and model.config.tie_word_embeddings)}
    if names is None:
        return state
    swap = {"old": [("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."),
                    ("model.vision_tower.", "vision_tower.vision_model."), ("model.multi_modal", "multi_modal")],
            "new": [("model.vision_tower.", "model.vision_tower.vision_model.")],
            "newest": [("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."),
                       ("model.vision_tower.", "vision_tower."), ("model.multi_modal", "multi_modal")]}[names]
    out = {}
    for key, value in state.items():
        for old, new in swap:
            if key.startswith(old):
                key = new + key[len(old):]
                break
        out[key] = value
    return out


def save(directory, model, row):
    dtype, _, _, vision, _, names, shards = row
    state = {k: v.to(DTYPES[dtype]).contiguous() for k, v in stored_names(model, names).items()}
    keys = list(state)
    if shards == 1:
        save_file(state, f"{directory}/model.safetensors", {"format": "pt"})
    else:
        files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
        place = {k: files[i % shards] for i, k in enumerate(keys)}  # neighbours lie in different files
        for file in files:
            save_file({k: v for k, v in state.items() if place[k] == file}, f"{directory}/{file}", {"format": "pt"})
        size = sum(v.numel() * v.element_size() for v in state.values())
        with open(f"{directory}/model.safetensors.index.json", "w") as f:
            json.dump({"metadata": {"total_size": size}, "weight_map": place}, f, indent=0)
    config = model.config.to_diff_dict()
    config["torch_dtype"] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype]
    for key in ("dtype", "transformers_version", "_name_or_path"):
        config.pop(key, None)
    with open(f"{directory}/config.json", "w") as f:
        json.dump(config, f, indent=1, sort_keys=True)
    if vision:
        size = vision["image_size"]
        with open(f"{directory}/preprocessor_config.json", "w") as f:
            json.dump({"image_processor_type": "CLIPImageProcessor", "do_resize": True,
                       "size": {"shortest_edge": size}, "resample": 3, "do_center_crop": True,
                       "crop_size": {"height": size, "width": size}, "do_rescale": True,
                       "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": MEAN, "image_std": STD}, f)


def make_prompt(shape, row, rng):
    _, _, options, vision, llava, _, _ = row
    ids, images = [], []
    for part in shape:
        if part != "i":
            ids += [int(x) for x in rng.integers(4, options["vocab_size"], part)]
            continue
        n = (vision["image_size"] // vision["patch_size"]) ** 2
        n += llava["vision_feature_select_strategy"] == "full"
        images.append({"start": len(ids), "seed": int(rng.integers(1, 1 << 30))})
        ids += [IMAGE_TOKEN] * n
    return ids, images


def pixel_values(images, side):
    raw = np.stack([pixels(i["seed"], side * side * 3).reshape(side, side, 3) for i in images])
    value = (torch.tensor(raw).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    return value.permute(0, 3, 1, 2).contiguous()


def reference(model, ids, given, oracle):
    """Tokens, logits and the compressed item; None where some choice is not clear enough to demand it."""
    tokens, logits = [], []
    for _ in range(STEPS):  # no cache: each step is the whole prompt anew
        last = model(input_ids=torch.tensor([ids + tokens]), use_cache=False, **given).logits[0, -1]
        best = torch.topk(last, 2).values
        if best[0] - best[1] < 0.05 * last.std():
            return None
        tokens.append(int(last.argmax()))
        logits.append(last.float().numpy())
    if len(ids) < 20:
        return tokens, np.stack(logits), None
    inner = model.model.language_model if given else model.model
    embeds, spans = inner.embed_tokens(torch.tensor([ids])), []
    if given:
        features = model.model.get_image_features(**given).pooler_output
        at = [i for i, token in enumerate(ids) if token == IMAGE_TOKEN]
        embeds[0, at] = torch.cat(list(features))
        n = len(at) // len(features)
        spans = [[at[i], at[i] + n] for i in range(0, len(at), n)]
    item = answer(Decoder(inner, model.lm_head), oracle, embeds, spans, BUDGET, [], STEPS, len(last))
    if item["doubtful"] or min(item["margins"]) < 0.05 * item["std"]:
        return None
    item["logits"] = keep_second(item["logits"], len(last))
    return tokens, np.stack(logits), item


def make(name, row, root, oracle):
    directory = f"{root}/{name}"
    vision, llava = row[3:5]
    shutil.rmtree(directory, ignore_errors=True)
    os.makedirs(directory)
    seed = sum(map(ord, name))
    model = build(row).eval()
    randomise(model, DTYPES[row[0]], torch.Generator().manual_seed(seed))
    model.tie_weights()
    if vision and llava["vision_feature_layer"] == 0:  # transformers 5.23 takes 0 for none: counted from the end instead
        model.config.vision_feature_layer = -1 - vision["num_hidden_layers"]
    rng = np.random.default_rng(seed)
    prompts = []
    for shape in LLAVA_PROMPTS if vision else TEXT_PROMPTS.get(name, [[40], [7], [1]]):
        for _ in range(200):
            ids, images = make_prompt(shape, row, rng)
            given = {"pixel_values": pixel_values(images, vision["image_size"])} if images else {}
            found = reference(model, ids, given, oracle)
            if found:
                break
        else:
            raise SystemExit(f"{name}: no prompt with a clear choice at every step")
        tokens, logits, compressed = found
        prompts.append({"ids": ids, "images": images, "tokens": tokens,
                        "logits": base64.b64encode(logits.astype("<f4").tobytes()).decode()})
        if compressed:
            prompts[-1]["compressed"] = {"id": name, **compressed}
    if vision:
        model.config.vision_feature_layer = llava["vision_feature_layer"]
    save(directory, model, row)
    with open(f"{directory}/golden.json", "w") as f:
        json.dump({"steps": STEPS, "prompts": prompts}, f)
    print(name, sum(os.path.getsize(f"{directory}/{x}") for x in os.listdir(directory)), "bytes", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for wanted in sys.argv[3:] or MODELS:
        make(wanted, MODELS[wanted], sys.argv[1], load_oracles(sys.argv[2]))
