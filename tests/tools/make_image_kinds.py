#!/usr/bin/env python3
"""Writes tests/data/image/kinds/* (one small file of every kind of PNG and JPEG) and tests/data/image/kinds.tsv (the
RGB pixels they must give, hashed). PNGs come from the writer below, which knows every colour type, depth, interlacing
and transparency; JPEGs from Pillow, some patched. Expected pixels are what Pillow, its exif_transpose and
transformers' convert_to_rgb (alpha over white) make of the file; where Pillow is known to be off (16-bit grey, colour
keys below 8 bits) they are computed from the samples instead, and 'own' stands in the last column."""
import io
import os
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps
from transformers.image_transforms import convert_to_rgb

from make_image_resize import OUT, fnv1a, pattern, samples

W, H = 23, 17
KINDS = os.path.join(OUT, "kinds")
ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def pack_rows(a, depth):
    """[h, w, c] samples to filtered rows; filter types take turns so that all five are met."""
    out, prior = b"", None
    bpp = max(1, a.shape[2] * depth // 8)
    for y, row in enumerate(a):
        flat = row.reshape(-1)
        if depth == 16:
            line = flat.astype(">u2").tobytes()
        elif depth == 8:
            line = flat.astype(np.uint8).tobytes()
        else:
            bits = np.unpackbits(flat.astype(np.uint8)[:, None], axis=1)[:, 8 - depth:].reshape(-1)
            line = np.packbits(bits).tobytes()
        prior = prior if prior is not None else bytes(len(line))
        kind = y % 5
        done = bytearray()
        for i, v in enumerate(line):
            left = line[i - bpp] if i >= bpp else 0
            up = prior[i]
            corner = prior[i - bpp] if i >= bpp else 0
            p = left + up - corner
            paeth = min((left, up, corner), key=lambda q: (abs(p - q), (left, up, corner).index(q)))
            done.append((v - (0, left, up, (left + up) // 2, paeth)[kind]) & 255)
        out += bytes([kind]) + bytes(done)
        prior = line
    return out


def png(a, color, depth, interlaced=False, before=b"", after=b""):
    h, w = a.shape[:2]
    a = a.reshape(h, w, CHANNELS[color])
    raw = b"".join(pack_rows(a[y0::dy, x0::dx], depth) for x0, y0, dx, dy in ADAM7 if a[y0::dy, x0::dx].size) if interlaced \
        else pack_rows(a, depth)
    head = struct.pack(">IIBBBBB", w, h, depth, color, 0, 0, int(interlaced))
    data = zlib.compress(raw, 9)
    half = len(data) // 2
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + before + chunk(b"IDAT", data[:half]) + chunk(b"IDAT", data[half:]) +
            after + chunk(b"IEND", b""))


def exif(orientation, endian="<", kind=3):
    head = b"II*\0" if endian == "<" else b"MM\0*"
    value = struct.pack(endian + "HH", orientation, 0) if kind == 3 else struct.pack(endian + "I", orientation)
    entries = [struct.pack(endian + "HHI", 0x0112, kind, 1) + value, struct.pack(endian + "HHIHH", 0x0128, 3, 1, 2, 0)]
    return head + struct.pack(endian + "IH", 8, len(entries)) + b"".join(entries) + bytes(4)


def expected(data):
    image = Image.open(io.BytesIO(data))
    image.load()
    return np.array(convert_to_rgb(ImageOps.exif_transpose(image), return_numpy=True))


def over_white(rgb, alpha):
    rgb, alpha = rgb.astype(int), alpha.astype(int)[..., None]
    return ((rgb * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def grey3(a):
    return np.repeat(a.reshape(a.shape[0], a.shape[1], 1), 3, axis=2).astype(np.uint8)


def make_png(add):
    rng = np.random.default_rng(7)
    base = pattern("smooth", W, H, 1)
    noise16 = rng.integers(0, 65536, (H, W, 4)).astype(np.uint16)
    for depth in (1, 2, 4, 8, 16):
        grey = (noise16[..., :1] if depth == 16 else noise16[..., :1] >> (16 - depth)).astype(np.uint16)
        high = grey3(grey >> 8) if depth == 16 else grey3(grey.astype(int) * 255 // (2**depth - 1))
        for inter in (False, True):
            name = f"grey{depth}" + ("-interlaced" if inter else "")
            add(name + ".png", png(grey, GREY, depth, inter), high if depth == 16 else None)
        key = int(grey[3, 4, 0])
        keyed = png(grey, GREY, depth, before=chunk(b"tRNS", struct.pack(">H", key)))
        add(f"grey{depth}-key.png", keyed, over_white(high, np.where(grey[..., 0] == key, 0, 255)))
    for depth in (8, 16):
        a = (noise16 >> (16 - depth)).astype(np.uint16)
        a[..., 3][2] = 2**depth - 1
        a[..., 3][5] = 0
        high = (a >> (depth - 8)).astype(np.uint8)
        for inter in (False, True):
            tail = ("-interlaced" if inter else "") + ".png"
            add(f"rgb{depth}" + tail, png(a[..., :3], RGB, depth, inter))
            add(f"rgba{depth}" + tail, png(a, RGBA, depth, inter))
            add(f"grey-alpha{depth}" + tail, png(a[..., [0, 3]], GREY_ALPHA, depth, inter),
                over_white(grey3(high[..., 0]), high[..., 3]))
        key = a[6, 6, :3]
        add(f"rgb{depth}-key.png", png(a[..., :3], RGB, depth, before=chunk(b"tRNS", struct.pack(">3H", *map(int, key)))),
            over_white(high[..., :3], np.where((a[..., :3] == key).all(-1), 0, 255)))
    for depth in (1, 2, 4, 8):
        n = 2**depth if depth < 8 else 200
        index = rng.integers(0, n, (H, W, 1))
        table = rng.integers(0, 256, (n, 3)).astype(np.uint8)
        plte = chunk(b"PLTE", table.tobytes())
        for inter in (False, True):
            add(f"palette{depth}" + ("-interlaced" if inter else "") + ".png", png(index, PALETTE, depth, inter, plte))
        alpha = rng.integers(0, 256, max(1, n - 1)).astype(np.uint8)
        add(f"palette{depth}-alpha.png", png(index, PALETTE, depth, before=plte + chunk(b"tRNS", alpha.tobytes())))
    gama = chunk(b"gAMA", struct.pack(">I", 100000)) + chunk(b"sRGB", b"\0") + chunk(b"tEXt", b"Comment\0none")
    add("gamma-ignored.png", png(base, RGB, 8, before=gama))
    for k in range(1, 9):
        add(f"exif{k}.png", png(base, RGB, 8, before=chunk(b"eXIf", exif(k, "<>"[k % 2]))))
    add("exif-after.png", png(base, RGB, 8, after=chunk(b"eXIf", exif(6))))
    add("exif-bad.png", png(base, RGB, 8, before=chunk(b"eXIf", b"II*\0\xff\xff\xff\xff")), base)
    add("one-pixel.png", png(base[:1, :1], RGB, 8))
    add("one-pixel-interlaced.png", png(base[:1, :1], RGB, 8, True))


def jpeg(image, **kwargs):
    out = io.BytesIO()
    image.save(out, "JPEG", **kwargs)
    return out.getvalue()


def make_jpeg(add):
    rgb = Image.fromarray(pattern("mixed", 43, 37, 2))
    add("grey.jpg", jpeg(rgb.convert("L"), quality=90))
    add("grey-progressive.jpg", jpeg(rgb.convert("L"), quality=90, progressive=True))
    for name, sampling in (("444", 0), ("422", 1), ("420", 2)):
        add(f"ycc{name}.jpg", jpeg(rgb, quality=85, subsampling=sampling))
        add(f"ycc{name}-progressive.jpg", jpeg(rgb, quality=85, subsampling=sampling, progressive=True))
    add("restart.jpg", jpeg(rgb, quality=85, restart_marker_rows=1))
    add("rgb.jpg", jpeg(rgb, quality=85, keep_rgb=True))
    cmyk = Image.fromarray(np.concatenate([pattern("smooth", 43, 37, 3), pattern("mixed", 43, 37, 4)[..., :1]], 2), "CMYK")
    data = jpeg(cmyk, quality=90)
    add("cmyk.jpg", data)
    add("cmyk-progressive.jpg", jpeg(cmyk, quality=90, progressive=True))
    at = data.index(b"Adobe") + 11
    assert data[at] == 0
    add("ycck.jpg", data[:at] + b"\2" + data[at + 1:])
    app14 = data.index(b"\xff\xee")
    length = struct.unpack(">H", data[app14 + 2:app14 + 4])[0]
    add("cmyk-no-adobe.jpg", data[:app14] + data[app14 + 2 + length:])
    for k in range(1, 9):
        add(f"exif{k}.jpg", jpeg(rgb, quality=85, exif=b"Exif\0\0" + exif(k, "<>"[k % 2], 3)))
    add("trailing.jpg", jpeg(rgb, quality=85) + b"bytes after the end marker")
    add("one-pixel.jpg", jpeg(rgb.crop((0, 0, 1, 1)), quality=90))


def main():
    np.seterr(over="ignore")
    os.makedirs(KINDS, exist_ok=True)
    lines = []

    def add(name, data, own=None):
        try:
            theirs = expected(data)
        except Exception as e:  # noqa: BLE001
            theirs = None
            print(f"{name}: Pillow fails: {e}")
        if own is not None and (theirs is None or not np.array_equal(own, theirs)):
            print(f"{name}: Pillow differs from the samples", None if theirs is None else np.abs(own.astype(int) - theirs).max())
        pixels = np.ascontiguousarray(own if own is not None else theirs)
        used = "own" if own is not None and not np.array_equal(own, theirs) else "pillow"
        with open(os.path.join(KINDS, name), "wb") as f:
            f.write(data)
        raw = pixels.tobytes()
        lines.append(f"{name}\t{pixels.shape[1]}\t{pixels.shape[0]}\t{fnv1a(raw):016x}\t{samples(raw).hex()}\t{used}")

    make_png(add)
    make_jpeg(add)
    with open(os.path.join(OUT, "kinds.tsv"), "w") as f:
        f.write("# file width height fnv1a64 samples source; by tests/tools/make_image_kinds.py\n")
        f.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
