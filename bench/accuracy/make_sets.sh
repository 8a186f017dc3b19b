#!/bin/sh
# make_sets.sh - the page sets of the accuracy records, into build/accuracy/{tuning,record}/SET/questions.jsonl.
# The two halves share no page: presets are chosen on tuning and reported on record. Every answer asked for is one of
# five tokens or more; shorter ones survive any compression. tests/tools/make_pages.py says what it needs.
#   bench/accuracy/make_sets.sh [FOLDER]        PYTHON=... names another interpreter, SHARE=10 makes a tenth of each set
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
out=${1:-$root/build/accuracy}
python=${PYTHON:-}
for candidate in $python python3 /usr/bin/python3; do
    if "$candidate" -c 'import PIL' 2>/dev/null; then
        python=$candidate
        break
    fi
    python=
done
if [ -z "$python" ]; then
    echo "make_sets.sh: no Python with Pillow; install python3-pil, or name one in PYTHON" >&2
    exit 1
fi

make_set() { # half, seed, set, count
    rm -rf "${out:?}/$1/$3"
    "$python" "$root/tests/tools/make_pages.py" --set "$3" --count $(($4 / ${SHARE:-1})) --seed "$2" --long "$out/$1/$3"
    echo "$out/$1/$3: $(wc -l <"$out/$1/$3/questions.jsonl") questions"
}

for half in tuning record; do
    seed=1001
    [ $half = tuning ] || seed=2002
    make_set $half $seed lookup 200
    make_set $half $seed lookup-first 200
    make_set $half $seed pages 100
    make_set $half $seed pages-first 100
    make_set $half $seed listing 100
    make_set $half $seed second 100
done
