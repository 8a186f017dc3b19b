"""The test text of the tokenizer tests: 20,000 lines made from tests/data/tokenizer/material.txt by a small seeded
generator. tests/unit/tokenizer_lines.h is the same generator in C; both must give the same bytes."""
import os

N_LINES = 20000
MASK = (1 << 64) - 1
HERE = os.path.dirname(os.path.abspath(__file__))
DATA = os.path.join(HERE, "..", "data", "tokenizer")
PUNCTUATION = b"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"


def unescape(text):
    out, i = bytearray(), 0
    while i < len(text):
        if text[i:i + 1] != b"\\":
            out.append(text[i])
            i += 1
        elif text[i + 1:i + 2] == b"x":
            out.append(int(text[i + 2:i + 4], 16))
            i += 4
        else:
            out += {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"\\": b"\\", b"s": b" "}[text[i + 1:i + 2]]
            i += 2
    return bytes(out)


def material():
    lists, ranges = {}, []
    with open(os.path.join(DATA, "material.txt"), "rb") as f:
        for line in f.read().split(b"\n"):
            if not line or line.startswith(b"#"):
                continue
            kind, _, value = line.partition(b" ")
            if kind == b"range":
                low, high = value.split()
                ranges.append((int(low, 16), int(high, 16)))
            else:
                lists.setdefault(kind.decode(), []).append(unescape(value))
    return lists, ranges


class Random:
    """splitmix64"""

    def __init__(self, seed):
        self.state = seed & MASK

    def next(self, n):
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = self.state
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK
        return (z ^ z >> 31) % n


def put(code):
    return chr(code).encode() if not 0xD800 <= code <= 0xDFFF else b""


def part(r, lists, ranges):
    def pick(kind):
        return lists[kind][r.next(len(lists[kind]))]

    out = bytearray()
    slot = r.next(16)
    if slot < 3:
        for i in range(1 + r.next(3)):
            out += (b" " if i else b"") + pick("word")
    elif slot == 3:
        out += pick("contraction")
    elif slot == 4:
        for _ in range(1 + r.next(8)):
            out.append(b".,-/:"[r.next(5)] if r.next(6) == 0 else 48 + r.next(10))
    elif slot == 5:
        for _ in range(1 + r.next(5)):
            out.append(PUNCTUATION[r.next(len(PUNCTUATION))])
    elif slot == 6:
        for _ in range(1 + r.next(6)):
            out += pick("space")
    elif slot < 10:
        low, high = ranges[r.next(len(ranges))]
        for _ in range(1 + r.next(8)):
            out += put(low + r.next(high - low + 1))
    elif slot == 10:
        out += pick("emoji")
    elif slot == 11:
        out += pick("code")
    elif slot == 12:
        for _ in range(1 + r.next(3)):
            out.append(r.next(32) if r.next(8) else 0x7F)
    elif slot == 13:
        if r.next(2):
            out += pick("invalid")
        else:
            for _ in range(1 + r.next(3)):
                out.append(0x80 + r.next(128))
    elif slot == 14:
        out += pick("special")
    else:
        text = pick("repeat")
        out += text * (1 + r.next(40))
    if r.next(3):
        out += b" "
    return out


def make_line(i, lists, ranges):
    r = Random(0x7669747261696C ^ (i * 0xD1342543DE82EF95 & MASK))
    out = bytearray()
    for _ in range(1 + r.next(10)):
        out += part(r, lists, ranges)
    return bytes(out)


def lines():
    lists, ranges = material()
    return [make_line(i, lists, ranges) for i in range(N_LINES)]


def hash_ids(ids):
    h = 0xCBF29CE484222325
    for k in ids:
        h = ((h ^ k) * 0x100000001B3) & MASK
        h ^= h >> 29
    return (h ^ h >> 32) & 0xFFFFFFFF


def mode(i):
    """(add special tokens, recognise special tokens) of line i."""
    return [(True, True), (False, True), (False, False)][i % 3]
