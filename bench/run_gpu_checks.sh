#!/bin/sh
# run_gpu_checks - everything that needs a GPU, once, in the order of its worth: the tests of the CUDA backend, the
# kernel bench, torch on the same shapes, and short forms of the tests under compute-sanitizer. A failure stops nothing;
# what does not fit the time is named. Ends with a summary; the exit code is 0 only if all ran and passed.
#
#   run_gpu_checks.sh BUILD OUT       BUILD: a build directory; OUT: where logs and figures go (six files)
#   GPU_CHECKS_SECONDS=500            the time for all of it
#   GPU_CHECKS="tests bench peer sanitizer"   the parts
set -u
[ $# -eq 2 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
build=$1 out=$2
source=$(cd "$(dirname "$0")" && pwd)
parts=${GPU_CHECKS:-tests bench peer sanitizer}
deadline=$(($(date +%s) + ${GPU_CHECKS_SECONDS:-500}))
mkdir -p "$out" || exit 2
work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
summary=$out/summary.txt
: >"$summary"
tests=$(find "$build/tests" -maxdepth 1 -type f -name 'test_cuda_*' | sort)
[ -n "$tests" ] || { echo "no tests/test_cuda_* in $build"; exit 2; }

wanted() { case " $parts " in *" $1 "*) return 0 ;; esac; return 1; }

# least A B
least() { if [ "$1" -lt "$2" ]; then echo "$1"; else echo "$2"; fi; }

# step NAME SECONDS LOG COMMAND...: runs the command within its time and what is left of it all; notes how it went.
step() {
    name=$1 limit=$2 log=$3
    shift 3
    start=$(date +%s)
    limit=$(least "$limit" $((deadline - start)))
    if [ "$limit" -lt 5 ]; then
        echo "NOT RUN $name: no time left" >>"$summary"
        return 1
    fi
    timeout -k 5 "$limit" "$@" >"$log" 2>&1
    rc=$?
    took=$(($(date +%s) - start))
    case $rc in
    0) echo "pass    $name, $took s" >>"$summary" ;;
    124 | 137) echo "TIMEOUT $name, $took s" >>"$summary" ;;
    *) echo "FAIL    $name ($rc), $took s" >>"$summary" ;;
    esac
    return $rc
}

# excerpt NAME LOG: the lines of a log that say what failed.
excerpt() {
    echo "--- $1"
    grep -v -E '^ *$|passed$|CUnit|http|Run Summary|^ *(suites|asserts)|Elapsed' "$2" | cut -c 1-170 | head -n 9
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null | tee -a "$summary"

if wanted tests; then
    for program in $tests; do
        name=$(basename "$program")
        step "$name" 120 "$work/$name" "$program" || [ ! -f "$work/$name" ] || excerpt "$name" "$work/$name"
        [ ! -f "$work/$name" ] || { echo "=== $name"; cat "$work/$name"; } >>"$out/tests.log"
        grep -h -E '^cuda_.*(passed|FAILED|skipped)' "$work/$name" 2>/dev/null | sed 's/^/        /' >>"$summary"
    done
fi

if wanted bench; then
    step bench_kernels 100 "$out/bench.txt" "$build/bench/bench_kernels" --output "$out/bench.json"
    grep -v -E 'rows, (qkv|o|gate_up|down) |sample temperature|top_k|, 32 rows' "$out/bench.txt" 2>/dev/null |
        sed 's/  */ /g'
fi

if wanted peer; then
    ours=
    [ ! -s "$out/bench.json" ] || ours="--ours $out/bench.json"
    # shellcheck disable=SC2086 # two words, or none
    step attention_peer 90 "$work/peer" python3 "$source/attention_peer.py" --output "$out/peer.json" $ours
    grep -E 'ratio|Error|error' "$work/peer" | grep -v '"' | sed 's/  */ /g' | head -n 30
fi

# One program under the three tools, each with a log of its own.
sanitize() {
    for tool in memcheck racecheck synccheck; do
        step "$2 $tool" 100 "$work/$2.$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 8 \
            "$1" --quick || { echo "--- $2 $tool"; grep '^=====' "$work/$2.$tool" | cut -c 1-150 | head -n 9; }
    done
}

if wanted sanitizer; then
    n=0
    for program in $tests; do # four at a time: most of their time is the host's
        sanitize "$program" "$(basename "$program")" &
        n=$((n + 1))
        [ $((n % 4)) -ne 0 ] || wait
    done
    wait
    for log in "$work"/*.memcheck "$work"/*.racecheck "$work"/*.synccheck; do
        [ ! -f "$log" ] || { echo "=== $(basename "$log")"; cat "$log"; } >>"$out/sanitizer.log"
    done
fi

echo "=== summary"
cat "$summary"
! grep -q -E '^(FAIL|TIMEOUT|NOT RUN)' "$summary"
