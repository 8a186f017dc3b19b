# shellcheck shell=sh disable=SC2034,SC2120
# e2e.sh - what the end-to-end tests share: a scratch directory, counting, running the program with a time limit, and
# finding its processes. Sourced by a test that was called with VITRAIL SOURCE_DIR JSON_FIELDS; nothing here knows what
# a test is about. Every process started through `start` carries a mark in its environment, so that a test can tell
# that nothing of it is left, whatever became of mpirun.
set -u
vitrail=$1 source_dir=$2 json_fields=$3
cd "$source_dir" || exit 2
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none
export ASAN_OPTIONS="${ASAN_OPTIONS:-detect_leaks=0}" # MPI leaks by itself
mpirun=${MPIEXEC:-mpirun}
work=$(mktemp -d)
out=$work/out err=$work/err
: >"$out" && : >"$err"
mark=e2e-$$-$(date +%s%N)
n_passed=0 n_failed=0
# On a GPU host VITRAIL_TEST_DEVICE=cuda, with as many GPUs as ranks.
demo="configs/demo.yaml --device ${VITRAIL_TEST_DEVICE:-cpu}"
images=models/demo-vlm/dev-eval/images

now_ms() { date +%s%3N; }

# marked [RANK] - pids of all processes of this test, or of its rank RANK.
marked() {
    for marked_file in $(grep -l -a -F "E2E_MARK=$mark" /proc/[0-9]*/environ 2>/dev/null); do
        marked_pid=${marked_file#/proc/}
        marked_pid=${marked_pid%/environ}
        [ $# -eq 0 ] || tr '\0' '\n' <"$marked_file" 2>/dev/null | grep -q -x "OMPI_COMM_WORLD_RANK=$1" || continue
        # A zombie waits for its parent and does nothing any more.
        case $(sed 's/.*) //' "/proc/$marked_pid/stat" 2>/dev/null) in '' | Z* | X*) continue ;; esac
        echo "$marked_pid"
    done
}

# A killed mpirun cannot remove the files of Open MPI's own shared memory, and /dev/shm is small in containers: removes
# those that no process has mapped.
sweep_shared_memory() {
    for sweep_file in /dev/shm/vader_segment.*; do
        [ ! -e "$sweep_file" ] || grep -q -s -F "$sweep_file" /proc/[0-9]*/maps || rm -f "$sweep_file"
    done
}

clean_up() {
    for clean_pid in $(marked); do kill -9 "$clean_pid" 2>/dev/null; done
    sweep_shared_memory
    [ ! -d "$work/disk" ] || umount "$work/disk" 2>/dev/null
    rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# wrong MESSAGE - one check failed; shows what the program printed last.
wrong() {
    echo "FAILED: $1"
    tail -c 1500 "$out" | cut -c 1-400 | sed 's/^/    out | /'
    grep -a -v -E '^(---|mpirun|Primary|a non-zero|the job to|  (Process|Exit)|$)' "$err" | tail -n 12 | cut -c 1-400 | sed 's/^/    err | /'
    n_failed=$((n_failed + 1))
}
right() { n_passed=$((n_passed + 1)); }

# check MESSAGE COMMAND... - the command succeeds.
check() {
    check_message=$1
    shift
    if "$@"; then right; else wrong "$check_message"; fi
}

# says WORDS - the program's outputs have the words.
says() { grep -q -a -F -e "$1" "$out" "$err"; }

# one_line_of_error COUNT - as many lines of ours on standard error.
lines_of_error() { [ "$(grep -a -c '^vitrail: ' "$err")" -eq "$1" ]; }

# expect CODE WORDS COMMAND... - runs it: the exit code, and WORDS in what it printed; an error is exactly one line.
expect() {
    expect_code=$1 expect_words=$2
    shift 2
    timeout 300 "$@" >"$out" 2>"$err" </dev/null
    got=$?
    expect_lines=1
    [ "$expect_code" -ne 0 ] || expect_lines=0
    if [ $got -ne "$expect_code" ]; then
        wrong "$* gave $got, wanted $expect_code"
    elif ! says "$expect_words"; then
        wrong "$* did not say: $expect_words"
    elif ! lines_of_error $expect_lines; then
        wrong "$* printed other than $expect_lines lines of error"
    else
        right
    fi
}

# start RANKS ARGUMENTS... - the program in the background; $job is the pid to wait for. A shell's background job
# ignores SIGINT, a program that a person starts does not.
start() {
    start_ranks=$1
    shift
    : >"$out" && : >"$err"
    if [ "$start_ranks" -eq 0 ]; then
        env --default-signal=INT "E2E_MARK=$mark" "$vitrail" "$@" >"$out" 2>"$err" </dev/null &
    else
        env --default-signal=INT "E2E_MARK=$mark" "$mpirun" -np "$start_ranks" "$vitrail" "$@" >"$out" 2>"$err" \
            </dev/null &
    fi
    job=$!
}

# until_true SECONDS COMMAND... - waits for the command to succeed.
until_true() {
    until_end=$(($(now_ms) + 1000 * $1))
    shift
    until "$@"; do
        [ "$(now_ms)" -lt $until_end ] || return 1
        sleep 0.05
    done
}

nothing_marked() { [ -z "$(marked)" ]; }

# all_gone SECONDS - every process of `start` ends within the time, and none is left; sets $code.
all_gone() {
    gone_start=$(now_ms)
    if ! until_true "$1" nothing_marked; then
        wrong "after $1 s there are still processes: $(for p in $(marked); do
            tr '\0' ' ' <"/proc/$p/cmdline" | cut -c 1-60
            sed 's/.*) \(.\).*/(state \1); /' "/proc/$p/stat"
        done)"
        for gone_pid in $(marked); do kill -9 "$gone_pid"; done
    fi
    wait "$job"
    code=$?
    took=$(($(now_ms) - gone_start))
}

# ends TITLE - the last line of a test, and its exit code.
ends() {
    echo "$1: $n_passed passed, $n_failed failed"
    [ $n_failed -eq 0 ]
}
