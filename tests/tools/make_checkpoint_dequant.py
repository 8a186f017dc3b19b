"""Vectors for tests/unit/test_dequant.c: random blocks of every quantised type and the values that the Python package
`gguf` gives them. Usage: make_checkpoint_dequant.py tests/data/checkpoint/dequant.bin

File: for each type in the order of `TYPES`: uint32 n_blocks, the blocks, then n_blocks * block_size float32.
Some scales are zero, subnormal, the largest F16 and negative."""
import struct
import sys

import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES

# type -> byte offsets of its F16 fields within a block
TYPES = {T.F16: [0], T.BF16: [], T.Q8_0: [0], T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q4_K: [0, 2],
         T.Q5_K: [0, 2], T.Q6_K: [208]}
EXTREME = np.array([0.0, 6e-8, -6e-8, 6.1e-5, 65504.0, -65504.0, 1.0, -0.5], dtype=np.float16)


def main(path):
    rng = np.random.default_rng(2)
    with open(path, "wb") as out:
        for kind, scales in TYPES.items():
            size, n_bytes = GGML_QUANT_SIZES[kind]
            n = 24 if size > 1 else 600
            blocks = rng.integers(0, 256, (n, n_bytes), dtype=np.uint8)
            for at in scales:
                values = rng.normal(0, 0.05, n).astype(np.float16)
                values[: len(EXTREME)] = rng.permutation(EXTREME)
                blocks[:, at : at + 2] = values.view(np.uint8).reshape(n, 2)
            if kind == T.BF16:  # no infinities and NaN: they cannot be compared
                blocks[:, 1] &= 0xBF
            values = quants.dequantize(blocks.reshape(1, -1), kind).astype(np.float32).ravel()
            assert np.isfinite(values).all() and values.size == n * size
            out.write(struct.pack("<I", n) + blocks.tobytes() + values.tobytes())


main(sys.argv[1])
