#!/usr/bin/env python3
"""Writes tests/data/image/resize.tsv and the processor configs it uses: what the reference image processors make of
pictures computed by formula (tests/unit/test_image_pattern.h computes the same). Needs transformers 5 and Pillow.
The reference is the Pillow-backed processor with the columns resized before the rows: torchvision and Pillow up to 12
always do so, while Pillow 13 swaps the passes where the height shrinks by more than twice what the width does, which
moves sharp edges by up to 27/255. Prints how far the torchvision-backed processors lie from what is written."""
import json
import os

import numpy as np
from PIL import Image
from transformers import CLIPImageProcessor, LlavaImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

OUT = os.path.join(os.path.dirname(__file__), "..", "data", "image")
N_SAMPLES = 32

CLIP = dict(image_processor_type="CLIPImageProcessor", do_convert_rgb=True, do_resize=True, size={"shortest_edge": 336},
            resample=3, do_center_crop=True, crop_size={"height": 336, "width": 336}, do_rescale=True,
            rescale_factor=1 / 255, do_normalize=True, image_mean=[0.48145466, 0.4578275, 0.40821073],
            image_std=[0.26862954, 0.26130258, 0.27577711])
SQUARE = {**CLIP, "size": {"height": 100, "width": 141}, "do_center_crop": False}
CONFIGS = {
    "clip336": CLIP,
    "clip224": {**CLIP, "size": 224, "crop_size": 224, "image_processor_type": "CLIPImageProcessorFast"},
    "llava-pad": {**CLIP, "image_processor_type": "LlavaImageProcessor", "do_pad": True},
    "llava-pad-nocrop": {**CLIP, "image_processor_type": "LlavaImageProcessorFast", "do_pad": True,
                         "do_center_crop": False, "size": {"shortest_edge": 112}},
    "crop-larger": {**CLIP, "size": {"shortest_edge": 100}, "crop_size": {"height": 131, "width": 160}},
    "crop-only": {**CLIP, "do_resize": False, "crop_size": {"height": 90, "width": 121}},
    "square-nearest": {**SQUARE, "resample": 0},
    "square-lanczos": {**SQUARE, "resample": 1},
    "square-bilinear": {**SQUARE, "resample": 2},
    "square-bicubic": SQUARE,
    "square-box": {**SQUARE, "resample": 4},
    "square-hamming": {**SQUARE, "resample": 5},
}

SIZES = [(20, 20), (21, 20), (20, 21), (23, 29), (24, 17), (31, 33), (32, 32), (37, 20), (20, 37), (40, 50), (50, 40), (64, 48),
         (77, 91), (99, 100), (100, 99), (111, 222), (128, 128), (133, 71), (150, 149), (168, 168), (200, 31), (31, 200),
         (211, 173), (224, 224), (240, 320), (256, 255), (300, 300), (320, 240), (333, 335), (335, 336), (336, 335),
         (336, 336), (337, 336), (336, 337), (337, 337), (338, 339), (400, 300), (336, 700), (700, 336), (420, 419),
         (500, 375), (512, 512), (599, 21), (21, 600), (640, 480), (480, 640), (671, 673), (672, 672), (800, 600), (801, 533),
         (997, 991), (1000, 50), (50, 1000), (1024, 768), (1080, 1920), (1200, 627), (1280, 720), (1333, 999), (1600, 67),
         (1654, 2339), (1920, 1080), (2000, 11), (11, 2000), (2047, 1025), (2480, 3508), (3000, 400), (31, 4000), (4000, 31),
         (3999, 2999), (345, 2000), (400, 3000), (500, 1400), (400, 1000), (4000, 3000), (3000, 4000), (1, 1), (2, 1), (1, 3), (7, 5), (200, 1), (1, 200), (19, 3000)]
OTHER_SIZES = [(1, 1), (20, 20), (37, 20), (21, 600), (100, 141), (141, 100), (333, 77), (170, 900), (640, 480), (1001, 999), (1920, 1080)]


def mix(x, y, c, seed):
    h = (x * np.uint32(0x9E3779B1)) ^ (y * np.uint32(0x85EBCA77)) ^ (np.uint32(seed * 4) + c) * np.uint32(0xC2B2AE3D)
    h = (h ^ (h >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
    return h ^ (h >> np.uint32(12))


def wave(t):
    t = t & np.uint32(511)
    return np.where(t < 256, t, np.uint32(511) - t)


def pattern(kind, width, height, seed):
    x = np.arange(width, dtype=np.uint32)[None, :, None]
    y = np.arange(height, dtype=np.uint32)[:, None, None]
    c = np.arange(3, dtype=np.uint32)[None, None, :]
    one = np.ones((height, width, 3), np.uint32)
    noise = mix(x, y, c, seed) >> np.uint32(24)
    smooth = wave(x * (c + np.uint32(1)) + y * (np.uint32(4) - c) + np.uint32(seed * 50))
    ink = ((mix(x // np.uint32(2), y // np.uint32(3), np.uint32(0), seed) >> np.uint32(13)) & np.uint32(1)) * one
    text = np.where((y // np.uint32(9)) % np.uint32(2) == 1, np.uint32(255), ink * np.uint32(255))
    if kind == "noise":
        out = noise * one
    elif kind == "smooth":
        out = smooth * one
    elif kind == "text":
        out = text
    else:
        out = np.where(text == 255, smooth, noise >> np.uint32(2))
    return out.astype(np.uint8)


def fnv1a(data):
    h = 0xCBF29CE484222325
    for byte in data:
        h = ((h ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return h


def samples(data):
    with np.errstate(over="ignore"):
        return bytes(data[int(mix(np.uint32(i), np.uint32(0), np.uint32(0), 1)) % len(data)] for i in range(N_SAMPLES))


_resize = Image.Image.resize


def resize_columns_first(self, size, resample=None, box=None, reducing_gap=None):
    assert box is None and reducing_gap is None
    if resample == Image.Resampling.NEAREST:
        return _resize(self, size, resample)
    return _resize(_resize(self, (size[0], self.size[1]), resample), size, resample)


def run(cls, config, image):
    kwargs = {k: v for k, v in config.items() if k != "image_processor_type"}
    processor = cls(**{**kwargs, "do_rescale": False, "do_normalize": False})
    pixels = np.asarray(processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0])
    assert np.array_equal(pixels, np.round(pixels))
    return np.ascontiguousarray(pixels.transpose(1, 2, 0)).astype(np.uint8)


def main():
    np.seterr(over="ignore")
    Image.Image.resize = resize_columns_first
    os.makedirs(os.path.join(OUT, "processor"), exist_ok=True)
    for name, config in CONFIGS.items():
        with open(os.path.join(OUT, "processor", name + ".json"), "w") as f:
            json.dump(config, f, indent=1)
            f.write("\n")
    kinds = ["text", "noise", "smooth", "mixed"]
    worst = {}
    lines = []
    cases = [("clip336", i, w, h) for i, (w, h) in enumerate(SIZES)]
    cases += [(name, i, w, h) for name in CONFIGS if name != "clip336" for i, (w, h) in enumerate(OTHER_SIZES)]
    for name, i, w, h in cases:
        kind, seed = kinds[i % 4], i
        image = pattern(kind, w, h, seed)
        llava = CONFIGS[name]["image_processor_type"].startswith("Llava")
        ours = run(LlavaImageProcessorPil if llava else CLIPImageProcessorPil, CONFIGS[name], image)
        try:
            fast = run(LlavaImageProcessor if llava else CLIPImageProcessor, CONFIGS[name], image)
            delta = int(np.abs(ours.astype(int) - fast.astype(int)).max())
            worst[name] = max(worst.get(name, 0), delta)
        except NotImplementedError:
            pass  # torchvision has no box and no hamming filter for this size
        data = ours.tobytes()
        lines.append(f"{name}\t{kind}\t{seed}\t{w}\t{h}\t{ours.shape[1]}\t{ours.shape[0]}\t{fnv1a(data):016x}\t{samples(data).hex()}")
    print("largest difference of the torchvision-backed processor:", worst)
    with open(os.path.join(OUT, "resize.tsv"), "w") as f:
        f.write("# processor pattern seed width height out_width out_height fnv1a64 samples; by tests/tools/make_image_resize.py\n")
        f.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
