#!/bin/sh
# test_batch_long.sh VITRAIL SOURCE_DIR JSON_FIELDS - a job of 2,000 lines on 2 ranks of a tiny model with random weights:
# every line once, and no rank's memory grows between a quarter of the job and its end.
. "$(dirname "$0")/e2e.sh"
n_lines=2000 growth_kb=1024

mkdir "$work/model"
cp models/demo-vlm/tokenizer.json models/demo-vlm/tokenizer_config.json "$work/model"
cat >"$work/model/config.json" <<END
{"model_type": "llama", "vocab_size": 1536, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
 "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
 "rms_norm_eps": 1e-05, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2}
END
awk -v n=$n_lines 'BEGIN {
    for (i = 1; i <= n; i++) {
        words = ""
        for (k = 0; k < i % 30; k++) words = words " word" i + k
        printf "{\"custom_id\": \"%d\", \"body\": {\"messages\": [{\"role\": \"user\", \"content\": \"%s\"}], ", i, "line" words
        printf "\"max_tokens\": %d, \"ignore_eos\": true}}\n", 1 + i % 12
    }
}' >"$work/jobs.jsonl"

rss() { awk '/^VmRSS/ { print $2 }' "/proc/$1/status" 2>/dev/null; }
ready() { [ -s "$work/out.jsonl" ]; }

start 2 batch --model "$work/model" --load-format dummy --chat-template chatml --device cpu --max-num-seqs 32 \
    --log-level error --input "$work/jobs.jsonl" --output "$work/out.jsonl"
began=$(now_ms)
until_true 60 ready || wrong "no record came"
pid0=$(marked 0) pid1=$(marked 1)
quarter0='' quarter1='' most0=0 most1=0 at=0
while kill -0 $job 2>/dev/null; do
    done_lines=$(wc -l <"$work/out.jsonl")
    now0=$(rss "$pid0") now1=$(rss "$pid1")
    if [ -n "$now0" ] && [ -n "$now1" ]; then
        if [ -z "$quarter0" ] && [ "$done_lines" -ge $((n_lines / 4)) ]; then quarter0=$now0 quarter1=$now1; fi
        if [ -n "$quarter0" ]; then
            [ "$now0" -le $most0 ] || most0=$now0
            [ "$now1" -le $most1 ] || most1=$now1
            at=$done_lines
        fi
    fi
    sleep 0.05
done
wait $job
check "the job failed" [ $? -eq 0 ]
echo "$n_lines lines in $(($(now_ms) - began)) ms; resident at a quarter $quarter0 and $quarter1 KiB," \
    "at most $most0 and $most1 later, up to line $at"
check "the output is not whole lines" "$json_fields" "$work/out.jsonl" custom_id response.status_code >"$work/ids"
check "not every line once" [ "$(sort -u "$work/ids" | grep -c '200$')" -eq $n_lines ]
check "more records than lines" [ "$(wc -l <"$work/ids")" -eq $n_lines ]
check "memory was not measured" [ "$at" -ge $((n_lines * 3 / 4)) ] && [ -n "$quarter0" ] &&
    check "rank 0 grew from $quarter0 to $most0 KiB" [ $((most0 - quarter0)) -le $growth_kb ] &&
    check "rank 1 grew from $quarter1 to $most1 KiB" [ $((most1 - quarter1)) -le $growth_kb ]
ends "long batch"
