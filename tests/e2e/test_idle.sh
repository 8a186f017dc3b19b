#!/bin/sh
# test_idle.sh VITRAIL SOURCE_DIR JSON_FIELDS - ranks that wait between steps use under 2% of a core: a batch job whose
# input is a pipe that stays open without a line, before the first line and after it was answered; and a line that comes
# then is answered.
. "$(dirname "$0")/e2e.sh"
seconds=3

# ticks RANK - processor time of a rank so far, in clock ticks.
ticks() { sed 's/.*) //' "/proc/$(marked "$1")/stat" | awk '{ print $12 + $13 }'; }
# idle WHEN - measures both ranks over the same time.
idle() {
    before0=$(ticks 0) before1=$(ticks 1)
    sleep $seconds
    for idle_rank in 0 1; do
        eval "before=\$before$idle_rank"
        used=$(($(ticks $idle_rank) - before))
        # At 100 ticks a second 2% of a core is 2 ticks a second.
        limit=$((seconds * $(getconf CLK_TCK) * 2 / 100))
        echo "rank $idle_rank $1: $used of $((seconds * $(getconf CLK_TCK))) ticks"
        check "rank $idle_rank $1 used $used ticks in $seconds s, more than $limit" [ "$used" -le "$limit" ]
    done
}
n_records() { [ "$(wc -l <"$work/out.jsonl")" -eq "$1" ]; }

mkfifo "$work/pipe"
start 2 batch --config $demo --input "$work/pipe" --output "$work/out.jsonl" --log-level info
exec 3>"$work/pipe"
until_true 60 grep -q 'rank 1: .* of weights' "$err" || wrong "the model was not loaded"
sleep 1
idle "before the first line"
line='"body": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "ignore_eos": true}}'
echo "{\"custom_id\": \"one\", $line" >&3
until_true 30 n_records 1 || wrong "a line that came was not answered while the pipe stays open"
sleep 1
idle "after an answer"
echo "{\"custom_id\": \"two\", $line" >&3
until_true 30 n_records 2 || wrong "the second line was not answered"
exec 3>&-
all_gone 20
check "the job did not end well: exit code $code" [ "$code" -eq 0 ]
ends idle
