#!/bin/sh
# test_ranks.sh VITRAIL SOURCE_DIR JSON_FIELDS - 1, 2, 3 and 4 ranks give the same tokens through `vitrail eval`: four
# questions about a page and two about four pages, with the full cache and with VL-Cache at 10%; the full cache gives
# those of the reference. Each rank holds less when there are more.
. "$(dirname "$0")/e2e.sh"

mkdir "$work/set"
ln -s "$PWD/$images" "$work/set/images"
grep -E '"id": "dev-(1p-000[0-3]|4p-000[0-1])"' models/demo-vlm/dev-eval/questions.jsonl >"$work/set/questions.jsonl"
check "the questions are not six" [ "$(wc -l <"$work/set/questions.jsonl")" -eq 6 ]

for ranks in 1 2 3 4; do
    timeout 300 "$mpirun" -np $ranks "$vitrail" eval --config $demo --questions "$work/set/questions.jsonl" \
        --kv-policy full,vl_cache --kv-budget 0.1 --output "$work/result$ranks.json" >"$out" 2>"$err" </dev/null
    check "eval on $ranks ranks failed" [ $? -eq 0 ]
    # One value a file; its lines are put into one for the reader of lines.
    tr '\n' ' ' <"$work/result$ranks.json" >"$work/line" && echo >>"$work/line"
    # What is the same on any number of ranks: everything but how long it took and the last digits of log-likelihoods,
    # which are sums in another order, and of perplexities, which follow from them.
    apart='s/"seconds":[0-9.]*/"seconds":0/g; s/"log_likelihood":[-+.0-9e]*/"log_likelihood":0/g
        s/"perplexity":[-+.0-9e]*/"perplexity":0/g'
    "$json_fields" "$work/line" items | sed "$apart" >"$work/items$ranks"
    "$json_fields" "$work/line" runs | sed "$apart" >"$work/runs$ranks"
    grep -o '"log_likelihood":[-+.0-9e]*' "$work/line" | cut -d: -f2 >"$work/likelihoods$ranks"
    check "log-likelihoods on $ranks ranks are not those on one" sh -c 'paste "$1" "$2" |
        awk "{ d = \$1 - \$2; if (NF != 2 || d > 2e-3 || d < -2e-3) bad = 1 } END { exit bad || NR < 14 }"' \
        sh "$work/likelihoods1" "$work/likelihoods$ranks"
    check "items on $ranks ranks are not those on one" cmp -s "$work/items1" "$work/items$ranks"
    check "runs on $ranks ranks are not those on one" cmp -s "$work/runs1" "$work/runs$ranks"
    bytes=$(sed -n 's/.*rank 0 of .*//; s/^  decoder weights *\([0-9.]*\) MiB.*/\1/p' "$err")
    echo "$ranks $bytes" >>"$work/weights"
done
check "not two runs" [ "$(grep -o '"policy":"[a-z_]*","budget"' "$work/runs1" | sort -u | wc -l)" -eq 2 ]
check "not twelve items" [ "$(grep -o '"tokens":' "$work/items1" | wc -l)" -eq 12 ]
check "the full cache does not give the reference's tokens" \
    grep -q '"policy":"full"[^}]*"same_as_reference":1,"n_reference":6' "$work/runs1"
check "the weights of a rank do not shrink: $(tr '\n' ';' <"$work/weights")" \
    awk 'NR == 1 { all = $2 } { if ($2 > 1.25 * all / $1 || $2 < 0.75 * all / $1) exit 1 }' "$work/weights"
ends ranks
