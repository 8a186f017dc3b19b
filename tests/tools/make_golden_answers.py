"""Logits and VL-Cache answers of real models, for tests/golden, tests/multirank and tests/unit/test_engine.
Usage: make_golden_answers.py demo MODEL_DIRECTORY ORACLES_DIRECTORY OUT.json
       make_golden_answers.py smollm2 FILE.gguf ORACLES_DIRECTORY OUT.json

{"items": [{"id", "prompt"?, "ids", "spans", "budget", "kept" [layers] tokens kept a lane, "doubtful": entries near the
threshold, "tokens": greedy, "margins": of each, "logits": base64 [steps, width] of the first steps, "top"?: their ids}]}.
A budget of 1 is the full cache. The reference is transformers' weights in float32 under a plain loop of our own, whose
full-cache logits are first held against transformers' forward; what is kept comes from kv_oracles.py."""
import base64
import importlib.util
import json
import sys

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaForConditionalGeneration

STEPS = 3  # whose logits are kept
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class Decoder:
    """The llama decoder as lines of torch, with lanes of any length a layer and KV head."""

    def __init__(self, model, head):
        self.model, self.head, c = model, head, model.config
        self.H, self.G = c.num_attention_heads, c.num_key_value_heads
        self.d = getattr(c, "head_dim", None) or c.hidden_size // self.H

    def qkv(self, layer, x, position):
        a, h = layer.self_attn, layer.input_layernorm(x)
        cos, sin = self.model.rotary_emb(h, position[None])
        split = lambda y, n: y.view(1, -1, n, self.d).transpose(1, 2)
        q, k = split(a.q_proj(h), self.H), split(a.k_proj(h), self.G)
        cos, sin = cos[:, None], sin[:, None]
        return rotate(q, cos, sin)[0], rotate(k, cos, sin)[0], split(a.v_proj(h), self.G)[0]

    def finish(self, layer, x, out):
        x = x + layer.self_attn.o_proj(out.transpose(0, 1).reshape(1, -1, self.H * self.d))
        return x + layer.mlp(layer.post_attention_layernorm(x))

    def prefill(self, x):
        m, lanes = x.shape[1], []
        position = torch.arange(m)
        hidden = torch.full((m, m), -torch.inf).triu(1)
        for layer in self.model.layers:
            q, k, v = self.qkv(layer, x, position)
            rep = self.H // self.G
            out = torch.empty_like(q)
            for h in range(self.H):
                score = q[h] @ k[h // rep].T / self.d ** 0.5 + hidden
                out[h] = score.softmax(-1) @ v[h // rep]
            x = self.finish(layer, x, out)
            lanes.append([q, k, v])
        return self.head(self.model.norm(x[0, -1:]))[0], lanes

    def decode(self, token, position, lanes):
        x = self.model.embed_tokens(torch.tensor([[token]]))
        for layer, lane in zip(self.model.layers, lanes):
            q, k, v = self.qkv(layer, x, torch.tensor([position]))
            lane[1] = torch.cat([lane[1], k], 1)
            lane[2] = torch.cat([lane[2], v], 1)
            rep = self.H // self.G
            key, value = lane[1].repeat_interleave(rep, 0), lane[2].repeat_interleave(rep, 0)
            out = ((q @ key.transpose(1, 2)) / self.d ** 0.5).softmax(-1) @ value
            x = self.finish(layer, x, out)
        return self.head(self.model.norm(x[0]))[0]


def compress(oracle, lanes, m, spans, alpha):
    """Keeps in each lane what VL-Cache keeps; the numbers kept and the doubtful entries."""
    first, _ = oracle.post_vision_rows(m, spans)
    position = np.arange(first, m)
    counts, doubtful, rows = [], 0, []
    for q, k, _ in lanes:
        logits = oracle.attention_logits(q[:, first:].numpy(), k.numpy(), position)
        kept, near = oracle.vl_kept_counts(logits)
        counts.append(int(kept.sum()))
        doubtful += int(near.sum())
        rows.append(oracle.vl_scores(oracle.softmax(logits), q.shape[0] // k.shape[0]))
    kept = oracle.vl_tokens_floor(oracle.vl_budgets(counts, alpha), m)
    for lane, score, n in zip(lanes, rows, kept):
        window = oracle.recent_window(n)
        index = np.stack([oracle.select_recent_and_top(s, n, window) for s in score])
        index = torch.tensor(index)[:, :, None].expand(-1, -1, lane[1].shape[2])
        lane[1], lane[2] = lane[1].gather(1, index), lane[2].gather(1, index)
    return kept, doubtful


def answer(decoder, oracle, embeds, spans, budget, eos, most, width):
    m = embeds.shape[1]
    logits, lanes = decoder.prefill(embeds)
    kept, doubtful = [m] * len(lanes), 0
    if budget < 1:
        kept, doubtful = compress(oracle, lanes, m, spans, budget)
    tokens, margins, rows, tops = [], [], [], []
    while True:
        best = torch.topk(logits, 2).values
        margins.append(round(float(best[0] - best[1]), 4))
        tokens.append(int(logits.argmax()))
        if len(rows) < STEPS:
            top = torch.topk(logits, width).indices.sort().values if width < len(logits) else torch.arange(width)
            rows.append(logits[top].numpy())
            tops.append([int(i) for i in top])
            std = float(logits.std())
        if tokens[-1] in eos or len(tokens) == most:
            break
        logits = decoder.decode(tokens[-1], m + len(tokens) - 1, lanes)
    item = {"budget": budget, "kept": kept, "doubtful": doubtful, "tokens": tokens, "margins": margins, "std": std,
            "logits": base64.b64encode(np.stack(rows).astype("<f4").tobytes()).decode()}
    if width < len(logits):
        item["top"] = tops
    return item


DEMO = [("dev-1p-0000", (1, 0.1)), ("dev-1p-0001", (1, 0.1, 0.03)), ("dev-1p-0005", (1, 0.1)), ("dev-1p-0040", (1, 0.1)),
        ("dev-1p-0077", (0.1, 0.5)), ("dev-1p-0099", (0.05,)), ("dev-4p-0000", (1, 0.1)), ("dev-4p-0007", (1, 0.1)),
        ("dev-4p-0020", (0.02,)), ("dev-4p-0039", (0.1,))]
SMOLLM2 = ["The capital of France is", "def fibonacci(n):\n    ", "Once upon a time, in a village between two rivers, there "
           "lived a baker who sold only one kind of bread. Every morning the people of the village came to his door and "
           "asked for cake, for rolls, for biscuits, and every morning he shook his head and gave them the same round "
           "loaf. One day a stranger came over the bridge. He wore a coat of seven colours and carried a sack of salt. "
           "\"I will trade this salt,\" said the stranger, \"for the secret of your bread.\" The baker"]


def demo(directory, oracle):
    model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    decoder = Decoder(model.model.language_model, model.lm_head)
    lines = {}
    with open(f"{directory}/dev-eval/questions.jsonl") as f:
        for line in f:
            lines[json.loads(line)["id"]] = json.loads(line)
    for name, budgets in DEMO:
        line = lines[name]
        ids, spans = [], []
        for token in tokenizer(line["prompt"]).input_ids:
            if token == 3:
                spans.append([len(ids), len(ids) + 576])
            ids += [token] * (576 if token == 3 else 1)
        raw = np.stack([np.asarray(Image.open(f"{directory}/dev-eval/{p}").convert("RGB")) for p in line["images"]])
        value = ((torch.tensor(raw).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
        features = model.model.get_image_features(pixel_values=value).pooler_output
        embeds = model.model.language_model.embed_tokens(torch.tensor([ids]))
        for (start, end), feature in zip(spans, features):
            embeds[0, start:end] = feature
        whole = model(input_ids=torch.tensor([ids]), pixel_values=value, use_cache=False, logits_to_keep=1).logits[0, -1]
        gap = float((decoder.prefill(embeds)[0] - whole).abs().max() / whole.std())
        assert gap < 1e-4, gap
        for budget in budgets:
            item = answer(decoder, oracle, embeds, spans, budget, [2], 100, model.config.text_config.vocab_size)
            if budget == 1:
                assert item["tokens"] == line["model_tokens"], name
            if budget < 1:
                item["logits"] = keep_second(item["logits"], model.config.text_config.vocab_size)
            yield {"id": name, "prompt_tokens": len(ids), **item}


def keep_second(logits, width):
    """Of a compressed answer only the first step that reads the compressed cache is worth its bytes."""
    rows = np.frombuffer(base64.b64decode(logits), "<f4").reshape(-1, width)
    return base64.b64encode(rows[1:2].tobytes()).decode()


def smollm2(path, oracle):
    directory, file = path.rsplit("/", 1)
    model = AutoModelForCausalLM.from_pretrained(directory, gguf_file=file, dtype=torch.float32,
                                                 attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=file)
    decoder = Decoder(model.model, model.lm_head)
    for i, prompt in enumerate(SMOLLM2):
        ids = tokenizer(prompt).input_ids
        embeds = model.model.embed_tokens(torch.tensor([ids]))
        whole = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        gap = float((decoder.prefill(embeds)[0] - whole).abs().max() / whole.std())
        assert gap < 1e-4, gap
        for budget in (1, 0.1) if len(ids) > 64 else (1,):
            yield {"id": f"smollm2-{i}", "prompt": prompt, "ids": ids,
                   **answer(decoder, oracle, embeds, [], budget, [2], 12, 20)}


def load_oracles(directory):
    spec = importlib.util.spec_from_file_location("kv_oracles", f"{directory}/kv_oracles.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    kind, source, oracles, out = sys.argv[1:]
    items = []
    for item in (demo if kind == "demo" else smollm2)(source, load_oracles(oracles)):
        print({k: v for k, v in item.items() if k not in ("logits", "ids", "top", "prompt")}, flush=True)
        items.append(item)
    with open(out, "w") as f:
        f.write('{"items": [\n' + ",\n".join(json.dumps(item) for item in items) + "\n]}\n")
