"""Writes model/tokenizer_unicode.h, the tables of canonical normalization, from Python's unicodedata.

Usage: make_tokenizer_unicode.py > model/tokenizer_unicode.h"""
import sys
import unicodedata


def rows(items, indent="    "):
    line = indent
    for item in items:
        if len(line) + len(item) + 2 > 119:
            print(line.rstrip())
            line = indent
        line += item + ", "
    print(line.rstrip())


def main():
    points = [c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF and not 0xAC00 <= c < 0xAC00 + 11172]
    flat, decompositions, compositions = [], [], []
    for c in points:
        full = unicodedata.normalize("NFD", chr(c))
        if full == chr(c):
            continue
        decompositions.append("{0x%x, %d, %d}" % (c, len(flat), len(full)))
        flat += ["0x%x" % ord(x) for x in full]
        parts = unicodedata.decomposition(chr(c)).split()
        if len(parts) == 2 and unicodedata.normalize("NFC", chr(c)) == chr(c):
            compositions.append((int(parts[0], 16), int(parts[1], 16), c))
    classes = []
    for c in points:
        k = unicodedata.combining(chr(c))
        if not k:
            continue
        if classes and classes[-1][1] == c - 1 and classes[-1][2] == k:
            classes[-1][1] = c
        else:
            classes.append([c, c, k])

    print("/* tokenizer_unicode - tables of canonical normalization, Unicode %s. Made by" % unicodedata.unidata_version)
    print(" * tests/tools/make_tokenizer_unicode.py; do not edit. */")
    print("#ifndef VITRAIL_MODEL_TOKENIZER_UNICODE_H\n#define VITRAIL_MODEL_TOKENIZER_UNICODE_H\n")
    print("#include <stdint.h>\n\n/* clang-format off */")
    print("static const uint32_t tokenizer_decomposed[] = {")
    rows(flat)
    print("};\n\n/* Full decomposition of `code`: n entries of tokenizer_decomposed from `at` on; sorted by code. */")
    print("struct tokenizer_decomposition {\n    uint32_t code;\n    uint16_t at;\n    uint16_t n;\n};")
    print("static const struct tokenizer_decomposition tokenizer_decompositions[] = {")
    rows(decompositions)
    print("};\n\n/* Primary composites, sorted by first and second; Hangul is computed. */")
    print("struct tokenizer_composition {\n    uint32_t first, second, code;\n};")
    print("static const struct tokenizer_composition tokenizer_compositions[] = {")
    rows("{0x%x, 0x%x, 0x%x}" % x for x in sorted(compositions))
    print("};\n\n/* Canonical combining classes that are not 0, sorted. */")
    print("struct tokenizer_class {\n    uint32_t first, last;\n    unsigned char class;\n};")
    print("static const struct tokenizer_class tokenizer_classes[] = {")
    rows("{0x%x, 0x%x, %d}" % tuple(x) for x in classes)
    print("};\n/* clang-format on */\n\n#endif")


if __name__ == "__main__":
    sys.exit(main())
