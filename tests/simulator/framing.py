"""Framing torture (§9.6): the same events, in every shape that bytes can take."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from .replies import Frame, Reply
from .wire import KEEP_ALIVE, Chunk

BOM = b"\xef\xbb\xbf"
TRAILING = b'data: {"type":"response.late"}\n\n: bye\n\ngarbage after the end'
SEPARATORS = ',"obfuscation":"\u2028\u2029\u0085\\ud800"}'.encode()
NEWLINE = re.compile(rb"\n")


def each_chunk(change: Callable[[bytes], bytes]) -> Frame:
    """Build a framing that changes every chunk by itself."""

    def frame(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        for delay, chunk in chunks:
            yield delay, change(chunk)

    return frame


def sizes(*lengths: int) -> Frame:
    """Cut into chunks of given lengths, again and again."""

    def frame(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        turn = 0
        for delay, chunk in chunks:
            start = 0
            while start < len(chunk):
                length = lengths[turn % len(lengths)]
                yield (delay if start == 0 else 0.0), chunk[start : start + length]
                start, turn = start + length, turn + 1

    return frame


def split_at(*offsets: int) -> Frame:
    """Cut the whole stream at given offsets, and nowhere else."""

    def frame(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        whole = b"".join(chunk for _, chunk in chunks)
        cuts = [0, *sorted(offsets), len(whole)]
        for start, end in pairwise(cuts):
            yield 0.0, whole[start:end]

    return frame


def whole(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Send everything in one chunk."""
    yield 0.0, b"".join(chunk for _, chunk in chunks)


def per_line(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Send every line by itself."""
    for delay, chunk in chunks:
        for number, line in enumerate(re.findall(rb"[^\n]*\n|[^\n]+$", chunk)):
            yield (0.0 if number else delay), line


def crlf(chunk: bytes) -> bytes:
    """End lines with CR LF."""
    return NEWLINE.sub(b"\r\n", chunk)


def crlf_torn(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """End lines with CR LF, and cut between the two."""
    for delay, chunk in chunks:
        torn = re.findall(rb"[^\r]*\r|[^\r]+$", crlf(chunk))
        for number, part in enumerate(torn):
            yield (0.0 if number else delay), part


def no_space(chunk: bytes) -> bytes:
    """Leave out the space after the colon."""
    return (
        chunk.replace(b"data: ", b"data:", 1) if chunk.startswith(b"data: ") else chunk
    )


def multi_line(chunk: bytes) -> bytes:
    """Spread the JSON over two data lines."""
    if not chunk.startswith(b"data: {"):
        return chunk
    return chunk.replace(b",", b",\ndata: ", 1)


def event_type(chunk: bytes) -> bytes | None:
    """Find the type of the event in a chunk."""
    found = re.match(rb'data: \{"type":"([^"]+)"', chunk)
    return found and found[1]


def event_lines(chunk: bytes) -> bytes:
    """Put an `event:` line before the data."""
    name = event_type(chunk)
    return b"event: " + name + b"\n" + chunk if name else chunk


def id_lines(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Put an `id:` and a `retry:` line around the data."""
    for number, (delay, chunk) in enumerate(chunks):
        if event_type(chunk):
            chunk = b"id: %d\n" % number + chunk[:-1] + b"retry: 3000\n\n"
        yield delay, chunk


def commented(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Put comments of every kind before, between and after the events."""
    kinds = (b":\n\n", b": \n\n", KEEP_ALIVE, b": data: {}\n", b":x\n\n\n")
    yield 0.0, b": \n\n"
    for number, (delay, chunk) in enumerate(chunks):
        yield delay, kinds[number % len(kinds)]
        yield 0.0, chunk


def separators(chunk: bytes) -> bytes:
    """Add a key whose value has U+2028, U+2029, U+0085 and a lone surrogate."""
    if not chunk.startswith(b"data: {") or not chunk.endswith(b"}\n\n"):
        return chunk
    return chunk[:-3] + SEPARATORS + b"\n\n"


def with_bom(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Begin with a byte order mark."""
    yield 0.0, BOM
    yield from chunks


def with_trailing(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Go on after the end."""
    yield from chunks
    yield 0.0, TRAILING


def no_final_blank(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Leave out the newlines at the very end."""
    held: Chunk | None = None
    for chunk in chunks:
        if held is not None:
            yield held
        held = chunk
    if held is not None:
        yield held[0], held[1].rstrip(b"\n")


NAMED: dict[str, Sequence[Frame]] = {
    "lf": (),
    "crlf": (each_chunk(crlf),),
    "crlf-torn": (crlf_torn,),
    "crlf-every-byte": (each_chunk(crlf), sizes(1)),
    "every-byte": (sizes(1),),
    "odd-sizes": (sizes(7, 1, 13, 2, 101),),
    "per-line": (per_line,),
    "one-chunk": (whole,),
    "event-lines": (each_chunk(event_lines),),
    "id-lines": (id_lines,),
    "no-space": (each_chunk(no_space),),
    "multi-line-data": (each_chunk(multi_line),),
    "comments": (commented,),
    "bom": (with_bom,),
    "separators": (each_chunk(separators),),
    "trailing": (with_trailing,),
    "trailing-one-chunk": (with_trailing, whole),
    "no-final-blank": (no_final_blank,),
}
FRAMINGS: tuple[str, ...] = tuple(NAMED)


def framing(reply: Reply, name: str) -> Reply:
    """Frame a reply as §9.6 names it."""
    return framed(reply, *NAMED[name])


def framed(reply: Reply, *frames: Frame) -> Reply:
    """Frame a reply by given functions, such as `split_at(17)` or `sizes(3, 1)`."""
    return replace(reply, frames=(*reply.frames, *frames))
