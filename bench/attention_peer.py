#!/usr/bin/env python3
"""attention_peer - what torch reaches on the same machine, for bench_kernels' figures: causal attention by cuDNN and by
the flash kernel at the same shapes, a square matrix product, one layer's linears at one row.

usage: attention_peer.py [--output FILE] [--ours FILE]     prints JSON; times are medians of 20 after 5, by CUDA events
  --ours FILE   bench_kernels' figures of the same run: adds ours and the ratio to each, and prints them on stderr
"""
import argparse
import json
import statistics
import sys

import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel

WARM, TIMED, BEYOND_CACHE = 5, 20, 200e6
SHAPES = [(1, 2880, 32, 8), (1, 8192, 32, 8), (32, 512, 32, 8), (1, 2880, 40, 40), (1, 8192, 40, 40), (32, 512, 40, 40)]
IMAGES = [(8, 577, 16, 64), (8, 729, 16, 72)]
MODELS = {
    "Llama-2-13B": ([(15360, 5120), (5120, 5120), (27648, 5120), (5120, 13824)], 2),
    "Llama-3-8B": ([(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)], 3),
    "Llama-2-70B / 2": ([(5120, 8192), (8192, 4096), (28672, 8192), (8192, 14336)], 2),
}


def random(*shape, scale=1.0):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * scale


def median_ms(call):
    """Median time of one call(i); i counts up, so that buffers can take turns."""
    for i in range(WARM):
        call(i)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(TIMED)]
    torch.cuda.synchronize()
    for i, (start, end) in enumerate(events):
        start.record()
        call(i)
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def attention(batch, length, heads, kv_heads, dim, causal, backend):
    """One shape by one backend; where it takes no grouped heads, K and V are repeated beforehand, untimed."""
    per_set = 4 * batch * length * (heads + kv_heads) * dim
    sets = [
        (random(batch, heads, length, dim), random(batch, kv_heads, length, dim), random(batch, kv_heads, length, dim))
        for _ in range(1 + int(BEYOND_CACHE / per_set))
    ]
    row = {"kv": "grouped" if heads != kv_heads else "as many as heads"}
    for repeated in (False, True):
        if repeated and heads == kv_heads:
            break
        if repeated:
            group = heads // kv_heads
            sets = [(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)) for q, k, v in sets]
            row["kv"] = "repeated beforehand"
        grouped = heads != kv_heads and not repeated
        try:
            with sdpa_kernel(backend):
                ms = median_ms(
                    lambda i: functional.scaled_dot_product_attention(
                        *sets[i % len(sets)], is_causal=causal, enable_gqa=grouped
                    )
                )
        except RuntimeError as error:
            row["error"] = str(error).splitlines()[0][:200]
            continue
        row.pop("error", None)
        flops = 4.0 * batch * length * length * heads * dim / (2 if causal else 1)
        return {**row, "ms": ms, "tflops": flops / ms * 1e-9}
    return row


def all_attention():
    rows = []
    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    for name, backend in backends.items():
        for batch, length, heads, kv_heads in SHAPES:
            shape = f"causal {batch} x {length}, {heads}/{kv_heads} heads of 128"
            rows.append({"name": shape, "by": name, **attention(batch, length, heads, kv_heads, 128, True, backend)})
        for batch, length, heads, dim in IMAGES:
            shape = f"{batch} images x {length} tokens, {heads} heads of {dim}"
            rows.append({"name": shape, "by": name, **attention(batch, length, heads, heads, dim, False, backend)})
    return rows


def square_product(side=8192):
    a, b = random(side, side), random(side, side)
    ms = median_ms(lambda i: torch.matmul(a, b))
    return {"name": f"matmul {side}^3", "ms": ms, "tflops": 2.0 * side**3 / ms * 1e-9}


def linear_chain(name, shapes, layers):
    """One row through all linears of some layers, in a graph; microseconds of a layer."""
    weights = [[random(*shape, scale=0.02) for shape in shapes] for _ in range(layers)]
    x = [random(1, shape[1]) for shape in shapes]
    y = [torch.empty(1, shape[0], device="cuda", dtype=torch.bfloat16) for shape in shapes]

    def chain():
        for layer in weights:
            for i, w in enumerate(layer):
                torch.matmul(x[i], w.t(), out=y[i])

    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    ms = median_ms(lambda i: graph.replay()) / layers
    weight_bytes = 2.0 * sum(rows * columns for rows, columns in shapes)
    return {"name": f"{name}, 1 rows", "us": ms * 1e3, "gbs": weight_bytes / ms * 1e-6}


def copy_bandwidth(size=4 << 30):
    source = torch.empty(size, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    ms = median_ms(lambda i: target.copy_(source))
    return {"name": "copy of 4 GiB", "ms": ms, "gbs": 2.0 * size / ms * 1e-6}


def compare(result, path):
    """Our speed over the peer's, where both have the shape."""
    with open(path, encoding="utf-8") as file:
        ours = {row["name"]: row for row in json.load(file)}
    for row in result["attention"] + result["linear"]:
        own = ours.get(row["name"])
        key = "tflops" if "tflops" in row else "gbs"
        if own is None or key not in row:
            continue
        row["ours_" + key], row["ratio"] = own[key], own[key] / row[key]
        by = row.get("by", "matmul")
        print(
            f"{row['name']:<44} ours {own[key]:8.1f}  {by:<6} {row[key]:8.1f} {key}  ratio {row['ratio']:.3f}",
            file=sys.stderr,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output")
    parser.add_argument("--ours")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("attention_peer: skipped: no CUDA device")
        return
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "copy": copy_bandwidth(),
        "gemm": square_product(),
        "attention": all_attention(),
        "linear": [linear_chain(name, *model) for name, model in MODELS.items()],
    }
    if options.ours:
        compare(result, options.ours)
    text = json.dumps(result, indent=1)
    print(text)
    if options.output:
        with open(options.output, "w", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
