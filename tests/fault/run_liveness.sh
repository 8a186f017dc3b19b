#!/bin/bash
# run_liveness.sh PROGRAM - kills, stops, hangs and breaks each rank of liveness_program in each phase, and checks that
# all processes are gone within 10 s, that one line names the rank and the phase, and that the exit code tells.
# Cases run two at a time: most of their time is waiting. Ends in "N passed, N failed".
set -u
program=$1
mpirun=${MPIEXEC:-mpirun}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
export OMPI_MCA_hwloc_base_binding_policy=none
limit=10

now_ms() { date +%s%3N; }
fail() { echo "FAIL $name: $*"; sed 's/^/    | /' "$dir/err"; echo failed >"$dir/failed"; }

# launch RANKS ARGUMENTS... - starts the program (without mpirun for 1 rank) and waits until all ranks are in their phase.
launch() {
    local ranks=$1 waited=0
    : >"$dir/out"
    shift
    # A shell's background job ignores SIGINT; a program that a person starts does not.
    local start=(env --default-signal=INT)
    [ "$ranks" = 1 ] || start+=("$mpirun" -n "$ranks")
    "${start[@]}" "$program" "$@" mark="$dir/mark" >"$dir/out" 2>"$dir/err" &
    job=$!
    until [ "$(grep -c '^ready' "$dir/out")" = "$ranks" ]; do
        sleep 0.05
        waited=$((waited + 1))
        if [ $waited -gt 600 ]; then fail "the ranks did not start"; kill -9 $job; return 1; fi
    done
    pids=$(awk '$1 == "ready" { print $3 }' "$dir/out")
    sleep 0.4
    started=$(now_ms)
}
pid_of() { awk -v r="$1" '$1 == "ready" && $2 == r { print $3 }' "$dir/out"; }

alive() { local p; for p in $job $pids; do if [ -d "/proc/$p" ] && ! grep -q '^State:.Z' "/proc/$p/status"; then return 0; fi; done 2>/dev/null; return 1; }

# gone - waits for the end of all processes; sets rc.
gone() {
    while alive; do
        if [ $(($(now_ms) - started)) -gt $((limit * 1000)) ]; then
            fail "still running after $limit s"
            kill -9 $job $pids 2>/dev/null
            break
        fi
        sleep 0.05
    done
    wait $job
    rc=$?
    took=$(($(now_ms) - started))
}

# one_line PATTERN - standard error has exactly one line of ours, and it matches.
one_line() {
    local count
    count=$(grep -c '^vitrail:' "$dir/err")
    [ "$count" = 1 ] || fail "$count lines of ours instead of 1"
    grep -Eq "^vitrail: $1" "$dir/err" || fail "no line matches: $1"
}
code() { case " $* " in *" $rc "*) ;; *) fail "exit code $rc, expected one of: $*" ;; esac; }
# Segments have random names, so they can be laid at our door only while no other job makes any.
segments() { ls /dev/shm 2>/dev/null | grep '^vitrail-' | sort; }
jobs_running() { cat /proc/[0-9]*/comm 2>/dev/null | grep -c '^mpirun$'; }
before=$(segments) alone=$(jobs_running)
nothing_left() {
    [ "$alone" = 0 ] || { echo "skip shm: other jobs run beside this test"; return; }
    [ "$(segments)" = "$before" ] || fail "shared memory left behind"
}

case_death() { # SIGNAL RANKS RANK PHASE
    local victim how
    launch "$2" "$4" || return
    victim=$(pid_of "$3")
    kill "-$1" "$victim"
    gone
    case $1 in KILL) how='died' ;; *) how='stopped responding' ;; esac
    one_line "rank $3 \\(pid $victim\\) $how during $4, step [0-9]+: .*; all ranks stop\$"
    code 5 137
}
case_error() { # RANKS RANK
    launch "$1" decode "fail=$2:30" || return
    gone
    if [ "$1" = 1 ]; then one_line 'the test says so$'; else one_line "stopped by rank $2: the test says so\$"; fi
    code 6
}
case_fault() { # RANKS SPEC PATTERN CODES...
    local ranks=$1 spec=$2 pattern=$3
    shift 3
    launch "$ranks" decode watchdog=2 "fault=$spec" || return
    gone
    one_line "$pattern"
    code "$@"
}
quiet_end() { # RANKS
    [ "$(grep -c '^vitrail:' "$dir/err")" = 0 ] || fail "a stop in good order printed an error"
    [ "$(grep -c '^work' "$dir/mark" 2>/dev/null)" = "$1" ] && grep -q '^clean 0' "$dir/mark" || fail "not all ranks ended in good order"
}
case_stop() { # SIGNAL RANKS PHASE TARGET(job or rank) CODES...
    local signal=$1 ranks=$2 target=$4
    launch "$2" "$3" || return
    if [ "$target" = job ]; then target=$job; else target=$(pid_of "$target"); fi
    shift 4
    kill "-$signal" "$target"
    gone
    quiet_end "$ranks"
    code "$@"
}
case_deaf() { # SIGNAL COUNT CODE - a program that does not stop is ended: by a second signal, or after the grace
    local i
    launch 1 idle deaf || return
    for ((i = 0; i < $2; i++)); do kill "-$1" $job; sleep 0.8; done
    gone
    one_line 'ended by .* before the work was finished$'
    code "$3"
}
case_pause() { # everybody is stopped for longer than the limit and wakes up in any order: nobody is accused
    local p
    launch 2 decode || return
    kill -STOP $job $pids
    sleep 6
    for p in $(echo $pids | tac -s ' ') $job; do kill -CONT "$p"; sleep 0.3; done
    sleep 1
    started=$(now_ms)
    kill -TERM $job
    gone
    quiet_end 2
}

# check CASE ARGUMENTS... - runs a case beside one other.
check() {
    while [ "$(jobs -rp | wc -l)" -ge 2 ]; do sleep 0.05; done
    (
        name="$*"
        dir=$(mktemp -d "$work/case.XXXXXX")
        "case_$1" "${@:2}"
        [ -e "$dir/failed" ] || echo "ok   $name (${took:-?} ms, exit code $rc)"
        [ -e "$dir/failed" ] && echo x >>"$work/failed" || echo x >>"$work/passed"
    ) &
}

for rank in 0 1; do
    for phase in load decode idle; do check death STOP 2 $rank $phase; done
done
for rank in 0 1 2; do check death STOP 3 $rank decode; done
for phase in load decode idle; do
    for rank in 0 1; do check death KILL 2 $rank $phase; done
    for rank in 0 1 2; do check death KILL 3 $rank $phase; done
done
check error 2 0
check error 2 1
check error 3 1
check error 1 0
check fault 2 rank=1,phase=decode,call=300,action=hang 'rank 1 \(pid [0-9]+\) hung during decode, step [0-9]+: no progress for 2 s' 5
check fault 3 rank=0,phase=decode,call=300,action=hang 'rank 0 \(pid [0-9]+\) hung during decode' 5
check fault 3 rank=2,phase=decode,call=300,action=error 'stopped by rank 2: injected fault' 5
check fault 2 rank=0,phase=decode,call=300,action=exit 'rank 0 \(pid [0-9]+\) died during decode' 5 9
check stop TERM 2 decode job 143 1
check stop INT 2 idle job 130 143 1
check stop TERM 3 decode 1 143
check stop INT 1 decode job 130
check deaf TERM 2 143
check deaf INT 1 130
check pause
wait
name=shm dir=$work
: >"$work/err"
nothing_left
[ -e "$work/failed" ] || : >"$work/failed"
passed=$(wc -l <"$work/passed")
failed=$(wc -l <"$work/failed")
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
