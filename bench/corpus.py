"""The text that the small model learns: public-domain English from four Debian packages.

    bible-kjv-text, bible-kjv   the King James Bible (1611) and the program that prints it
    r-cran-janeaustenr          the six novels of Jane Austen (1811-1817)
    dict-jargon                 the Jargon File, placed in the public domain by its authors
    dict-devil                  The Devil's Dictionary by Ambrose Bierce (1911)

`load_corpus(cache)` downloads the packages with `apt-get download` (no root needed), unpacks them
under `cache` and returns (training documents, held-out documents), each a list of `Document`.
"""

from __future__ import annotations

import gzip
import io
import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("bible-kjv-text", "bible-kjv", "r-cran-janeaustenr", "dict-jargon", "dict-devil")

# Whole books, so that no sentence of theirs is seen in training; none of them has a parallel elsewhere
# (as Matthew has in Mark, or Kings in Chronicles), which would make the test half known.
HELD_OUT_BOOKS = ("Ruth", "Est", "Jonah", "Acts")
# Of each novel, this closing share is held out: it speaks of people met long before.
HELD_OUT_SHARE = 0.05


class Document(NamedTuple):
    """A text and where it is from."""

    title: str
    text: str


def load_corpus(cache: Path) -> tuple[list[Document], list[Document]]:
    """Return (training, held-out) documents; see the module's docstring for their sources.

    Raises RuntimeError when the packages cannot be downloaded (no Debian, no registry).
    """
    root = _unpacked(cache)
    training: list[Document] = []
    held_out: list[Document] = []
    for book, text in _king_james(root):
        (held_out if book in HELD_OUT_BOOKS else training).append(Document(f"King James: {book}", text))
    for title, text in _austen(root):
        paragraphs = text.split("\n")
        cut = round(len(paragraphs) * (1 - HELD_OUT_SHARE))
        training.append(Document(f"Austen: {title}", "\n".join(paragraphs[:cut])))
        held_out.append(Document(f"Austen: {title}", "\n".join(paragraphs[cut:])))
    for name in ("jargon", "devil"):
        training.append(Document(name, _dictionary(root, name)))
    return training, held_out


def _unpacked(cache: Path) -> Path:
    """Download and unpack the packages once; return the folder that stands for `/`."""
    root = cache / "root"
    if (root / "complete").exists():
        return root
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise RuntimeError("the corpus comes from Debian packages: apt-get and dpkg-deb are needed, not found")
    cache.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=cache, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"apt-get download failed (try `apt-get update` first): {error.stderr.strip()}") from error
    for package in PACKAGES:
        (archive,) = cache.glob(f"{package}_*.deb")
        subprocess.run(["dpkg-deb", "-x", archive.name, str(root.resolve())], cwd=cache, check=True)
    (root / "complete").touch()
    return root


def _king_james(root: Path) -> list[tuple[str, str]]:
    """Return (abbreviated book name, text) for the 66 books, a verse a line, an empty line between chapters."""
    listing = subprocess.run(
        [root / "usr/bin/bible", "-p", root / "usr/lib", "-f", "gen1:1-rev22:21"],
        check=True,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    ).stdout
    books: dict[str, list[str]] = {}
    previous_chapter = None
    for line in listing.splitlines():
        reference, _, verse = line.partition(" ")
        match = re.fullmatch(r"(\d?[A-Za-z]+)(\d+):(\d+)", reference)
        if match is None:
            raise RuntimeError(f"bible-kjv printed {line!r}, expected BOOKchapter:verse text")
        book, chapter = match[1], match[2]
        verses = books.setdefault(book, [])
        if verses and chapter != previous_chapter:
            verses.append("")
        verses.append(verse.strip())
        previous_chapter = chapter
    return [(book, "\n".join(verses)) for book, verses in books.items()]


def _austen(root: Path) -> list[tuple[str, str]]:
    """Return (title, text) for each novel, a paragraph a line.

    The package keeps them in R's lazy-load database: blocks of a big-endian length and a zlib stream,
    each a serialized character vector, one string for a printed line.
    """
    data = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    novels = []
    while data:
        inflate = zlib.decompressobj()
        lines = _character_vector(inflate.decompress(data[4:]))
        data = inflate.unused_data
        paragraphs = _paragraphs("\n".join(lines))
        novels.append((paragraphs[0].title(), "\n".join(paragraphs)))
    return novels


def _character_vector(serialized: bytes) -> list[str]:
    """Read a character vector from R's XDR serialization, format 3 ("R Internals", section 1.8)."""
    stream = io.BytesIO(serialized)

    def integer() -> int:
        return struct.unpack(">i", stream.read(4))[0]

    if stream.read(2) != b"X\n" or integer() != 3:
        raise RuntimeError("expected R's XDR serialization, format 3")
    stream.read(8)  # the versions of R that wrote it and that can read it
    stream.read(integer())  # the native encoding
    if integer() & 0xFF != 16:
        raise RuntimeError("expected a character vector (STRSXP)")
    strings = []
    for _ in range(integer()):
        stream.read(4)  # the string's type and encoding flags
        length = integer()
        strings.append(stream.read(max(length, 0)).decode("utf-8"))  # -1 is NA
    return strings


def _dictionary(root: Path, name: str) -> str:
    """Return a dictd dictionary's text, entries as written, without the header that comes first."""
    with gzip.open(root / f"usr/share/dictd/{name}.dict.dz", "rt", encoding="utf-8", errors="replace") as file:
        text = file.read()
    return "\n".join(_paragraphs(text)[20:])


def _paragraphs(text: str) -> list[str]:
    """Undo the wrapping for print: a paragraph ends at an empty line, and white space within it is one space."""
    paragraphs = (" ".join(p.split()) for p in re.split(r"\n\s*\n", text))
    return [p for p in paragraphs if p]
