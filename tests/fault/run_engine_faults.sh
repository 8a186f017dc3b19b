#!/bin/sh
# run_engine_faults.sh VITRAIL SOURCE_DIR JSON_FIELDS [short | CASES] - breaks, kills, stops and hangs each rank of the real
# program in each start-up phase and while it answers, and checks that all processes are gone within 10 s, that one line
# names the rank and the phase, and that the exit code tells. Cases run four at a time: most of their time is waiting.
# `short` is one case of each kind, for slow builds; CASES is an extended regular expression that selects some. Ends in
# "N passed, N failed".
. "$(dirname "$0")/../e2e/e2e.sh"
short='' cases=${4:-.} n_workers=${FAULT_WORKERS:-4}
[ "$cases" != short ] || short=yes cases=. n_workers=2
options="--config $demo --log-level error"
long_answer="--prompt hello --max-tokens 3900 --ignore-eos"

# pattern EXTENDED-REGULAR-EXPRESSION - standard error has exactly one line of ours, and it matches.
pattern() {
    if ! lines_of_error 1; then
        wrong "$name: $(grep -a -c '^vitrail: ' "$err") lines of error instead of one"
    elif ! grep -a -E -q "^vitrail: $1" "$err"; then
        wrong "$name: no line matches: $1"
    fi
}
code_is() { case " $* " in *" $code "*) ;; *) wrong "$name: exit code $code, wanted one of: $*" ;; esac; }

# case_start RANKS RANK PHASE ACTION COMMAND... - a fault in a phase of the start-up. The limit counts from the start of
# the program, so an undisturbed start's time comes on top of it.
case_start() {
    ranks=$1 rank=$2 phase=$3 action=$4
    shift 4
    # A stopped rank is found by its heartbeat; where there is none yet, by the time that the start takes.
    timeout=300
    case $phase-$action in start-* | *-hang) timeout=5 ;; esac
    start "$ranks" "$@" --watchdog-timeout $timeout --inject-fault "rank=$rank,phase=$phase,action=$action"
    all_gone "$start_limit"
    where="during $phase(, step [0-9]+)?: "
    case $phase-$action in
        *-error) pattern "(stopped by )?rank $rank: .*injected fault at collective 1 in $phase" ;;
        # Before the heartbeats are there nobody can tell who is missing; mpirun's notice does, if a process ended.
        start-kill | start-exit) lines_of_error 0 || wrong "$name: an error line from nowhere" ;;
        start-*) pattern "rank [0-9]+: .*start" ;;
        *-kill | *-exit) pattern "rank $rank \(pid [0-9]+\) died $where" ;;
        *-stop) pattern "rank $rank \(pid [0-9]+\) stopped responding $where" ;;
        *-hang) pattern "rank $rank \(pid [0-9]+\) hung $where" ;;
    esac
    case $action in exit) code_is 5 9 ;; kill | stop) code_is 5 137 ;; *) code_is 5 ;; esac
}

# answering RANKS - rank 0 has printed something, so that all ranks are between prefill and the end.
has_output() { [ -s "$out" ] && [ "$(marked | wc -l)" -gt "$1" ]; }
answering() {
    until_true 60 has_output "$1" || wrong "$name: no answer began"
    sleep 0.3
}

# signal_rank SIGNAL RANK - sends it and checks the end.
signal_rank() {
    victim=$(marked "$2")
    kill "-$1" "$victim"
    all_gone 10
    case $1 in KILL) verb=died ;; *) verb='stopped responding' ;; esac
    pattern "rank $2 \(pid $victim\) $verb during (decode|prefill), step [0-9]+: .*; all ranks stop\$"
    code_is 5 137
}

case_generate() { # SIGNAL RANKS RANK
    start "$2" generate $options $long_answer
    answering "$2"
    signal_rank "$1" "$3"
}

case_batch() { # SIGNAL RANKS RANK
    start "$2" batch $options --input "$work/jobs.jsonl" --output "$out.jsonl"
    until_true 60 test -s "$out.jsonl" || wrong "$name: no record was written"
    signal_rank "$1" "$3"
    "$json_fields" "$out.jsonl" custom_id >"$out" 2>"$err" || wrong "$name: the output is not whole lines"
}

# The launcher itself: its ranks see it go.
case_launcher() { # RANKS
    start "$1" generate $options $long_answer
    answering "$1"
    kill -KILL $job
    all_gone 10
}

# NCCL's start alone is seconds without progress.
case_hang() { # RANKS RANK PHASE CALL - a living rank that makes no progress, found by the watchdog
    if [ "${VITRAIL_TEST_DEVICE:-cpu}" = cpu ]; then seconds=2; else seconds=8; fi
    start "$1" generate $options $long_answer --watchdog-timeout $seconds \
        --inject-fault "rank=$2,phase=$3,call=$4,action=hang"
    all_gone "$start_limit"
    pattern "rank $2 \(pid [0-9]+\) hung during $3, step [0-9]+: no progress for $seconds s"
    code_is 5
}

case_sticky() { # RANKS RANK CALL - a kernel of one rank writes where no memory is, in the middle of decode
    start "$1" generate $options $long_answer --inject-fault "rank=$2,phase=decode,call=$3,action=sticky"
    all_gone "$start_limit"
    pattern "stopped by rank $2: .*CUDA: .*illegal memory access"
    code_is 4
}

# What there is to do, one case a line.
list_cases() {
    if [ -n "$short" ]; then
        echo "start 2 1 plan error generate $options --prompt x"
        echo "start 3 0 load kill generate $options --prompt x"
        echo "generate KILL 2 0"
        echo "generate STOP 2 1"
        return
    fi
    for action in stop hang kill exit error; do
        for phase in start config request device model connect open plan memory load warm ready; do
            for rank in 0 1; do echo "start 2 $rank $phase $action generate $options --prompt x"; done
        done
    done
    for action in kill error; do
        for phase in start config request device model connect open plan memory load warm ready; do
            for rank in 0 1 2; do echo "start 3 $rank $phase $action generate $options --prompt x"; done
        done
    done
    rank=0
    for action in stop hang exit; do
        for phase in start config request device model connect open plan memory load warm ready; do
            echo "start 3 $rank $phase $action generate $options --prompt x"
            rank=$(((rank + 1) % 3))
        done
    done
    for action in stop hang kill error; do
        echo "start 2 1 job $action batch $options --input $work/jobs.jsonl --output $work/never-$action"
        echo "start 2 0 questions $action eval $options --questions launch/demo-questions.jsonl"
    done
    for signal in KILL STOP; do
        for rank in 0 1; do echo "generate $signal 2 $rank" && echo "batch $signal 2 $rank"; done
        for rank in 0 1 2; do echo "generate $signal 3 $rank" && echo "batch $signal 3 $rank"; done
    done
    for rank in 0 1; do
        echo "hang 2 $rank decode 300"
        echo "hang 2 $rank prefill 5"
        [ "${VITRAIL_TEST_DEVICE:-cpu}" = cpu ] || echo "sticky 2 $rank 300"
    done
    echo "launcher 2"
    echo "launcher 3"
}

# worker NUMBER - every n-th case; leaves its counts in a file.
worker() {
    out=$work/out$1 err=$work/err$1
    awk -v n="$n_workers" -v me="$1" 'NR % n == me' "$work/cases" >"$work/cases$1"
    while read -r kind rest; do
        name="$kind $(echo "$rest" | sed "s|--config.*||")"
        mark=$mark-$1
        failed_before=$n_failed
        # shellcheck disable=SC2086 # words
        "case_$kind" $rest
        # Limits of seconds are missed where other programs take the cores: once more, and then it counts.
        if [ "$n_failed" -ne "$failed_before" ]; then
            echo "again $name"
            n_failed=$failed_before mark=$mark-again
            rm -f "$out.jsonl"
            # shellcheck disable=SC2086 # words
            "case_$kind" $rest
        fi
        rm -f "$out.jsonl"
        [ "$n_failed" -ne "$failed_before" ] || { right && echo "ok   $name ($took ms, exit code $code)"; }
    done <"$work/cases$1"
    echo "$n_passed $n_failed" >"$work/counts$1"
}

i=0
while [ $i -lt 400 ]; do
    i=$((i + 1))
    echo "{\"custom_id\": \"q$i\", \"body\": {\"messages\": [{\"role\": \"user\", \"content\": \"number $i\"}]," \
        "\"max_tokens\": 200, \"ignore_eos\": true}}"
done >"$work/jobs.jsonl"
began=$(now_ms)
most_ranks=3
[ "${VITRAIL_TEST_DEVICE:-cpu}" = cpu ] || most_ranks=2 # the cases of three need three GPUs
start $most_ranks generate $options --prompt x --max-tokens 2
wait $job || wrong "the program does not answer at all"
start_limit=$((10 + 4 * ($(now_ms) - began) / 1000))
list_cases | grep -E -e "$cases" >"$work/cases"

i=0
while [ $i -lt $n_workers ]; do
    worker $i >"$work/report$i" 2>&1 &
    workers="${workers:-} $!"
    i=$((i + 1))
done
trap 'kill $workers 2>/dev/null; exit 143' TERM
wait
cat "$work"/report*
cat "$work"/counts* | awk '{ passed += $1; failed += $2 } END { print passed " passed, " failed " failed" }' |
    tee "$work/sum"
[ "$(wc -l <"$work/cases")" -eq "$(awk '{ print $1 }' "$work/sum")" ] && grep -q ' 0 failed' "$work/sum"
