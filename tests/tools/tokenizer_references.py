"""Reference tokenizers for the tokenizer tests, built with the `tokenizers` library.

GGUF vocabularies have no tokenizer.json; what llama.cpp does with them is expressed here with the library's parts."""
import json

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp spells the contractions without (?i): U+017F does not fold to s there.
PLAIN = CONTRACTIONS.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])")


class Vocab:
    """A GGUF vocabulary: the members of struct tokenizer_vocab."""

    def __init__(self, path):
        fields = gguf.GGUFReader(path).fields

        def get(key, default=None):
            field = fields.get("tokenizer.ggml." + key)
            return default if field is None else field.contents()

        def raw(key):
            field = fields.get("tokenizer.ggml." + key)
            return [] if field is None else [bytes(field.parts[k]) for k in field.data]

        self.kind = {"llama": 1, "gpt2": 2}[get("model")]
        self.pre = get("pre")
        self.tokens = raw("tokens")
        self.merges = raw("merges")
        self.scores = get("scores")
        self.types = get("token_type") or [1] * len(self.tokens)
        self.bos = get("bos_token_id", -1)
        self.eos = get("eos_token_id", -1)
        self.unk = get("unknown_token_id", -1)
        self.add_bos, self.add_eos = get("add_bos_token", -1), get("add_eos_token", -1)
        self.add_space_prefix = get("add_space_prefix", -1)


def add_specials(t, v):
    """Control and user-defined tokens, recognised in the text; the begin token."""
    for i, (token, kind) in enumerate(zip(v.tokens, v.types)):
        if kind in (2, 3, 4):
            t.add_tokens([AddedToken(token.decode(), special=kind != 4, normalized=False)])
            assert t.token_to_id(token.decode()) == i
    default = v.kind == 1 or v.pre in ("llama-bpe", "llama3")
    if v.bos >= 0 and (v.add_bos if v.add_bos != -1 else default):
        bos = v.tokens[v.bos].decode()
        t.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, v.bos)])
    return t


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def byte_level(v):
    names = [x.decode() for x in v.tokens]
    vocab = {x: i for i, x in enumerate(names)}
    merges = [tuple(m.decode().split(" ")) for m in v.merges]
    t = Tokenizer(models.BPE(vocab, merges, ignore_merges=v.pre == "llama-bpe"))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    steps = {
        "llama-bpe": [split(PLAIN + r"\p{N}{1,3}" + TAIL), plain],
        "qwen2": [split(PLAIN + r"\p{N}" + TAIL), plain],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), words],
        "gpt-2": [words],
        "default": [split(r"[\p{P}\$\+<=>\^~\|]+"), split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+|"
                    r" ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), split(r"\p{N}+"), split("[0-9][0-9][0-9]"), plain],
    }[v.pre]
    t.pre_tokenizer = pre_tokenizers.Sequence(steps)
    t.decoder = decoders.ByteLevel()
    return add_specials(t, v)


def sentencepiece_style(v):
    """Scores as ranks: every split of a token into two tokens is a merge, ranked by the score of the whole."""
    names = [x.decode() for x in v.tokens]
    vocab = {x: i for i, x in enumerate(names)}
    merges = []
    for whole, i in vocab.items():
        for k in range(1, len(whole)):
            left, right = whole[:k], whole[k:]
            if left in vocab and right in vocab:
                merges.append((-v.scores[i], vocab[left], vocab[right], left, right))
    merges.sort(key=lambda m: m[:3])
    t = Tokenizer(models.BPE(vocab, [m[3:] for m in merges], byte_fallback=True, fuse_unk=True,
                             unk_token=names[v.unk] if v.unk >= 0 else None))
    prefix = [normalizers.Prepend("▁")] if v.add_space_prefix else []
    t.normalizer = normalizers.Sequence(prefix + [normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()] +
                                  ([decoders.Strip(" ", 1, 0)] if prefix else []))
    return add_specials(t, v)


def of_vocab(v):
    return byte_level(v) if v.kind == 2 else sentencepiece_style(v)


def encode(t, line, add_special, parse_special):
    t.encode_special_tokens = not parse_special
    return t.encode(line.decode(errors="replace"), add_special_tokens=add_special).ids
