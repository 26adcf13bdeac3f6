"""Bytes of a fragmented mp4: cut into whole pieces (the header, then fragment by fragment), and a comment in the header.

A file is a row of boxes, each with its size and a name of four letters in front (ISO/IEC 14496-12, section 4.2). The header ends
with the box ``moov``. A fragment is a box ``moof``, which says what the samples are, and a box ``mdat`` with the samples.
"""

from __future__ import annotations

COMMENT = b"\xa9cmt"  # a tag that every reader of mp4 files knows
LAST_OF_A_PIECE = (b"moov", b"mdat")


class FragmentCutter:
    """Takes bytes as they come and gives pieces, after each of which a player has something whole. In a row they are the file."""

    def __init__(self) -> None:
        self._pending = bytearray()
        self._seen = 0  # bytes of whole boxes at the front of what is pending

    def feed(self, data: bytes) -> list[bytes]:
        """The header and the fragments that `data` completes."""
        self._pending += data
        pieces = []
        while (box := self._next_box()) is not None:
            kind, size = box
            self._seen += size
            if kind in LAST_OF_A_PIECE:
                pieces.append(self._take())
        return pieces

    def rest(self) -> bytes:
        """The whole boxes after the last fragment (an index); what follows them was cut off and is left out."""
        piece = self._take()
        self._pending.clear()
        return piece

    def _next_box(self) -> tuple[bytes, int] | None:
        """Name and size of the box after those seen, None before its last byte has come."""
        at = self._seen
        head = bytes(self._pending[at : at + 16])
        if len(head) < 8:
            return None
        size = int.from_bytes(head[:4], "big")
        if size == 1:  # a longer size follows the name
            if len(head) < 16:
                return None
            size = int.from_bytes(head[8:], "big")
        if size < 8 or at + size > len(self._pending):
            return None
        return head[4:8], size

    def _take(self) -> bytes:
        piece = bytes(self._pending[: self._seen])
        del self._pending[: self._seen]
        self._seen = 0
        return piece


def box(name: bytes, *contents: bytes) -> bytes:
    """One box: size, name, contents."""
    content = b"".join(contents)
    return (8 + len(content)).to_bytes(4, "big") + name + content


def with_comment(header: bytes, comment: str) -> bytes:
    """The header with a comment tag, for which ffmpeg's own must have no tags.

    header: a piece that ends with ``moov``. The boxes are those of the QuickTime File Format's item list: moov > udta > meta >
    ilst > tag > data. ffmpeg cannot write long tags into a pipe: it goes back to fill in sizes, as far as its buffer of 32 KiB.
    """
    text = box(b"data", b"\0\0\0\1", bytes(4), comment.encode())  # type 1: UTF-8; any language
    kind = box(b"hdlr", bytes(8), b"mdirappl", bytes(9))
    tags = box(b"udta", box(b"meta", bytes(4), kind, box(b"ilst", box(COMMENT, text))))
    at = 0  # of moov
    while (size := int.from_bytes(header[at : at + 4], "big")) and at + size < len(header):
        at += size
    assert header[at + 4 : at + 8] == b"moov"
    return header[:at] + (size + len(tags)).to_bytes(4, "big") + header[at + 4 :] + tags
