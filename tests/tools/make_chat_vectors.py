#!/usr/bin/env python3
"""Writes tests/data/chat/vectors.json: conversations and the text that the models' own Jinja templates make of them.

usage: make_chat_vectors.py TEMPLATES OUT

TEMPLATES holds the templates as the models ship them (tokenizer_config.json or chat_template.json of
llava-hf/llava-1.5-7b-hf, meta-llama/Llama-2-7b-chat-hf, Meta-Llama-3-8B-Instruct and Llama-3.1-8B-Instruct,
SmolLM2-135M-Instruct, and plain ChatML): llava-1.5.jinja llama-2.jinja llama-3.jinja llama-3.1.jinja smollm2.jinja
chatml.jinja. They are rendered as transformers renders them. One change: a past answer ends with the end token in the
llava-1.5 template, as in the original LLaVA training (and in the demo model's), where the converted one has a space.
"""
import json
import os
import sys

from transformers.utils.chat_template_utils import render_jinja_template

CONVERSATIONS = [
    [("user", ["Hello, who are you?"], 0)],
    [("user", ["  padded \n\t"], 0)],
    [("user", ["\u3000\u00a0wide spaces\u2003\x1f"], 0)],
    [("user", [""], 0)],
    [("system", ["You are terse."], 0), ("user", ["2 + 2?"], 0)],
    [("system", ["  You are terse.\n"], 0), ("user", [" 2 + 2? "], 0)],
    [("system", ["S"], 0), ("user", [" \n "], 0)],
    [("system", [""], 0), ("user", ["empty system"], 0)],
    [("user", ["a"], 0), ("assistant", ["b"], 0), ("user", ["c"], 0)],
    [("system", ["s"], 0), ("user", ["a "], 0), ("assistant", [" b "], 0), ("user", ["c"], 0), ("assistant", ["d"], 0),
     ("user", ["e\nf"], 0)],
    [("user", ["one", "two", " three "], 0)],
    [("user", ["Gr\u00fc\u00dfe \U0001f600 \u65e5\u672c\u8a9e {{ x }} {% y %}"], 0)],
]
WITH_IMAGES = [
    [("user", ["What is the total?"], 1)],
    [("user", ["Compare."], 4)],
    [("user", [], 1)],
    [("system", ["Read."], 0), ("user", ["a"], 1), ("assistant", ["b"], 0), ("user", ["c"], 2)],
]
TOKENS = {"llava-1.5": ("<s>", "</s>"), "llama-2": ("<s>", "</s>"), "llama-3": ("<|begin_of_text|>", "<|eot_id|>"),
          "llama-3.1": ("<|begin_of_text|>", "<|eot_id|>"), "smollm2": ("<|im_start|>", "<|im_end|>"),
          "chatml": ("", "<|im_end|>")}


def render(name, jinja, conversation):
    bos, eos = TOKENS[name]
    messages = []
    for role, texts, n_images in conversation:
        if name == "llava-1.5":
            content = [{"type": "image"}] * n_images + [{"type": "text", "text": t} for t in texts]
        else:
            content = "\n".join(texts)
        messages.append({"role": role, "content": content})
    texts, _ = render_jinja_template([messages], chat_template=jinja, add_generation_prompt=True, bos_token=bos,
                                     eos_token=eos)
    return texts[0]


def main():
    folder, out = sys.argv[1:3]
    cases = []
    for name in TOKENS:
        with open(os.path.join(folder, name + ".jinja"), encoding="utf-8") as f:
            jinja = f.read()
        if name == "llava-1.5":
            a, b = "{% generation %}{{ content['text'] + ' '}}", "{% generation %}{{ content['text'] + eos_token}}"
            assert a in jinja
            jinja = jinja.replace(a, b)
        for conversation in CONVERSATIONS + (WITH_IMAGES if name == "llava-1.5" else []):
            cases.append({"template": name, "bos": TOKENS[name][0], "eos": TOKENS[name][1],
                          "messages": [{"role": r, "texts": t, "images": n} for r, t, n in conversation],
                          "text": render(name, jinja, conversation)})
    with open(out, "w", encoding="utf-8") as f:
        json.dump(cases, f, indent=0, ensure_ascii=True)
        f.write("\n")
    print(len(cases), "cases")


main()
