"""Small valid media files, made with the standard library."""

from __future__ import annotations

import base64
import math
import struct
import zlib


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def png(width: int = 160, height: int = 100, hue: int = 0, level: int = 9) -> bytes:
    """Draw a PNG: a sun over hills, in colors that depend on `hue`."""
    rows = b"".join(
        b"\0" + b"".join(_pixel(x / width, y / height, hue) for x in range(width))
        for y in range(height)
    )
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _png_chunk(b"IHDR", header)
        + _png_chunk(b"IDAT", zlib.compress(rows, level))
        + _png_chunk(b"IEND", b"")
    )


def _pixel(x: float, y: float, hue: int) -> bytes:
    hill = 0.68 + 0.1 * math.sin(7 * x + hue) + 0.05 * math.sin(17 * x)
    if y > hill:
        return bytes((40 + hue % 60, int(160 - 90 * (y - hill) * 3), 70))
    if (x - 0.72) ** 2 + (y - 0.3) ** 2 / 2.4 < 0.011:
        return b"\xff\xd8\x5c"
    shade = int(120 + 110 * y)
    return bytes((min(255, shade - 20 + hue % 40), min(255, shade + 10), 250))


def heavy_png(size: int) -> bytes:
    """Make a valid one-pixel PNG of about `size` bytes, padded in a text chunk."""
    padding = b"Comment\0" + b"x" * size
    tiny = png(1, 1)
    return tiny[:33] + _png_chunk(b"tEXt", padding) + tiny[33:]


def wav(seconds: float = 0.2, rate: int = 8_000) -> bytes:
    """Make a short beep."""
    samples = b"".join(
        struct.pack("<h", int(9_000 * math.sin(n * 440 * math.tau / rate)))
        for n in range(int(seconds * rate))
    )
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, rate * 2, 2, 16)
    data = struct.pack("<4sI", b"data", len(samples)) + samples
    return (
        struct.pack("<4sI4s", b"RIFF", 4 + len(form) + len(data), b"WAVE") + form + data
    )


def mp3() -> bytes:
    """Make one silent MPEG frame behind an ID3 header."""
    return b"ID3\x04\0\0\0\0\0\0" + (b"\xff\xfb\x10\xc4" + b"\0" * 100) * 4


def mp4() -> bytes:
    """Make the smallest file that calls itself MP4."""
    brand = b"ftypisom\0\0\2\0isommp41"
    return struct.pack(">I", len(brand) + 4) + brand + struct.pack(">I4s", 8, b"mdat")


def data_url(data: bytes, mime: str = "image/png") -> str:
    """Write bytes as a data URL."""
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
