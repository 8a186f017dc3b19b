#!/bin/sh
# test_make_text.sh SOURCE_DIR - the generator of questions about long text: the same seed writes the same bytes, another
# seed others, a smaller count a prefix; needles lie where they should, continuations follow in the book. Book: a text
# file and HTML pages with what must be left out. 77: no Python here.
set -eu
command -v python3 >/dev/null || exit 77
tool=$1/tests/tools/make_text.py
PYTHONDONTWRITEBYTECODE=1
export PYTHONDONTWRITEBYTECODE
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fail() {
    echo "failed: $1"
    exit 1
}
python3 - "$work" <<'PYTHON'
import os, sys

work = sys.argv[1]
lines = [" ".join(f"Word{p}x{s}a and word{p}x{s}b  stand\n here." for s in range(8)) for p in range(120)]
with open(f"{work}/book.txt", "w") as f:
    f.write("\n\n".join(lines))
os.mkdir(f"{work}/book")
pages = [("index.html", "two.html", lines[:70]), ("two.html", None, lines[70:])]
for name, follows, part in pages:
    link = f'<link rel="next" href="{follows}" />' if follows else ""
    body = "".join(f'<div class="para">{p}<pre>left out</pre></div><ul><li>left out</li></ul>' for p in part)
    with open(f"{work}/book/{name}", "w") as f:
        f.write(f"<html><head>{link}</head><body><h1>left out</h1>{body}</body></html>")
PYTHON
for set in needle perplexity; do
    python3 "$tool" --set $set --tokens 300 --count 10 --seed 7 "$work/book.txt" "$work/a-$set"
    python3 "$tool" --set $set --tokens 300 --count 10 --seed 7 "$work/book" "$work/b-$set"
    python3 "$tool" --set $set --tokens 300 --count 4 --seed 7 "$work/book" "$work/c-$set"
    python3 "$tool" --set $set --tokens 300 --count 10 --seed 8 "$work/book" "$work/d-$set"
    cmp "$work/a-$set" "$work/b-$set" || fail "pages and text give two results"
    head -n 4 "$work/b-$set" | cmp - "$work/c-$set" || fail "a smaller count is no prefix"
    cmp -s "$work/b-$set" "$work/d-$set" && fail "two seeds, one result"
done
python3 - "$work" <<'PYTHON'
import json, re, sys

work = sys.argv[1]
with open(f"{work}/book.txt") as f:
    book = "\n".join(re.sub(r"\s+", " ", p) for p in f.read().split("\n\n"))
for index, line in enumerate(open(f"{work}/a-needle")):
    case = json.loads(line)
    text = case["prompt"].split("user\n")[1].split("\n\nWhat is")[0]
    found = re.search(r" The secret number of (\w+) is (\d{5})\.", text)
    city, number = found.groups()
    assert number == case["answer"] and case["prompt"].endswith(f"number of {city} is"), case
    assert number not in case["prompt"].replace(found.group(), ""), case
    around = text.replace(found.group(), "")
    assert around in book and 1350 <= len(around) < 1370, case
    assert case["depth"] == (0.1, 0.3, 0.5, 0.7, 0.9)[index % 5], case
    assert 0 <= found.start() - case["depth"] * len(around) < 60 and text[found.start() - 1] == ".", case
for line in open(f"{work}/a-perplexity"):
    case = json.loads(line)
    assert case["prompt"] + case["continuation"] in book and "answer" not in case, case
    assert case["prompt"].startswith("Word") and case["continuation"].startswith(" "), case
    assert 1350 <= len(case["prompt"]) < 1370 and 1480 <= len(case["continuation"]) < 1500, case
PYTHON
echo "passed"
