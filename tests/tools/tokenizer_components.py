"""The component cases of the tokenizer tests: one small tokenizer.json a case."""

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
WORDS = dict(BYTES, use_regex=True)
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
          r"\s+(?!\S)|\s+")
UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TAIL = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = "|".join([r"[^\r\n\p{L}\p{N}]?" + UPPER + "*" + LOWER + "+" + TAIL,
                  r"[^\r\n\p{L}\p{N}]?" + UPPER + "+" + LOWER + "*" + TAIL, r"\p{N}{1,3}",
                  r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])
BEHAVIORS = ["Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"]


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


def split(kind, pattern, behavior="Isolated", invert=False):
    return {"type": "Split", "pattern": {kind: pattern}, "behavior": behavior, "invert": invert}


def added(content, **flags):
    return dict({"id": 0, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
                 "normalized": False, "special": False}, **flags)


def template(before, after):
    names = dict(before + after)
    return {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": n, "type_id": 0}} for n, _ in before] +
            [{"Sequence": {"id": "A", "type_id": 0}}] +
            [{"SpecialToken": {"id": n, "type_id": 0}} for n, _ in after],
            "pair": [], "special_tokens": {n: {"id": n, "ids": [i], "tokens": [n]} for n, i in names.items()}}


def pre_tokenizers():
    yield "byte level, words", WORDS
    yield "byte level, whole", BYTES
    yield "byte level, prefix space", dict(WORDS, add_prefix_space=True)
    yield "digits, prefix space", sequence({"type": "Digits", "individual_digits": True},
                                           dict(WORDS, add_prefix_space=True))
    for behavior in BEHAVIORS:
        for invert in (False, True):
            label = "%s%s" % (behavior, " inverted" if invert else "")
            yield "regex " + label, sequence(split("Regex", r"\s+|\p{P}", behavior, invert), BYTES)
            yield "string " + label, sequence(split("String", "e", behavior, invert), BYTES)
        if behavior != "Removed":  # would show that the reference's own punctuation table is of Unicode 8
            yield "punctuation " + behavior, sequence({"type": "Punctuation", "behavior": behavior}, BYTES)
    yield "digit runs", sequence({"type": "Digits", "individual_digits": False}, BYTES)
    yield "whitespace", sequence({"type": "Whitespace"}, BYTES)
    yield "whitespace split", sequence({"type": "WhitespaceSplit"}, BYTES)
    yield "delimiter", sequence({"type": "CharDelimiterSplit", "delimiter": "-"}, BYTES)
    yield "falcon", sequence({"type": "Punctuation", "behavior": "Contiguous"}, WORDS,
                             {"type": "Digits", "individual_digits": False}, split("Regex", "[0-9][0-9][0-9]"))
    patterns = {"llama 3": LLAMA3, "o200k": O200K, "word": r"\w+|\W", "digit": r"\d|[^\d\s]+", "hex": r"\h\h|\H",
                "space": r"\s\S|[\S]+", "lookahead only": r"(?=\p{Lu})", "lookbehind": r"(?<=\d)(?=\D)",
                "possessive": r"\p{L}++|\s*+\S", "code points": r"[\u4e00-\u9fa5\u0800-\u4e00]+|\x41|\x{1F600}",
                "caseless": r"(?i)[k-s]+|İ", "lines": r"^.|.$", "not letter": r"\P{L}+|\p{^N}", "marks": r"\p{L}\p{M}*"}
    for label, pattern in patterns.items():
        yield "pattern " + label, sequence(split("Regex", pattern), BYTES)


def metaspaces():
    for scheme in ("always", "first", "never"):
        for cut in (True, False):
            yield scheme, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": cut}


def normalizers():
    yield "nfc", {"type": "NFC"}
    yield "nfd", {"type": "NFD"}
    yield "strip", {"type": "Strip", "strip_left": True, "strip_right": True}
    yield "strip right", {"type": "Strip", "strip_left": False, "strip_right": True}
    yield "replace regex", {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}
    yield "replace string", {"type": "Replace", "pattern": {"String": "the"}, "content": ""}
    yield "prepend", {"type": "Prepend", "prepend": "é "}
    yield "sequence", {"type": "Sequence", "normalizers": [
        {"type": "NFD"}, {"type": "Replace", "pattern": {"Regex": r"\p{M}"}, "content": ""}, {"type": "NFC"},
        {"type": "Prepend", "prepend": " "}]}


def components(vocabs):
    """(name, model, members of tokenizer.json); vocabs: token to id of each model."""
    def numbered(model, tokens):
        new = len(vocabs[model])
        for token in tokens:
            known = vocabs[model].get(token["content"])
            token["id"] = new if known is None else known
            new += known is None
        return tokens

    for name, pre in pre_tokenizers():
        yield name, "bytes", {"normalizer": None, "pre_tokenizer": pre, "post_processor": None}
    for name, normalizer in normalizers():
        yield "normalizer " + name, "bytes", {"normalizer": normalizer, "pre_tokenizer": WORDS, "post_processor": None}
    for name, pre in metaspaces():
        decoder = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": name, "split": True}
        yield "metaspace %s %s" % (name, pre["split"]), "spm", {
            "normalizer": None, "pre_tokenizer": pre, "post_processor": template([("<s>", 1)], [("</s>", 2)]),
            "decoder": decoder}
    specials = numbered("bytes", [
        added("<s>", special=True), added("</s>", special=True),
        added("<image>", special=True, lstrip=True, rstrip=True), added("question", single_word=True),
        added("a", lstrip=True), added("мир", rstrip=True, normalized=True), added("x", normalized=True,
                                                                                   single_word=True),
        added("<|im_start|>", special=True), added("<|im_start|><|im_end|>"), added(" \n", normalized=True),
        added("é", normalized=True), added("is", single_word=True, lstrip=True, rstrip=True)])
    ids = {token["content"]: token["id"] for token in specials}
    for name, normalizer in [("plain", None), ("nfd", {"type": "NFD"})]:
        yield "added tokens " + name, "bytes", {"normalizer": normalizer, "pre_tokenizer": WORDS,
                                                "post_processor": template([("<s>", ids["<s>"])], [("</s>", ids["</s>"])]),
                                                "added_tokens": specials}
    yield "processors", "bytes", {"normalizer": None, "pre_tokenizer": WORDS, "added_tokens": specials,
                                  "post_processor": {"type": "Sequence", "processors": [
                                      dict(WORDS), {"type": "RobertaProcessing", "sep": ["</s>", ids["</s>"]],
                                                    "cls": ["<s>", ids["<s>"]], "trim_offsets": True,
                                                    "add_prefix_space": False},
                                      template([("<s>", ids["<s>"]), ("question", ids["question"])], [])]}}
    llama = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
                                                 {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}
    words = numbered("spm", [added("<unk>", special=True), added("<s>", special=True), added("</s>", special=True),
                             added("word", normalized=True), added("<image>", normalized=True)])
    yield "llama, normalized tokens", "spm", {"normalizer": llama, "pre_tokenizer": None, "added_tokens": words,
                                              "post_processor": template([("<s>", 1)], [])}
