#!/bin/sh
# check_layers - reads every #include of the tree and fails on one that breaks the house's order:
#   rooms include only rooms below them: launch > runtime > model > kvcache > kernels, parallel > base;
#   from outside, the kernels room is kernels/ops.h, and a *_internal.h or *_private.h belongs to its own room;
#   own headers are written "room/file.h", from the root;
#   vendor headers stay in their cages; #ifs on CUDA stand at the registration points alone.
# usage: check_layers.sh [TREE]     checks a tree (default: the one this script lies in)
#        check_layers.sh --self-test   checks that each rule is able to fail
set -u

check_tree() {
    (cd "$1" && find launch runtime model kvcache kernels parallel base \
        -name '*.c' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null | sort | tr '\n' '\0' |
        xargs -0 awk '
        BEGIN {
            split("launch 6 runtime 5 model 4 kvcache 3 kernels 2 parallel 2 base 1", pair, " ")
            for (i = 1; i in pair; i += 2) floor[pair[i]] = pair[i + 1]
            # vendor header (pattern) -> files that may include it (pattern)
            cage["^(cuda|cublas|cudnn|cub/|curand|nvtx|cooperative_groups)"] = "^(kernels/cuda/|parallel/comm_(nccl|nvlink))"
            cage["^nccl"] = "^parallel/comm_nccl[.]"
            cage["^mpi[.]h"] = "^(parallel/comm_(mpi|nccl)[^/]*$|launch/)"
            cage["^(cblas|lapacke|openblas)"] = "^kernels/cpu/"
            cage["^(omp)[.]h"] = "^kernels/cpu/"
            cage["^yaml[.]h"] = "^base/yaml[.]c$"
            cage["^(png|jpeglib|jerror|turbojpeg)[.]h"] = "^model/image_"
            cage["^pcre2"] = "^model/tokenizer_"
        }
        function bad(why) { printf "%s:%d: %s\n", FILENAME, FNR, why; n_bad++ }
        FNR == 1 { room = FILENAME; sub("/.*", "", room); n_files++ }
        /^[ \t]*#[ \t]*(if|ifdef|ifndef|elif).*(CUDA|NCCL)/ {
            if (FILENAME !~ /^(kernels\/cuda\/|kernels\/ops[.]c$|parallel\/comm[.]c$|parallel\/comm_nccl|parallel\/comm_nvlink)/)
                bad("an #if on CUDA belongs to the registration points, kernels/ops.c and parallel/comm.c")
        }
        /^[ \t]*#[ \t]*include/ {
            line = $0
            sub(/^[ \t]*#[ \t]*include[ \t]*/, "", line)
            quoted = substr(line, 1, 1) == "\""
            name = substr(line, 2)
            sub(/[">].*/, "", name)
            target = name
            sub("/.*", "", target)
            for (header in cage)
                if (!quoted && name ~ header && FILENAME !~ cage[header])
                    bad("<" name "> is caged in " cage[header])
            if (!quoted) next
            if (!(target in floor) || name !~ "/") {
                bad("\"" name "\" is not written from the root, as \"room/file.h\"")
                next
            }
            if (target == room) next
            if (floor[target] >= floor[room]) bad("\"" name "\" points up or sideways: " room " may not see " target)
            if (target == "kernels" && name != "kernels/ops.h") bad("\"" name "\" is inside the kernels room: include kernels/ops.h")
            if (name ~ /_(internal|private)[.]h$/) bad("\"" name "\" is private to " target)
        }
        END {
            if (n_files + 0 == 0) { print "no source files found"; exit 2 }
            exit n_bad > 0
        }')
}

# One rule: a tree of one extra line in one file must fail and say why.
expect_bad() { # file, line, words of the message
    rm -rf "$work/tree" && mkdir -p "$work/tree" && (cd "$work/tree" && mkdir -p launch runtime model kvcache \
        kernels/cpu kernels/cuda parallel base)
    printf '#include <stdio.h>\n%s\n' "$2" >"$work/tree/$1"
    if check_tree "$work/tree" >"$work/said"; then
        echo "self-test: $1 with $2 was accepted" && failed=1
    elif ! grep -q -- "^$1:2: .*$3" "$work/said"; then
        echo "self-test: $1 with $2 gave: $(cat "$work/said")" && failed=1
    fi
}
expect_good() { # file, line
    rm -rf "$work/tree" && mkdir -p "$work/tree" && (cd "$work/tree" && mkdir -p launch runtime model kvcache \
        kernels/cpu kernels/cuda parallel base)
    printf '#include <stdio.h>\n%s\n' "$2" >"$work/tree/$1"
    check_tree "$work/tree" || { echo "self-test: $1 with $2 was refused" && failed=1; }
}

self_test() {
    work=$(mktemp -d) && failed=0
    trap 'rm -rf "$work"' EXIT
    expect_bad base/a.c '#include "model/dims.h"' 'points up'
    expect_bad kvcache/a.c '#include "model/dims.h"' 'points up'
    expect_bad model/a.c '  #  include "runtime/config.h"' 'points up'
    expect_bad runtime/a.h '#include "launch/ranks.h"' 'points up'
    expect_bad parallel/a.c '#include "kernels/ops.h"' 'sideways'
    expect_bad kernels/a.c '#include "parallel/comm.h"' 'sideways'
    expect_bad model/a.c '#include "kernels/cpu/cpu.h"' 'inside the kernels room'
    expect_bad runtime/a.c '#include "model/tokenizer_internal.h"' 'private to model'
    expect_bad model/a.c '#include "dims.h"' 'from the root'
    expect_bad model/a.c '#include "../base/status.h"' 'from the root'
    expect_bad runtime/a.c '#include <mpi.h>' 'caged'
    expect_bad kernels/cpu/a.c '#include <cuda_runtime.h>' 'caged'
    expect_bad parallel/comm_mpi.c '#include <nccl.h>' 'caged'
    expect_bad model/a.c '#include <cblas.h>' 'caged'
    expect_bad runtime/a.c '#include <yaml.h>' 'caged'
    expect_bad runtime/a.c '#include <png.h>' 'caged'
    expect_bad runtime/a.c '#ifdef VITRAIL_CUDA' 'registration'
    expect_good launch/a.c '#include "base/status.h"'
    expect_good launch/a.c '#include <mpi.h>'
    expect_good parallel/comm_mpi.c '#include <mpi.h>'
    expect_good kvcache/a.c '#include "parallel/comm.h"'
    expect_good kernels/cuda/a.cu '#include <cuda_runtime.h>'
    expect_good kernels/cpu/a.c '#include "kernels/cpu/cpu.h"'
    expect_good model/a.c '#include "model/tokenizer_internal.h"'
    rm -rf "$work/tree" && mkdir "$work/tree"
    if check_tree "$work/tree" >/dev/null 2>&1; then echo "self-test: an empty tree was accepted" && failed=1; fi
    return $failed
}

case "${1:-}" in
--self-test) self_test && echo "check_layers: every rule is able to fail" ;;
*)
    if check_tree "${1:-$(dirname "$0")/../..}"; then
        echo "check_layers: all includes point down"
    else
        echo "check_layers: the lines above break the order of the house" >&2
        exit 1
    fi
    ;;
esac
