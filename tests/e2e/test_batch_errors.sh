#!/bin/sh
# test_batch_errors.sh VITRAIL SOURCE_DIR JSON_FIELDS - lines that cannot be answered among lines that can: each gets an
# error record that names its custom_id or its line and says what is wrong, the others are answered, the exit code is 1,
# and --resume does none of it again. Then jobs that cannot begin at all.
. "$(dirname "$0")/e2e.sh"

jobs=$work/jobs.jsonl
n_wanted=0
: >"$jobs" && : >"$work/wanted"
# line TEXT - a line of the job. bad NAME WORDS TEXT - one that fails; NAME is its custom_id or its line number.
line() { printf '%s\n' "$1" >>"$jobs"; }
bad() {
    line "$3"
    printf '%s\t%s\n' "$1" "$2" >>"$work/wanted"
    n_wanted=$((n_wanted + 1))
}
here() { wc -l <"$jobs" | awk '{ print $1 + 1 }'; }
# ask ID CONTENT [FIELDS] - a line with one message; CONTENT is JSON.
ask() {
    printf '{"custom_id": "%s", "body": {"messages": [{"role": "user", "content": %s}], "max_tokens": 4%s}}' \
        "$1" "$2" "${3:-}"
}
picture() { printf '[{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "%s"}}]' "$1"; }

mkdir "$work/media" "$work/outside"
cp "$images/dev-1p-0002.png" tests/e2e/tall.png "$work/media"
cp "$images/dev-1p-0002.png" "$work/outside/secret.png"
ln -s "$work/outside/secret.png" "$work/media/link.png"
head -c 2000 "$images/dev-1p-0002.png" >"$work/media/cut.png"
echo "no picture" >"$work/media/text.png"
mkfifo "$work/media/pipe.png"
awk 'BEGIN { for (i = 0; i < 6000; i++) printf "word%d ", i }' >"$work/words"

line "$(ask good-1 '"hello"')"
bad "$(here)" "invalid_json" '{"custom_id": "cut", "body": {"messages": '
bad "$(here)" "invalid_json" 'hello'
bad "$(here)" "invalid_request" '[1, 2]'
bad "$(here)" "invalid_json" "$(ask two-values '"x"') {}"
bad "$(here)" "invalid_json" '{"custom_id": "twice", "custom_id": "twice", "body": {}}'
# Bytes that are no UTF-8 become U+FFFD, as tokenizers have it; they are no error.
line "$(ask good-6 "$(printf '"not \303\050 UTF-8"')")"
bad "$(here)" "invalid_json" "$(awk 'BEGIN { for (i = 0; i < 100000; i++) printf "[" }')"
line ""
line "$(ask good-2 '"hello"')"
bad "$(here)" "duplicate_custom_id" "$(ask good-1 '"again"')"
bad "$(here)" "custom_id must be a string" '{"custom_id": 7, "body": {"messages": []}}'
bad "$(here)" "custom_id must be a string" '{"body": {"messages": []}}'
bad "$(here)" "custom_id must be a string" "$(ask '' '"x"')"
bad no-body "line $(here): body must be an object" '{"custom_id": "no-body"}'
bad method "line $(here): method must be" '{"custom_id": "method", "method": "GET", "body": {}}'
bad url "line $(here): url must be" '{"custom_id": "url", "url": "/v1/embeddings", "body": {}}'
bad messages "messages must be a list" '{"custom_id": "messages", "body": {"messages": "hello"}}'
bad no-messages "messages" '{"custom_id": "no-messages", "body": {"messages": []}}'
bad role "messages[0].role" '{"custom_id": "role", "body": {"messages": [{"role": "king", "content": "x"}]}}'
bad content "messages[0].content" '{"custom_id": "content", "body": {"messages": [{"role": "user", "content": 5}]}}'
bad part "messages[0].content[0].type" "$(ask part '[{"type": "video", "text": "x"}]')"
bad max-tokens "max_completion_tokens must be an integer" "$(ask max-tokens '"x"' ', "max_completion_tokens": "many"')"
bad zero-tokens "max_tokens" '{"custom_id": "zero-tokens", "body": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}}'
bad temperature "temperature" "$(ask temperature '"x"' ', "temperature": -1')"
bad top-p "top_p" "$(ask top-p '"x"' ', "top_p": 1.5')"
bad seed "seed" "$(ask seed '"x"' ', "seed": 0.5')"
bad stop "stop" "$(ask stop '"x"' ', "stop": [1]')"
bad tools "tools is not served" "$(ask tools '"x"' ', "tools": [{"type": "function"}]')"
bad choices "n must be 1" "$(ask choices '"x"' ', "n": 3')"
bad kv-cache "kv_cache.policy" "$(ask kv-cache '"x"' ', "kv_cache": {"policy": "full"}')"
bad budget "budget" "$(ask budget '"x"' ', "kv_cache": {"budget": 2}')"
bad long "max_model_len is 4096" "$(ask long "\"$(cat "$work/words")\"")"
bad long-answer "max_model_len" '{"custom_id": "long-answer", "body": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5000}}'
bad missing "nowhere.png" "$(ask missing "$(picture file:nowhere.png)")"
line "$(ask good-3 "$(picture "file:$work/media/dev-1p-0002.png")")"
bad missing-here "none.png): " "$(ask missing-here "$(picture "file://$work/media/none.png")")"
bad tall "1 x 20000 pixels" "$(ask tall "$(picture "file:$work/media/tall.png")")"
bad escape "allowed_local_media_path" "$(ask escape "$(picture "file:$work/media/../outside/secret.png")")"
bad escape-hidden "allowed_local_media_path" "$(ask escape-hidden "$(picture "file:$work/media/%2e%2e/outside/secret.png")")"
bad absolute "allowed_local_media_path" "$(ask absolute "$(picture file:///etc/passwd)")"
bad link "symbolic link" "$(ask link "$(picture "file:$work/media/link.png")")"
bad pipe "not a regular file" "$(ask pipe "$(picture "file:$work/media/pipe.png")")"
bad cut-image "cut.png" "$(ask cut-image "$(picture "file:$work/media/cut.png")")"
bad no-image "text.png" "$(ask no-image "$(picture "file:$work/media/text.png")")"
bad network "http" "$(ask network "$(picture http://127.0.0.1/a.png)")"
bad network-tls "https" "$(ask network-tls "$(picture https://localhost/a.png)")"
bad base64 "base64" "$(ask base64 "$(picture 'data:image/png;base64,%%%%')")"
bad gif "media type" "$(ask gif "$(picture 'data:image/gif;base64,AAAA')")"
line "$(ask good-4 '"hello"')"
# The last line has no newline.
printf '%s' "$(ask good-5 '"hello"')" >>"$jobs"
n_good=6

batch="batch --config $demo --log-level error --input $jobs --output $work/out.jsonl"
batch="$batch --allowed-local-media-path $work/media"
check_records() { # WHEN
    check "$1: the output is not whole lines of JSON" "$json_fields" "$work/out.jsonl" custom_id line error.code \
        error.message response.status_code >"$work/records"
    check "$1: not a record a line" [ "$(wc -l <"$work/records")" -eq $((n_wanted + n_good)) ]
    check "$1: a good line was not answered" \
        [ "$(awk -F '\t' '$1 ~ /^"good-[1-6]"$/ && $2 == "-" && $5 == "200"' "$work/records" | wc -l)" -eq $n_good ]
    while IFS="$(printf '\t')" read -r name words; do
        case $name in
            [0-9]*) awk -F '\t' -v n="$name" '$2 == n' "$work/records" >"$work/record" ;;
            *) awk -F '\t' -v id="\"$name\"" '$1 == id && $2 == "-"' "$work/records" >"$work/record" ;;
        esac
        if [ "$(wc -l <"$work/record")" -ne 1 ]; then
            wrong "$1: $(wc -l <"$work/record") records of $name"
        elif ! grep -q -F -e "$words" "$work/record"; then
            cp "$work/record" "$out"
            wrong "$1: the record of $name does not say: $words"
        elif ! grep -q -E -e "\"($name|line [0-9]+):" "$work/record"; then
            cp "$work/record" "$out"
            wrong "$1: the message does not begin with $name"
        else
            right
        fi
    done <"$work/wanted"
}

expect 1 "$n_wanted of $((n_wanted + n_good)) lines failed; their error records stand in $work/out.jsonl" \
    "$mpirun" -np 2 "$vitrail" $batch
check_records "a job with errors"
sort "$work/out.jsonl" >"$work/before"
# Nothing is left to do: a resumed job says the same and writes nothing.
expect 1 "$n_wanted of $((n_wanted + n_good)) lines failed" "$mpirun" -np 2 "$vitrail" $batch --resume
sort "$work/out.jsonl" >"$work/after"
check "a finished job was run again" cmp -s "$work/before" "$work/after"
# Without its end it is done again: what was cut off, and no more.
size=$(wc -c <"$work/out.jsonl")
head -c $((size - 700)) "$work/out.jsonl" >"$work/part" && mv "$work/part" "$work/out.jsonl"
expect 1 "$n_wanted of" "$mpirun" -np 2 "$vitrail" $batch --resume
check_records "a resumed job with errors"
"$json_fields" "$work/out.jsonl" custom_id line error response.body.choices | sort >"$work/again"
mv "$work/before" "$work/before.jsonl"
"$json_fields" "$work/before.jsonl" custom_id line error response.body.choices | sort >"$work/first"
check "the resumed job answers differently" cmp -s "$work/again" "$work/first"

# Jobs that cannot begin.
printf '%s\n' "$(ask only '"hello"')" >"$work/one.jsonl"
begin="batch --config $demo --log-level error"
expect 2 "needs --input FILE and --output FILE" "$vitrail" $begin --input "$work/one.jsonl"
expect 3 "nowhere.jsonl: cannot open" "$vitrail" $begin --input nowhere.jsonl --output "$work/x"
expect 3 "/nowhere/x: cannot open for writing" "$vitrail" $begin --input "$work/one.jsonl" --output /nowhere/x
expect 3 "not a file of lines" "$vitrail" $begin --input "$work" --output "$work/x"
printf 'a file of mine\n' >"$work/mine"
expect 3 "$work/mine: line 1 is no record of a batch job" \
    "$vitrail" $begin --input "$work/one.jsonl" --output "$work/mine" --resume
printf 'a note' >"$work/note"
expect 3 "$work/note: ends in something that is no record" \
    "$vitrail" $begin --input "$work/one.jsonl" --output "$work/note" --resume
check "a file of the user's was changed" [ "$(cat "$work/mine" "$work/note")" = "a file of mine
a note" ]
: >"$work/empty"
check "an empty job is an error" "$vitrail" $begin --input "$work/empty" --output "$work/x" >"$out" 2>"$err"
check "an empty job wrote something" [ ! -s "$work/x" ]
ends "batch errors"
