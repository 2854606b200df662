"""The ways in which tests change bytes and lines."""

from collections.abc import Iterator, Sequence


def byte_changes(data: bytes, positions: Sequence[int] | range | None = None) -> Iterator[tuple[int, bytes]]:
    """(position, changed data): each byte xor 1, xor 0x20 (letter case) and replaced by a space."""
    for position in range(len(data)) if positions is None else positions:
        old = data[position]
        for new in {old ^ 1, old ^ 0x20, 0x20} - {old}:
            yield position, data[:position] + bytes([new]) + data[position + 1 :]


def line_changes(data: bytes) -> Iterator[tuple[str, bytes]]:
    """(what, changed data): lines deleted, doubled, swapped; the end cut at and inside lines; garbage appended."""
    lines = data.splitlines(keepends=True)
    for index in range(len(lines)):
        yield f"delete line {index + 1}", b"".join(lines[:index] + lines[index + 1 :])
        yield f"double line {index + 1}", b"".join([*lines[: index + 1], *lines[index:]])
        yield f"cut before line {index + 1}", b"".join(lines[:index])
        yield f"cut inside line {index + 1}", b"".join(lines[:index]) + lines[index][:-7]
        if index:
            yield (
                f"swap lines {index} and {index + 1}",
                b"".join([*lines[: index - 1], lines[index], lines[index - 1], *lines[index + 1 :]]),
            )
    yield "cut the last newline", data[:-1]
    for garbage in (b"\n", b" ", b"{}\n", b"\x00", b"\xff\xfe\n", b"[" * 100_000 + b"\n", lines[-1]):
        yield f"append {garbage[:10]!r}", data + garbage
    yield "carriage returns", data.replace(b"\n", b"\r\n")
    yield "byte order mark", b"\xef\xbb\xbf" + data
