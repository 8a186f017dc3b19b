"""Writes tests/data/tokenizer: small trained tokenizers, compacted vocabularies, and the ids that the references give.

    make_tokenizer_cases.py train                        trains spm.json, bytes.json and sentencepiece.vocab
    make_tokenizer_cases.py cases LLAMA_CPP_MODELS SMOLLM2.gguf [NAME...]

LLAMA_CPP_MODELS is the folder models/ of llama.cpp, for its ggml-vocab-*.gguf. Needs the Python packages tokenizers,
sentencepiece and gguf. What each file is: tests/data/tokenizer/README.md."""
import io
import json
import os
import struct
import sys

import tokenizer_lines as lines_of
import tokenizer_references as references
from tokenizer_components import components
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

DATA = lines_of.DATA
ROOT = os.path.join(lines_of.HERE, "..", "..")
N_COMPONENT_LINES = 2000


def path(name):
    return os.path.join(DATA, name)


# ---- training ----

def train_spm(text):
    t = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    names = ["<unk>", "<s>", "</s>"]
    specials = names + ["<0x%02X>" % i for i in range(256)]
    t.train_from_iterator(text, trainers.BpeTrainer(vocab_size=2000, special_tokens=specials, limit_alphabet=500,
                                                    show_progress=False))
    tree = json.loads(t.to_str())
    t = Tokenizer(models.BPE(tree["model"]["vocab"], [tuple(m) for m in tree["model"]["merges"]], byte_fallback=True,
                             fuse_unk=True, unk_token="<unk>"))
    t.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in names])
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                   decoders.Strip(" ", 1, 0)])
    t.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    t.save(path("spm.json"), pretty=False)


def train_bytes(text):
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(text, trainers.BpeTrainer(vocab_size=600, initial_alphabet=sorted(alphabet),
                                                    show_progress=False))
    t.decoder = decoders.ByteLevel()
    t.save(path("bytes.json"), pretty=False)


def train_sentencepiece(text):
    import sentencepiece
    out = io.BytesIO()
    sentences = [x.replace("\n", " ").replace("\0", "") for x in text]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([x for x in sentences if x]), model_writer=out, vocab_size=1500, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1,
        character_coverage=0.99, minloglevel=2, add_dummy_prefix=True)
    with open(path("sentencepiece.model"), "wb") as f:
        f.write(out.getvalue())


def train():
    text = [x.decode(errors="replace").replace("<image>", "").replace("\0", "") for x in lines_of.lines()]
    train_spm(text)
    train_bytes(text)
    lists, _ = lines_of.material()
    train_sentencepiece([x.decode() for kind in ("word", "contraction", "code", "emoji") for x in lists[kind]] * 3)


# ---- vocabularies ----

def words_of(t, text):
    """The words that reach the model, over all lines in all modes: what compaction must preserve."""
    words = set()
    for line in text:
        normal = line.decode(errors="replace")
        if t.normalizer:
            normal = t.normalizer.normalize_str(normal)
        words.update(w for w, _ in t.pre_tokenizer.pre_tokenize_str(normal))
        for special in [x.content for x in t.get_added_tokens_decoder().values()]:
            if special in normal:
                for piece in normal.split(special):
                    words.update(w for w, _ in t.pre_tokenizer.pre_tokenize_str(piece))
    return words


def touched(v, words):
    """Tokens and merges that encoding the words looks up with success. Without the others the ids stay the same."""
    rank = {}
    for i, m in enumerate(v.merges):
        rank[tuple(m.decode().split(" "))] = i
    names = {x.decode(): i for i, x in enumerate(v.tokens)}
    tokens, merges = set(), set()
    for word in words:
        if word in names:
            tokens.add(names[word])
        parts = list(word)
        while True:
            tokens.update(names[p] for p in parts if p in names)
            found = [(rank[p], k) for k, p in enumerate(zip(parts, parts[1:])) if p in rank]
            merges.update(r for r, _ in found)
            if not found:
                break
            _, k = min(found)
            parts[k:k + 2] = [parts[k] + parts[k + 1]]
    for r in merges:
        left, right = v.merges[r].decode().split(" ")
        tokens.update((names[left], names[right], names[left + right]))
    tokens.update(i for i, kind in enumerate(v.types) if kind != 1)
    return tokens, merges


def write_vocab(name, v, kept=None):
    """magic, pre, numbers, tokens (id, type, score, text), merges (two token ids); little-endian."""
    tokens, merges = kept or (set(range(len(v.tokens))), set(range(len(v.merges))))
    names = {x: i for i, x in enumerate(v.tokens)}
    out = bytearray(b"VTK1")
    pre = (v.pre or "").encode()
    out += struct.pack("<B", len(pre)) + pre
    out += struct.pack("<10i", v.kind, len(v.tokens), len(tokens), len(merges), v.bos, v.eos, v.unk, int(v.add_bos),
                       int(v.add_eos), int(v.add_space_prefix))
    for i in sorted(tokens):
        out += struct.pack("<IB", i << 8 | v.types[i], len(v.tokens[i])) + v.tokens[i]
        if v.kind == 1:
            out += struct.pack("<f", v.scores[i])
    for r in sorted(merges):
        left, right = v.merges[r].split(b" ")
        out += names[left].to_bytes(3, "little") + names[right].to_bytes(3, "little")
    with open(path(name + ".vocab"), "wb") as f:
        f.write(out)


def write_ids(name, t, text):
    hashes = [lines_of.hash_ids(references.encode(t, x, *lines_of.mode(i))) for i, x in enumerate(text)]
    with open(path(name + ".ids"), "wb") as f:
        f.write(struct.pack("<%dI" % len(hashes), *hashes))


def copy_vectors(models_dir, name):
    for suffix, target in ((".inp", "vectors.inp"), (".out", "%s.out" % name)):
        with open(os.path.join(models_dir, "ggml-vocab-%s.gguf%s" % (name, suffix)), "rb") as f:
            content = f.read()
        with open(path(target), "wb") as f:
            f.write(content)
    return lines_of_vectors()


def lines_of_vectors():
    with open(path("vectors.inp"), "rb") as f:
        return f.read().split(b"\n__ggml_vocab_test__\n")


class SentencePiece:
    """The sentencepiece library behind the interface of references.encode; it sees no special tokens in a text."""

    def __init__(self):
        import sentencepiece
        self.model = sentencepiece.SentencePieceProcessor(model_file=path("sentencepiece.model"))

    def vocab(self):
        m, v = self.model, references.Vocab.__new__(references.Vocab)
        n = m.get_piece_size()
        v.kind, v.pre, v.merges = 1, None, []
        v.tokens = [m.id_to_piece(i).encode() for i in range(n)]
        v.scores = [m.get_score(i) for i in range(n)]
        v.types = [2 if m.is_unknown(i) else 3 if m.is_control(i) else 6 if m.is_byte(i) else 1 for i in range(n)]
        v.bos, v.eos, v.unk = m.bos_id(), m.eos_id(), m.unk_id()
        v.add_bos = v.add_eos = v.add_space_prefix = -1
        return v

    def write_ids(self, text):
        hashes = []
        for i, x in enumerate(text):
            ids = self.model.encode(x.decode(errors="replace"))
            hashes.append(lines_of.hash_ids(([1] if lines_of.mode(i)[0] else []) + ids))
        with open(path("sentencepiece.ids"), "wb") as f:
            f.write(struct.pack("<%dI" % len(hashes), *hashes))


def of_gguf(name, file, text, vectors=(), whole=False, pre=None):
    v = references.Vocab(file)
    v.pre = pre or v.pre
    t = references.of_vocab(v)
    kept = None if whole else touched(v, words_of(t, list(text) + list(vectors)))
    write_vocab(name, v, kept)
    write_ids(name, t, text)


def component_cases(text):
    """Every normalizer, pre-tokenizer, post-processor and decoder that is served, with a small model."""
    out = []
    trees = {}
    for name in ("spm", "bytes"):
        with open(path(name + ".json"), encoding="utf-8") as f:
            trees[name] = json.load(f)
    vocabs = {name: tree["model"]["vocab"] for name, tree in trees.items()}
    for name, model, body in components(vocabs):
        body = dict(body)
        body.setdefault("decoder", trees[model]["decoder"])
        body.setdefault("added_tokens", trees[model]["added_tokens"])
        t = Tokenizer.from_str(json.dumps(dict(body, version="1.0", model=trees[model]["model"])))
        ids_hash = text_hash = 0
        for i, line in enumerate(text[:N_COMPONENT_LINES]):
            ids = references.encode(t, line, *lines_of.mode(i))
            ids_hash = (ids_hash * 31 + lines_of.hash_ids(ids)) & 0xFFFFFFFF
            decoded = t.decode(ids, skip_special_tokens=i % 2 == 0).encode()
            text_hash = (text_hash * 31 + lines_of.hash_ids(decoded)) & 0xFFFFFFFF
        out.append({"name": name, "model": model, "body": body, "ids": ids_hash, "text": text_hash})
    with open(path("components.json"), "w", encoding="utf-8") as f:
        f.write("[" + ",\n".join(json.dumps(x, ensure_ascii=False, separators=(",", ":")) for x in out) + "]\n")


def cases(models_dir, smollm2, only):
    text = lines_of.lines()
    jobs = {
        "demo": lambda: write_ids("demo", Tokenizer.from_file(os.path.join(ROOT, "models/demo-vlm/tokenizer.json")),
                                  text),
        "spm": lambda: write_ids("spm", Tokenizer.from_file(path("spm.json")), text),
        "smollm2": lambda: of_gguf("smollm2", smollm2, text, whole=True),
        "components": lambda: component_cases(text),
        "sentencepiece": lambda: (write_vocab("sentencepiece", SentencePiece().vocab()),
                                  SentencePiece().write_ids(text)),
    }
    for name in ("gpt-2", "llama-spm", "llama-bpe", "qwen2"):
        file = os.path.join(models_dir, "ggml-vocab-%s.gguf" % name)
        jobs[name] = lambda name=name, file=file: of_gguf(name, file, text, copy_vectors(models_dir, name),
                                                          whole=name == "llama-spm")
    jobs["default"] = lambda: of_gguf("default", os.path.join(models_dir, "ggml-vocab-gpt-2.gguf"), text,
                                      pre="default")
    for name, job in jobs.items():
        if not only or name in only:
            print(name, flush=True)
            job()


if __name__ == "__main__":
    if sys.argv[1:] == ["train"]:
        train()
    elif len(sys.argv) >= 4 and sys.argv[1] == "cases":
        cases(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        sys.exit(__doc__)
