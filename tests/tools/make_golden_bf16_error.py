"""What transformers itself loses in 16 bits, for tests/cuda/test_cuda_logits: bf16_error.json beside the golden files.
Usage: make_golden_bf16_error.py tests/data/golden MODEL_DIRECTORY OUT.json

{"cases": {NAME: {"dtype", "relative", "largest"}}}: the logits of transformers' model in the dtype that a GPU serves it in
(float16 for float16 files, else bfloat16) against its float32 logits as the golden files hold them, the golden tokens
given: ||difference|| / ||logits|| of each prompt (of demo.json those with the full cache) and the largest |difference| of
all. Of eager and SDPA attention, the one that loses less over all prompts.

"smollm2_shape" besides: a random model of SmolLM2-135M's shape (fill; tests/random_checkpoint.h makes the same numbers)
has "tokens", float32's greedy ones after a prompt of random ids, and "margins", the distance of its two best logits."""
import base64
import glob
import json
import sys

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

from make_golden_models import DTYPES, MEAN, MODELS, STD, build, pixel_values, stored_names

SHAPE = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
             num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=100000.0,
             tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2)
SEED, PROMPT, ANSWER = 2, 64, 32


def cast(model, dtype):
    """As from_pretrained(dtype=...) would have it: RoPE's frequencies stay float32."""
    kept = [(m, name, b.clone()) for m in model.modules() for name, b in m.named_buffers(recurse=False) if "inv_freq" in name]
    model.to(dtype)
    for module, name, buffer in kept:
        setattr(module, name, buffer)
    return model


def last_logits(model, ids, n, given):
    given = {k: v.to(model.dtype) for k, v in given.items()}
    return model(input_ids=torch.tensor([ids]), use_cache=False, **given).logits[0, -n:].float().numpy()


class Loss:
    """Sums the distance of some logits from others."""

    def __init__(self):
        self.wrong = self.all = self.largest = 0.0

    def add(self, got, want):
        difference = got.astype(np.float64) - want
        self.wrong += float((difference ** 2).sum())
        self.all += float((want.astype(np.float64) ** 2).sum())
        self.largest = max(self.largest, float(np.abs(difference).max()))

    def relative(self):
        return (self.wrong / self.all) ** 0.5


def rounded(x):
    return float(f"{x:.4g}")


def lose(name, model, dtype, prompts):
    """prompts: [(ids with all tokens but the last, number of rows, what else the model is given, float32 logits)]."""
    exact = Loss()
    for ids, n, given, want in prompts:
        exact.add(last_logits(model, ids, n, given), want)
    assert exact.relative() < 1e-4, (name, exact.relative())  # this is the model that the golden file is of
    cast(model, dtype)
    best = None
    for kind in "eager", "sdpa":
        model.set_attn_implementation(kind)
        loss, each = Loss(), []
        for ids, n, given, want in prompts:
            one, got = Loss(), last_logits(model, ids, n, given)
            one.add(got, want)
            loss.add(got, want)
            each.append(rounded(one.relative()))
        print(f"{name} {kind}: {loss.relative():.4g}, at most {loss.largest:.4g}", flush=True)
        if best is None or loss.relative() < best[0]:
            best = loss.relative(), {"dtype": str(dtype)[6:], "relative": each, "largest": rounded(loss.largest)}
    return best[1]


def floats(item, width):
    return np.frombuffer(base64.b64decode(item["logits"]), "<f4").reshape(-1, width)


def tiny(name, row, root):
    model = build(row).eval()
    stored = {}
    for file in glob.glob(f"{root}/{name}/*.safetensors"):
        stored.update(load_file(file))
    for key, value in stored_names(model, row[5]).items():
        value.copy_(stored.pop(key).float())
    assert not stored, list(stored)
    model.tie_weights()
    vision = row[3]
    if vision and row[4]["vision_feature_layer"] == 0:  # as in make_golden_models
        model.config.vision_feature_layer = -1 - vision["num_hidden_layers"]
    with open(f"{root}/{name}/golden.json") as f:
        golden = json.load(f)
    prompts = []
    for p in golden["prompts"]:
        given = {"pixel_values": pixel_values(p["images"], vision["image_size"])} if p["images"] else {}
        prompts.append((p["ids"] + p["tokens"][:-1], len(p["tokens"]), given, floats(p, row[2]["vocab_size"])))
    return lose(name, model, torch.float16 if DTYPES[row[0]] == torch.float16 else torch.bfloat16, prompts)


def demo(root, directory):
    model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    with open(f"{directory}/dev-eval/questions.jsonl") as f:
        lines = {line["id"]: line for line in map(json.loads, f)}
    with open(f"{root}/demo.json") as f:
        items = [item for item in json.load(f)["items"] if item["budget"] == 1]
    prompts = []
    for item in items:
        line, ids = lines[item["id"]], []
        for token in tokenizer(line["prompt"]).input_ids:
            ids += [token] * (576 if token == 3 else 1)
        assert len(ids) == item["prompt_tokens"]
        raw = np.stack([np.asarray(Image.open(f"{directory}/dev-eval/{p}").convert("RGB")) for p in line["images"]])
        value = ((torch.tensor(raw).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
        want = floats(item, model.config.text_config.vocab_size)
        prompts.append((ids + item["tokens"][:len(want) - 1], len(want), {"pixel_values": value}, want))
    return lose("demo", model, torch.bfloat16, prompts)


def splitmix(x):
    z = x + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return z ^ z >> np.uint64(31)


def normals(seed, name, count):
    """The engine's generator of random weights (kernels/cpu/fill.c), float32."""
    key = 0xcbf29ce484222325
    for byte in name.encode():
        key = (key ^ byte) * 0x100000001b3 % (1 << 64)
    one = lambda x: splitmix(np.array([x], np.uint64))
    key = splitmix(one(seed) ^ one(key))
    bits = splitmix(key ^ splitmix(np.arange(count, dtype=np.uint64)))
    total = np.zeros(count, np.int32)
    for shift in 0, 16, 32, 48:
        total += (bits >> np.uint64(shift) & np.uint64(0xffff)).astype(np.int32)
    return (total - 131070).astype(np.float32) * (np.float32(1) / np.float32(37837.227))


def fill(model):
    """Each layer counts, attention is neither even nor on one token; rounded to bfloat16."""
    for name, p in model.named_parameters():
        noise = normals(SEED, name, p.numel()).reshape(p.shape)
        if "norm" in name:
            value = np.float32(1) + np.float32(0.2) * noise
        else:
            value = noise * np.float32(0.3 if "embed" in name else 1.2 / np.sqrt(p.shape[1]))
        p.copy_(torch.tensor(value).bfloat16().float())


def smollm2_shape():
    model = LlamaForCausalLM._from_config(LlamaConfig(**SHAPE), attn_implementation="eager").eval()
    fill(model)
    ids, x = [], SEED
    for _ in range(PROMPT):
        x = (x * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        ids.append(4 + (x >> 33) % (SHAPE["vocab_size"] - 4))
    out = model.generate(torch.tensor([ids]), max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False, eos_token_id=None)
    tokens = out[0, PROMPT:].tolist()
    want = last_logits(model, ids + tokens[:-1], ANSWER, {})
    assert [int(i) for i in want.argmax(1)] == tokens
    best = np.sort(want, 1)[:, -2:]
    item = lose("smollm2_shape", model, torch.bfloat16, [(ids + tokens[:-1], ANSWER, {}, want)])
    return {**item, "std": rounded(want.std()), "tokens": tokens, "margins": [rounded(b - a) for a, b in best]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    golden, model_directory, out_path = sys.argv[1:]
    cases = {name: tiny(name, row, golden) for name, row in MODELS.items()}
    cases["demo"] = demo(golden, model_directory)
    cases["smollm2_shape"] = smollm2_shape()
    with open(out_path, "w") as f:
        f.write('{"cases": {\n' + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in cases.items()) + "\n}}\n")
