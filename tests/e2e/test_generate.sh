#!/bin/sh
# test_generate.sh VITRAIL SOURCE_DIR JSON_FIELDS - one answer: streamed while it is made, as JSON with the documented
# fields, with raw prompts and several images, repeatable when sampled, and ending well when its reader or its user goes.
. "$(dirname "$0")/e2e.sh"
generate="generate --config $demo --log-level error"
two="$mpirun -np 2 $vitrail"
question='USER: What is the value of NURSE?
<image> ASSISTANT:'

# json COMMAND... - runs it with --json; the line in $out.
json() {
    timeout 120 "$@" --json >"$out" 2>"$err" </dev/null || wrong "$* failed"
    [ "$(wc -l <"$out")" -eq 1 ] || wrong "$* printed other than one line"
}
# field PATH - of the last line.
field() { "$json_fields" "$out" "$1"; }
same() { # WHAT A B
    [ "$2" = "$3" ] && right || wrong "$1: $2 is not $3"
}

# ---- --json: fields, and what they say about a page ----
json $two $generate --raw-prompt --prompt "$question" --image "$images/dev-1p-0000.png"
same "fields" "$(field '*')" text,finish_reason,usage,kv_cache,timing
same "fields of usage" "$(field 'usage.*')" prompt_tokens,completion_tokens,total_tokens,image_tokens
same "fields of kv_cache" "$(field 'kv_cache.*')" \
    policy,budget,prompt_tokens,kept_tokens_per_layer,bytes_full,bytes_kept
same "the answer" "$(field text)" '" Jonas Fisher"'
same "the reason" "$(field finish_reason)" '"stop"'
same "usage" "$(field usage)" '{"prompt_tokens":589,"completion_tokens":3,"total_tokens":592,"image_tokens":576}'
same "policy" "$(field kv_cache.policy) $(field kv_cache.budget) $(field kv_cache.prompt_tokens)" '"vl_cache" 0.1 589'
kept=$(field kv_cache.kept_tokens_per_layer)
same "layers" "$(echo "$kept" | tr ',' '\n' | wc -l)" 10
# A token of one layer is a key and a value of 4 heads of 64 floats: 2048 bytes.
same "bytes kept" "$(field kv_cache.bytes_kept)" "$(echo "$kept" | tr -d '[]' | tr ',' '\n' |
    awk '{ n += $1 } END { print 2048 * n }')"
same "bytes full" "$(field kv_cache.bytes_full)" $((2048 * 10 * 589))
json $two $generate --raw-prompt --prompt "$question" --image "$images/dev-1p-0000.png" --kv-policy full
same "the full cache" "$(field kv_cache.policy) $(field kv_cache.bytes_kept)" "\"full\" $((2048 * 10 * 589))"
same "its layers" "$(field kv_cache.kept_tokens_per_layer)" '[589,589,589,589,589,589,589,589,589,589]'
json $two $generate --prompt x --image "$images/dev-1p-0000.png" --kv-budget 64t --max-tokens 1
same "a budget in tokens" "$(field kv_cache.budget) $(field finish_reason)" '"64t" "length"'

# ---- templates, images ----
json $two $generate --prompt 'What is the value of NURSE?' --image "$images/dev-1p-0000.png" --kv-policy full
same "an answer by the chat template" "$(field text | tr -d ' ')" '"JonasFisher"'
json $two $generate --prompt 'On page 2, what is the last field?' --image "$images/dev-1p-0000.png" \
    --image "$images/dev-1p-0001.png" --kv-policy full --max-tokens 12
same "two images" "$(field usage.image_tokens)" 1152
two_images=$(field text)
json "$vitrail" $generate --prompt 'On page 2, what is the last field?' --image "$images/dev-1p-0000.png" \
    --image "$images/dev-1p-0001.png" --kv-policy full --max-tokens 12
same "two images on one rank" "$(field text)" "$two_images"

# ---- sampling ----
sampled="$generate --prompt hello --ignore-eos --max-tokens 24 --temperature 1.5"
json $two $sampled --seed 7 && first=$(field text)
json $two $sampled --seed 7 && same "the same seed" "$(field text)" "$first"
json "$vitrail" $sampled --seed 7 && same "the same seed on one rank" "$(field text)" "$first"
json $two $sampled --seed 8 && other=$(field text)
check "another seed gives the same text" [ "$first" != "$other" ]
json $two $generate --prompt hello --ignore-eos --max-tokens 24 --temperature 0 && greedy=$(field text)
json $two $sampled --seed 7 --top-k 1 && same "--top-k 1" "$(field text)" "$greedy"
json $two $sampled --seed 7 --top-p 0.000001 && same "--top-p near 0" "$(field text)" "$greedy"
json $two $sampled --seed 7 --min-p 1 && same "--min-p 1" "$(field text)" "$greedy"
json $two $generate --prompt hello --ignore-eos --max-tokens 24 --repetition-penalty 5 && repeated=$(field text)
check "--repetition-penalty changes nothing" [ "$greedy" != "$repeated" ]
json $two $generate --prompt hello --ignore-eos --max-tokens 24 --presence-penalty 2 --frequency-penalty 2
check "--presence-penalty and --frequency-penalty change nothing" [ "$greedy" != "$(field text)" ]
json $two $generate --prompt hello --min-tokens 24 --max-tokens 24
same "--min-tokens" "$(field usage.completion_tokens) $(field finish_reason)" '24 "length"'
# Stopped before a text: what was there up to it, and not a letter of it.
stop=$(echo "$greedy" | tr -d '"' | cut -c 9-12)
json $two $generate --prompt hello --ignore-eos --max-tokens 24 --stop "$stop" --stop "@@@"
same "--stop" "\"$(field text | tr -d '"')$stop" "\"$(echo "$greedy" | tr -d '"' | sed "s/\(.*\)/\1/; s/\($stop\).*/\1/")"
same "--stop ends the answer" "$(field finish_reason)" '"stop"'

# ---- streaming ----
# What is printed is the text of --json, and a newline.
timeout 120 $two $generate --prompt hello --ignore-eos --max-tokens 24 --temperature 0 >"$out" 2>"$err" </dev/null
printf '{"text":%s}\n' "$greedy" >"$work/greedy"
same "streamed text" "$(cat "$out")" "$(echo "$greedy" | sed 's/^"//; s/"$//')"
# It comes while the answer is being made: the first piece long before the last.
start 2 $generate --prompt hello --ignore-eos --max-tokens 3000
until_true 60 test -s "$out" || wrong "nothing was streamed"
early=$(wc -c <"$out")
check "the answer came in one piece, at its end" kill -0 $job
sleep 0.5
check "the stream stopped" [ "$(wc -c <"$out")" -gt "$early" ]
# Ctrl-C ends it in good order: what was said stays, and the summary tells.
kill -INT $job
all_gone 10
case $code in 130 | 1) right ;; *) wrong "Ctrl-C under mpirun: exit code $code" ;; esac
check "Ctrl-C is no error" lines_of_error 0
start 0 $generate --prompt hello --ignore-eos --max-tokens 3900
until_true 60 test -s "$out" || wrong "nothing was streamed on one rank"
kill -INT $job
all_gone 10
same "Ctrl-C on one rank" "$code" 130
check "Ctrl-C on one rank is no error" lines_of_error 0
check "no summary after Ctrl-C" grep -q '; abort$' "$err"

# ---- a reader that goes: our own end, and mpirun's, which reads what the ranks write and gives up by itself ----
for ranks in 1 2; do
    command=$vitrail closed="1 3"
    [ $ranks -eq 1 ] || command=$two closed="1 1"
    { E2E_MARK=$mark timeout 60 $command $generate --prompt hello --ignore-eos --max-tokens 3900 2>"$err"
      echo $? >"$work/code"; } | head -c 1 >"$out"
    check "a closed pipe left processes on $ranks ranks" until_true 5 nothing_marked
    code=$(cat "$work/code")
    # Open MPI 4.1's mpirun may crash as it gives up (PMIx_Finalize), or die of the closed pipe itself (SIGPIPE, 141); what
    # counts is that nothing is left.
    if [ $ranks -eq 2 ] && [ "$code" -eq 139 ] && grep -q PMIx_Finalize "$err"; then continue; fi
    if [ $ranks -eq 2 ] && [ "$code" -eq 141 ]; then continue; fi
    same "a closed pipe on $ranks ranks" "$(wc -c <"$out") $code" "$closed"
    check "a closed pipe is other than one line of error on $ranks ranks" lines_of_error $((2 - ranks))
done
expect 3 "cannot write" sh -c "\"$vitrail\" $generate --prompt hello --max-tokens 8 >/dev/full"
expect 3 "cannot write" sh -c "\"$vitrail\" $generate --prompt hello --max-tokens 8 --json >/dev/full"
ends generate
