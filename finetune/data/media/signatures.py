"""Name a file's format by its first bytes, for messages."""

from __future__ import annotations

# First bytes from an offset on, and the name.
_SIGNATURES = (
    (0, b"\x89PNG", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"GIF8", "a GIF image"),
    (8, b"WEBP", "a WebP image"),
    (0, b"BM", "a BMP image"),
    (0, b"II*\0", "a TIFF image"),
    (0, b"MM\0*", "a TIFF image"),
    (8, b"WAVE", "WAV audio"),
    (0, b"fLaC", "FLAC audio"),
    (0, b"OggS", "an Ogg file"),
    (0, b"ID3", "MP3 audio"),
    (0, b"\xff\xfb", "MP3 audio"),
    (8, b"AIF", "AIFF audio"),
    (0, b"#!AMR", "AMR audio"),
    (0, b"caff", "CAF audio"),
    (0, b"0&\xb2u", "a file of Windows Media"),
    (0, b"\x1aE\xdf\xa3", "a Matroska or WebM file"),
    (8, b"AVI ", "an AVI video"),
    (4, b"ftypM4A", "M4A audio"),
    *((4, b"ftyp" + brand, "an HEIC image") for brand in (b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"heim")),
    (4, b"ftypavif", "an AVIF image"),
    (4, b"ftyp", "an MP4 file"),
    (0, b"%PDF", "a PDF"),
    (0, b"%!PS", "a PostScript drawing"),
    (0, b"PK\3\4", "a ZIP archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"\x80\x04", "a Python pickle"),
    (0, b"#EXTM3U", "a playlist"),
    (0, b"ffconcat", "a playlist"),
    (0, b"version https://git-lfs", "a pointer of Git LFS without the file's content"),
)
_MARKUP = ((b"<svg", "an SVG drawing"), (b"<!doctype html", "a page of HTML"), (b"<html", "a page of HTML"))


def describe(start: bytes) -> str:
    """Return the format of a file whose first bytes are given, as `a PNG image`."""
    for offset, signature, name in _SIGNATURES:
        if start.startswith(signature, offset):
            return name
    text = start[:4096].lower()
    for mark, name in _MARKUP:
        if mark in text:
            return name
    return "text" if start[:64].strip() and start[:64].isascii() and b"\0" not in start[:64] else "of an unknown format"
