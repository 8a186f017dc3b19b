#!/bin/sh
# test_batch.sh VITRAIL SOURCE_DIR JSON_FIELDS [short] - a batch job of text and image lines on 2 ranks: its records, and
# that whatever is killed at whatever moment, --resume ends it with every line answered once and as an undisturbed job
# answers it. Signals end it in good order, a second job on the same output is refused, a full disk is said and survived.
. "$(dirname "$0")/e2e.sh"
short=${4:-}
n_lines=200 n_kills=14
[ -z "$short" ] || n_lines=12 n_kills=1

# Questions about pages, by file: and by data: URL, among lines of text of all lengths and ways of sampling.
write_jobs() {
    base64 -w 0 "$images/dev-1p-0001.png" >"$work/base64"
    job_line=0
    while [ $job_line -lt $n_lines ]; do
        job_line=$((job_line + 1))
        printf '{"custom_id": "line-%d", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": ' $job_line
        case $((job_line % 40)) in
            5) printf '[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:%s"}}, %s]}]' \
                "$images/dev-1p-00$((10 + job_line / 40)).png" '{"type": "text", "text": "What is the last field?"}' ;;
            25) printf '[{"role": "user", "content": [{"type": "text", "text": "What is the value of DELIVERY?"}, %s' \
                '{"type": "image_url", "image_url": {"url": "data:image/png;base64,' && cat "$work/base64" &&
                printf '"}}]}]' ;;
            *) printf '[{"role": "user", "content": "number %d is \\u00fcber\\n\\ud83d\\ude42"}], "ignore_eos": true' $job_line ;;
        esac
        case $((job_line % 3)) in 0) printf ', "temperature": 0.8, "top_p": 0.9, "seed": %d' $job_line ;; esac
        printf ', "max_tokens": %d}}\n' $((1 + job_line * 7 % 50))
    done
}

# answers FILE - what must not depend on how the job was run: everything but created.
answers() {
    "$json_fields" "$1" custom_id id response.status_code response.request_id response.body.id response.body.model \
        response.body.choices response.body.usage response.body.kv_cache error | sort
}
batch="batch --config $demo --log-level error --input $work/jobs.jsonl"

n_records() { [ ! -e "$work/out.jsonl" ] || wc -l <"$work/out.jsonl"; }

# same_answers WHEN - the output is the undisturbed job's.
same_answers() {
    if ! answers "$work/out.jsonl" >"$work/got" 2>"$err"; then
        wrong "$1: the output is not whole lines of JSON"
    elif ! cmp -s "$work/wanted" "$work/got"; then
        diff "$work/wanted" "$work/got" | cut -c 1-300 >"$out"
        wrong "$1: the answers are not those of an undisturbed job"
    else
        right
    fi
}

# random LIMIT - a number below it.
random() { od -An -N4 -tu4 /dev/urandom | awk -v n="$1" '{ print $1 % n }'; }

undisturbed() {
    began=$(now_ms)
    start 2 $batch --output "$work/whole.jsonl"
    wait $job
    check "a job ended with an error" [ $? -eq 0 ]
    duration=$(($(now_ms) - began))
    check "records are not as they should be" "$json_fields" "$work/whole.jsonl" custom_id >"$work/ids"
    check "not a record a line" [ "$(sort -u "$work/ids" | wc -l)" -eq $n_lines ]
    check "not every line once" [ "$(wc -l <"$work/ids")" -eq $n_lines ]
    answers "$work/whole.jsonl" >"$work/wanted"
    "$json_fields" "$work/whole.jsonl" error 'response.*' 'response.body.*' 'response.body.usage.*' \
        'response.body.kv_cache.*' 'response.body.choices.0.*' | sort -u >"$out"
    printf '%s\t%s\t%s\t%s\t%s\t%s\n' null status_code,request_id,body id,object,created,model,choices,usage,kv_cache \
        prompt_tokens,completion_tokens,total_tokens,image_tokens \
        policy,budget,prompt_tokens,kept_tokens_per_layer,bytes_full,bytes_kept \
        index,message,finish_reason,logprobs >"$work/fields"
    check "the fields of a record are not the documented ones" cmp -s "$out" "$work/fields"
    echo "an undisturbed job of $n_lines lines took $duration ms"
}

# Kills rank 0, rank 1 and mpirun in turn, each time at a random moment from its start on, n_kills times; whenever the job
# got to its end, its answers are compared and it begins again.
kill_at_random() {
    kills=0 resumed=0
    longest=$((1000 + duration / 2))
    [ $longest -lt 5000 ] || longest=5000
    rm -f "$work/out.jsonl"
    while [ $kills -lt $n_kills ]; do
        start 2 $batch --output "$work/out.jsonl" --resume
        delay=$(random $longest)
        sleep "$((delay / 1000)).$(printf %03d $((delay % 1000)))"
        case $((kills % 3)) in 0) victim=$(marked 0) ;; 1) victim=$(marked 1) ;; 2) victim=$job ;; esac
        if [ -n "$victim" ] && kill -0 "$victim" 2>/dev/null; then
            kill -9 "$victim" 2>/dev/null
            kills=$((kills + 1))
        fi
        all_gone 10
        sweep_shared_memory
        [ "$code" -ne 0 ] || { same_answers "after $resumed kills"; rm "$work/out.jsonl"; resumed=-1; }
        resumed=$((resumed + 1))
    done
    echo "$kills kills; at the last one $(n_records) of $n_lines lines were there"
    finish "after $kills kills"
}

# finish WHEN - --resume to the end, and compares.
finish() {
    start 2 $batch --output "$work/out.jsonl" --resume
    wait $job
    check "$1: the resumed job ended with an error" [ $? -eq 0 ]
    same_answers "$1"
}

some_records() { [ -s "$work/out.jsonl" ]; }

# A signal to mpirun: answers under way are given up, the output ends in a whole line, the code tells. mpirun gives the
# ranks one second and then makes the code its own.
stopped_by() { # SIGNAL CODES
    rm -f "$work/out.jsonl"
    start 2 $batch --output "$work/out.jsonl"
    until_true 60 some_records || wrong "$1: no record came"
    kill "-$1" $job
    all_gone 10
    case " $2 " in *" $code "*) right ;; *) wrong "$1: exit code $code, wanted one of: $2" ;; esac
    check "$1: an end in good order is no error" lines_of_error 0
    check "$1: the output is not whole lines" "$json_fields" "$work/out.jsonl" custom_id >"$work/ids"
    check "$1: the job was not stopped before its end" [ "$(wc -l <"$work/ids")" -lt $n_lines ]
    finish "after $1"
}

# While a job writes the output no other may, however long it waits for lines; nor is an output with records begun again
# without --resume.
one_record() { [ -e "$work/second.jsonl" ] && [ "$(wc -l <"$work/second.jsonl")" -eq 1 ]; }
second_job() {
    mkfifo "$work/pipe"
    start 2 batch --config $demo --log-level error --input "$work/pipe" --output "$work/second.jsonl"
    first=$job first_err=$err
    exec 3>"$work/pipe"
    head -n 1 "$work/jobs.jsonl" >&3
    until_true 60 one_record || wrong "second job: no record came"
    err=$work/err2
    expect 2 "$work/second.jsonl: another batch job is writing it" "$vitrail" $batch --output "$work/second.jsonl" --resume
    expect 2 "$work/second.jsonl: another batch job is writing it" "$vitrail" $batch --output "$work/second.jsonl"
    err=$first_err
    exec 3>&-
    wait $first
    check "second job: the first one suffered" [ $? -eq 0 ]
    check "second job: the output was changed" one_record
    expect 2 "$work/second.jsonl exists and has" "$vitrail" $batch --output "$work/second.jsonl"
    expect 2 "is the input and the output" "$vitrail" $batch --output "$work/jobs.jsonl" --resume
}

# A disk that is full is an error that names the file; with room made, the job goes on.
full_disk() {
    mkdir "$work/disk"
    if ! mount -t tmpfs -o size=24k none "$work/disk" 2>/dev/null; then
        echo "full disk: no tmpfs can be mounted here; /dev/full stands in"
        expect 2 "must be a regular file" "$vitrail" $batch --output /dev/full
        return
    fi
    ln -s "$work/disk/out.jsonl" "$work/link.jsonl"
    start 2 $batch --output "$work/disk/out.jsonl"
    wait $job
    check "full disk: exit code not 3" [ $? -eq 3 ]
    check "full disk: not one line of error" lines_of_error 1
    check "full disk: not said" says "$work/disk/out.jsonl: a record of"
    check "full disk: no remedy" says "No space left on device; make room and go on with --resume"
    check "full disk: the output is not whole lines" "$json_fields" "$work/disk/out.jsonl" custom_id >"$work/ids"
    mount -o remount,size=8m "$work/disk"
    start 2 $batch --output "$work/disk/out.jsonl" --resume
    wait $job
    check "full disk: the resumed job ended with an error" [ $? -eq 0 ]
    cp "$work/disk/out.jsonl" "$work/out.jsonl"
    umount "$work/disk"
    same_answers "after a full disk"
}

write_jobs >"$work/jobs.jsonl"
undisturbed
kill_at_random
stopped_by TERM "143 1"
if [ -z "$short" ]; then
    stopped_by INT "130 1"
    second_job
    full_disk
fi
ends batch
