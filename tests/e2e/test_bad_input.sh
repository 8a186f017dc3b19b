#!/bin/sh
# test_bad_input.sh VITRAIL SOURCE_DIR JSON_FIELDS - what a person can get wrong before an answer begins: options, YAML,
# model directories, memory, images and prompts. Each is one line (a list of tensors goes on below it) with the exit code
# of docs/errors.md, naming the thing and the cure; on one rank and, where ranks could disagree, on two.
. "$(dirname "$0")/e2e.sh"
generate="generate --config $demo --log-level error"
two="$mpirun -np 2 $vitrail"

# ---- command line and YAML ----
expect 2 'unknown option --promt; the nearest is --prompt' "$vitrail" $generate --promt x
expect 2 'the nearest is --kv-policy' "$vitrail" $generate --kv-polic full --prompt x
expect 2 'unknown option --input' "$vitrail" $generate --input x --prompt x
expect 2 'the nearest is "batch"' "$vitrail" bach
expect 2 'needs a value' "$vitrail" generate --prompt
expect 2 'max-tokens' "$vitrail" $generate --prompt x --max-tokens many
expect 1 'max_tokens' "$vitrail" $generate --prompt x --max-tokens 0
expect 1 'temperature' "$vitrail" $generate --prompt x --temperature -1
expect 2 'kv_cache.policy' "$vitrail" $generate --prompt x --kv-policy h3o
expect 2 "nearest: cluster_kv" "$vitrail" $generate --prompt x --kv-policy cluster_k
expect 2 'kv_cache.budget' "$vitrail" $generate --prompt x --kv-budget 1.5
expect 2 'kv_cache.budget' "$vitrail" $generate --prompt x --kv-budget 10%
expect 2 'action must be error, exit' "$vitrail" $generate --prompt x --inject-fault action=melt

# yaml WORDS TEXT - a configuration file that is wrong; WORDS begin with its place.
yaml() {
    printf "$2" >"$work/deploy.yaml"
    expect 2 "deploy.yaml:$1" $two generate --config "$work/deploy.yaml" --prompt x
}
yaml '2:1: unknown key "max_num_sequences"; the nearest is "max_num_seqs"' 'model: models/demo-vlm\nmax_num_sequences: 3\n'
yaml '3:3: unknown key "kv_cache.polcy"; the nearest is "kv_cache.policy"' 'model: models/demo-vlm\nkv_cache:\n  polcy: full\n'
yaml '1:15: max_num_seqs' 'max_num_seqs: many\n'
yaml '1:15: max_num_seqs must be 1 to 4096; found 0' 'max_num_seqs: 0\n'
yaml '1:11: kv_cache' 'kv_cache: full\n'
yaml '2:3: ' 'max_num_seqs:\n  deep: 3\n'
yaml '1:15: ' 'max_num_seqs: [1, 2]\n'
yaml '2:1: ' 'max_num_seqs: 1\nmax_num_seqs: 2\n'
yaml '2:' 'max_num_seqs: "1\n'
yaml '1:24: kv_cache_memory_bytes' 'kv_cache_memory_bytes: 12XB\n'
printf '\000\001\002' >"$work/bytes.yaml"
expect 2 "bytes.yaml" "$vitrail" generate --config "$work/bytes.yaml" --prompt x
expect 2 "$work: " "$vitrail" generate --config "$work" --prompt x

# ---- sizes ----
expect 2 'max_model_len is 5000, but the model has 4096 positions' $two $generate --prompt x --max-model-len 5000
expect 4 'raise kv_cache_memory_bytes' $two $generate --prompt x --kv-cache-memory-bytes 100KiB
expect 1 'raise kv_cache_memory_bytes' $two $generate --prompt x --kv-cache-memory-bytes 1MiB --max-tokens 3000
expect 4 'or lower max_num_seqs' $two $generate --prompt x --kv-cache-memory-bytes 4TiB --max-num-seqs 4096
expect 2 'tensor_parallel_size is 3, but 2 ranks were started; start with mpirun -np 3' \
    $two $generate --prompt x --tensor-parallel-size 3
[ -e /dev/nvidia0 ] || expect 2 'device is cuda, but no GPU' $two $generate --prompt x --device cuda

# ---- the request ----
awk 'BEGIN { for (i = 0; i < 6000; i++) printf "word%d ", i }' >"$work/words"
expect 1 'leaves no room for an answer: max_model_len is 4096' $two $generate --prompt "$(cat "$work/words")"
expect 1 'together more than max_model_len' $two $generate --prompt x --max-tokens 4096
expect 1 'nowhere.png' $two $generate --prompt x --image nowhere.png
expect 1 '1 x 20000 pixels' $two $generate --prompt x --image tests/e2e/tall.png
expect 1 'configs/demo.yaml' $two $generate --prompt x --image configs/demo.yaml
head -c 3000 "$images/dev-1p-0000.png" >"$work/cut.png"
expect 1 "$work/cut.png" $two $generate --prompt x --image "$work/cut.png"
: >"$work/empty.png"
expect 1 "$work/empty.png" $two $generate --prompt x --image "$work/empty.png"
expect 1 "$work" $two $generate --prompt x --image "$work"
expect 1 'the limit is 1000 in all' $two $generate --prompt x --image "$images/dev-1p-0000.png" --max-image-pixels 1000
expect 1 '1 images, but the prompt has 2 places' $two $generate --raw-prompt --prompt '<image> and <image>' \
    --image "$images/dev-1p-0000.png"
expect 1 '1 images, but the prompt has 0 places' $two $generate --raw-prompt --prompt 'no place' \
    --image "$images/dev-1p-0000.png"

# ---- models ----
model=$work/model
shard=model-00001-of-00002.safetensors
# fresh - a whole copy of the demo model, to break.
fresh() {
    rm -rf "$model" && mkdir "$model"
    for fresh_file in models/demo-vlm/*.json; do cp "$fresh_file" "$model"; done
    for fresh_file in models/demo-vlm/*.safetensors; do ln -s "$PWD/$fresh_file" "$model"; done
}
# broken CODE WORDS - on one rank and on two.
broken() {
    expect "$1" "$2" "$vitrail" $generate --model "$model" --prompt x
    expect "$1" "$2" $two $generate --model "$model" --prompt x
}
# config EDIT... - a copy whose config.json went through sed.
config() {
    fresh
    sed "$@" models/demo-vlm/config.json >"$model/config.json"
}

fresh && expect 0 'prompt 7 tokens' $two $generate --model "$model" --prompt x --max-tokens 2
expect 2 'model nowhere: No such file' $two $generate --model nowhere --prompt x
rm "$model/config.json" && broken 3 "$model/config.json: cannot open"
fresh && rm "$model/$shard" && broken 3 "$shard"
fresh && rm "$model/tokenizer.json" && broken 3 'tokenizer'
fresh && echo '{"crop_size": "big"}' >"$model/preprocessor_config.json" && broken 3 'preprocessor_config.json'
fresh && echo '{"model_type": ' >"$model/config.json" && broken 3 'config.json'
fresh && echo '[]' >"$model/config.json" && broken 3 'config.json'
fresh && echo '{}' >"$model/tokenizer.json" && broken 3 'tokenizer.json'
config 's/"model_type": "llava"/"model_type": "qwen9_vl"/' && broken 3 'model_type "qwen9_vl"; llama, '
config 's/"hidden_act": "silu"/"hidden_act": "relu"/' && broken 3 'relu'
config 's/"hidden_size": 256/"hidden_size": "wide"/' && broken 3 'hidden_size'
config 's/"hidden_size": 256/"hidden_size": -4/' && broken 3 'hidden_size'
config 's/"num_attention_heads": 8/"num_attention_heads": 7/' && broken 3 'heads'
config 's/"num_hidden_layers": 10/"num_hidden_layers": 1000000000/' && broken 3 'num_hidden_layers'

# Shards: cut at several places, and with headers that lie.
for size in 0 5 8 4000 1000000 14297647; do
    fresh && rm "$model/$shard" && head -c $size "models/demo-vlm/$shard" >"$model/$shard" && broken 3 "$shard"
done
fresh && rm "$model/$shard" && printf '\377\377\377\377\377\377\377\177{}' >"$model/$shard" && broken 3 "$shard"
fresh && rm "$model/$shard" && cp "models/demo-vlm/$shard" "$model" && printf 'x' >>"$model/$shard" && broken 3 "$shard"

# Tensors that do not fit are all listed, not the first.
config 's/"intermediate_size": 512/"intermediate_size": 640/' && broken 3 '30 tensors do not fit the configuration'
for layer in 0 1 2 3 4 5 6 7 8 9; do
    for part in gate up down; do
        check "layers.$layer.mlp.$part is not listed" says "layers.$layer.mlp.${part}_proj.weight has shape"
    done
done
config 's/"hidden_size": 256/"hidden_size": 320/' && broken 3 'tensors do not fit the configuration'
check "what was left out is not counted" grep -q -a -E 'and [0-9]+ more' "$err"
config 's/"num_hidden_layers": 10/"num_hidden_layers": 11/' && broken 3 'missing: model.layers.10.mlp.up_proj.weight'
config 's/"num_hidden_layers": 10/"num_hidden_layers": 9/' && broken 3 'unexpected: model.layers.9.mlp.up_proj.weight'
ends "bad input"
