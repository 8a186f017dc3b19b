#!/bin/sh
# test_make_pages.sh SOURCE_DIR - the page generator: the same seed writes the same bytes, another seed other pages, a
# smaller count a prefix; ids and a page's values are unique, every image is 336 x 336. 77: no Pillow or no fonts here.
set -eu
tool=$1/tests/tools/make_pages.py
python=
for candidate in ${PYTHON:-} python3 /usr/bin/python3; do
    if "$candidate" -c 'import PIL' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "skipped: no Python with Pillow"
    exit 77
fi
PYTHONDONTWRITEBYTECODE=1
export PYTHONDONTWRITEBYTECODE
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if ! "$python" "$tool" --set lookup --count 1 "$work/fonts" 2>"$work/error"; then
    grep -q 'install fonts' "$work/error" || { cat "$work/error"; exit 1; }
    echo "skipped: $(cat "$work/error")"
    exit 77
fi
fail() {
    echo "failed: $1"
    exit 1
}
for set in lookup lookup-first pages pages-first listing second; do
    "$python" "$tool" --set $set --count 3 --seed 7 "$work/a/$set"
    "$python" "$tool" --set $set --count 3 --seed 7 "$work/b/$set"
    "$python" "$tool" --set $set --count 2 --seed 8 "$work/c/$set"
    "$python" "$tool" --set $set --count 1 --seed 7 --long "$work/d/$set"
done
diff -r "$work/a" "$work/b" || fail "one seed, two results"
"$python" "$tool" --set lookup --count 2 --seed 7 "$work/prefix"
head -n 2 "$work/a/lookup/questions.jsonl" | cmp - "$work/prefix/questions.jsonl" || fail "a smaller count is no prefix"
"$python" - "$work" <<'PYTHON'
import glob, hashlib, json, os, sys
from PIL import Image

work = sys.argv[1]
seen = {"a": set(), "c": set()}
ids = set()
for path in sorted(glob.glob(f"{work}/[ac]/*/questions.jsonl")):
    half = os.path.relpath(path, work)[0]
    for line in open(path, encoding="utf-8"):
        case = json.loads(line)
        assert case["id"] not in ids, case["id"]
        ids.add(case["id"])
        assert case["prompt"].count("<image>") == len(case["images"]) == case["pages"], case
        assert case["prompt"].startswith("USER: ") and case["prompt"].endswith(" ASSISTANT:"), case
        if case["task"] == "listing":
            names = [field.split(": ")[0] for field in case["answer"].split("; ")]
            assert len(set(names)) == len(names) >= 4, case
        for name in case["images"]:
            file = os.path.join(os.path.dirname(path), name)
            image = Image.open(file)
            assert image.size == (336, 336) and image.mode == "RGB", file
            assert len(image.getcolors(336 * 336)) > 2, f"{file} is blank"
            seen[half].add(hashlib.sha256(image.tobytes()).hexdigest())
assert len(seen["a"]) == 3 * 12 and len(seen["c"]) == 2 * 12, "two pages alike"
assert not seen["a"] & seen["c"], "two seeds share a page"
for path in glob.glob(f"{work}/d/*/questions.jsonl"):
    for line in open(path, encoding="utf-8"):
        case = json.loads(line)
        assert case["long"] and case.get("followup", case)["long"], case
PYTHON
echo "passed"
