#!/bin/sh
# The program as a person starts it: exit codes, one line of error, help, --print-config, tokenize, and errors under
# mpirun. usage: test_command_line.sh VITRAIL SOURCE_DIR
set -u
vitrail=$1
cd "$2" || exit 2
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
n_failed=0

wrong() {
    echo "FAILED: $1" && sed 's/^/    /' "$work/out" "$work/err"
    n_failed=$((n_failed + 1))
}

# expect CODE WORDS COMMAND...: the exit code, and WORDS somewhere in what it printed; errors are one line.
expect() {
    code=$1 words=$2
    shift 2
    timeout 120 "$@" >"$work/out" 2>"$work/err"
    got=$?
    [ $got -eq "$code" ] || wrong "$* gave $got, wanted $code"
    grep -q -F -e "$words" "$work/out" "$work/err" || wrong "$* did not say: $words"
    n=$(grep -c '^vitrail: ' "$work/err")
    want=$([ "$code" -eq 0 ] && echo 0 || echo 1)
    [ "$n" -eq "$want" ] || wrong "$* printed $n lines of error, wanted $want"
}

same() { # FILE FILE MESSAGE
    cmp -s "$1" "$2" || { diff "$1" "$2" >"$work/out"; : >"$work/err"; wrong "$3"; }
}

expect 0 "vitrail 0." "$vitrail" --version
for command in plan tokenize generate batch eval bench; do
    expect 0 "  $command " "$vitrail" --help
    expect 0 "--kv-cache-vl-cache-window-of" "$vitrail" $command --help
done
expect 0 "--max-tokens" "$vitrail" generate -h
expect 2 "no command" "$vitrail"
expect 2 'the nearest is "generate"' "$vitrail" generte
expect 2 "the nearest is --max-num-seqs" "$vitrail" generate --max-num-sequ 3

# Configuration errors name place and cure.
printf 'model: models/demo-vlm\nkv_cache:\n  polisy: full\n' >"$work/bad.yaml"
expect 2 "bad.yaml:3:3: unknown key \"kv_cache.polisy\"; the nearest is \"kv_cache.policy\"" \
    "$vitrail" generate --config "$work/bad.yaml" --prompt x
expect 2 "missing.yaml: cannot open" "$vitrail" generate --config missing.yaml --prompt x
expect 2 "no model" "$vitrail" generate --prompt x
expect 2 "model nowhere: No such file" "$vitrail" tokenize --model nowhere --text x
expect 2 "needs --prompt" "$vitrail" generate --config configs/demo.yaml
expect 2 "budget" "$vitrail" generate --config configs/demo.yaml --kv-budget 0.1,0.2 --prompt x

# Lanes in 8 bits go with policies that read them by ops of their own, on either kind of device.
for device in cpu cuda; do
    expect 0 "it fits" "$vitrail" plan --config configs/demo.yaml --gpus 1 --kv-policy quest --kv-cache-dtype fp8 \
        --device $device
done

# What --print-config prints is a configuration that gives the same; options win over the file.
"$vitrail" generate --config configs/demo.yaml --kv-budget 64t --print-config >"$work/one.yaml"
"$vitrail" generate --config "$work/one.yaml" --print-config >"$work/two.yaml"
same "$work/one.yaml" "$work/two.yaml" "--print-config does not load back"
expect 0 "  budget: 64t" "$vitrail" generate --config "$work/one.yaml" --print-config
expect 0 "max_num_seqs: 8" cat "$work/one.yaml"

# Token ids: a line for each line, also for an empty one and one without an end.
printf 'one line\n\nlast' >"$work/lines"
"$vitrail" tokenize --model models/demo-vlm --file "$work/lines" >"$work/ids"
for text in 'one line' '' last; do "$vitrail" tokenize --model models/demo-vlm --text "$text"; done >"$work/ids2"
same "$work/ids" "$work/ids2" "tokenize --file differs from --text"
[ "$(wc -l <"$work/ids")" -eq 3 ] || wrong "tokenize printed other than 3 lines"
"$vitrail" tokenize --model models/demo-vlm --file - <"$work/lines" >"$work/ids2"
same "$work/ids" "$work/ids2" "tokenize --file - differs"
expect 2 "either --text TEXT or --file FILE" "$vitrail" tokenize --model models/demo-vlm
expect 3 "cannot open" "$vitrail" tokenize --model models/demo-vlm --file "$work/none"
if [ -c /dev/full ]; then
    timeout 60 "$vitrail" generate --help >/dev/full 2>"$work/err"
    [ $? -eq 3 ] || wrong "a full disk under standard output is no error"
fi

# Several ranks: one line for all of them. (The MPI library leaks by itself, which a build with sanitizers would report.)
export ASAN_OPTIONS=detect_leaks=0
expect 2 "tensor_parallel_size is 3, but 2 ranks were started" \
    mpirun -np 2 "$vitrail" generate --config configs/demo.yaml --tp 3 --prompt x
expect 2 "tensor_parallel_size is 4, but 1 rank was started; start with mpirun -np 4" \
    "$vitrail" generate --config configs/demo.yaml --tensor-parallel-size 4 --prompt x
expect 2 "bad.yaml:3:3" mpirun -np 3 "$vitrail" generate --config "$work/bad.yaml" --prompt x
expect 1 "nowhere.png" mpirun -np 2 "$vitrail" generate --config configs/demo.yaml --image nowhere.png --prompt x
if ! [ -e /dev/nvidia0 ]; then
    expect 2 "no GPU" mpirun -np 2 "$vitrail" generate --config configs/demo.yaml --device cuda --prompt x
fi
# Ranks that were started with different options are found out.
expect 5 "differ" mpirun -np 1 "$vitrail" generate --config configs/demo.yaml --prompt x : \
    -np 1 "$vitrail" generate --config configs/demo.yaml --prompt y
expect 5 "differ" mpirun -np 1 "$vitrail" generate --config configs/demo.yaml --prompt x : \
    -np 1 "$vitrail" generate --config configs/demo.yaml --max-num-seqs 3 --prompt x
# A fault at each place of the start-up ends all ranks with one line.
for phase in config request device; do
    expect 5 "rank 1" mpirun -np 2 "$vitrail" generate --config configs/demo.yaml --prompt x \
        --inject-fault "rank=1,phase=$phase,action=error"
done

# A signal ends a long answer in good order: what was said stays, and the code says which signal. (A shell's background
# jobs ignore SIGINT, so this one is SIGTERM.)
"$vitrail" generate --config configs/demo.yaml --prompt x --ignore-eos --max-tokens 4000 >"$work/out" 2>"$work/err" &
pid=$!
for i in $(seq 600); do [ -s "$work/out" ] && break || sleep 0.1; done
kill -TERM $pid
wait $pid
[ $? -eq 143 ] || wrong "SIGTERM did not give 143"
grep -q "; abort$" "$work/err" || wrong "SIGTERM left no summary"

if [ $n_failed -eq 0 ]; then echo "command line: all good"; else echo "command line: $n_failed failed" && exit 1; fi
