"""Lines of a text file: any line end, UTF-8 or UTF-16 with its mark, packed with gzip or not.

What is wrong with a file is one `TraceError` that names the file, the line and what to do.
"""

from __future__ import annotations

import codecs
import gzip
import io
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from shaper.errors import TraceError

MAX_LINE_CHARACTERS = 4 * 1024 * 1024
"""The longest row of a recording is its meta row, with a model's whole configuration: 30 kB."""
_SHOWN_CHARACTERS = 60
_GZIP = b"\x1f\x8b"
_PACKED = {
    b"PK\x03\x04": "zip",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
}
# UTF-32's little-endian mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Bytes that are not UTF-8, as Python carries them.
_ESCAPED = re.compile("[\udc80-\udcff]")


class Lines(Iterator[str]):
    """The lines, line ends included. `number` is that of the last one given, from 1.

    Raises:
        TraceError: from the iteration, where a line is no text or too long.
    """

    def __init__(self, path: Path, text: io.TextIOWrapper) -> None:
        self.path = path
        self.number = 0
        self._text = text

    def __next__(self) -> str:
        try:
            line = self._text.readline(MAX_LINE_CHARACTERS + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise _unreadable(self.path, error) from error
        except UnicodeError as error:
            encoding = self._text.encoding.upper()
            raise TraceError(
                f"{self.path}: not {encoding} text after line {self.number}: save it as UTF-8"
            ) from error
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) > MAX_LINE_CHARACTERS:
            raise self.error(f"over {MAX_LINE_CHARACTERS >> 20} MiB long: is it text?")
        if not line.isascii() and _ESCAPED.search(line):
            raise self.error("not UTF-8 text: save the file as UTF-8")
        if "\0" in line:
            raise self.error("holds a NUL byte, so it is not UTF-8 text: save the file as UTF-8")
        return line

    def error(self, what: str) -> TraceError:
        """What is wrong with the last line."""
        return TraceError(f"{self.path}, line {self.number}: {what}")


@contextmanager
def open_lines(path: Path) -> Iterator[Lines]:
    """The file's lines.

    Raises:
        TraceError: it is not there, may not be read, or is no file of text.
    """
    with open_regular(path) as raw:
        start = raw.read(8)
        raw.seek(0)
        packed = next((name for mark, name in _PACKED.items() if start.startswith(mark)), None)
        if packed is not None:
            raise TraceError(
                f"{path} is packed with {packed}: unpack it first (gzip is read as it is)"
            )
        plain: BinaryIO = raw
        try:
            if start.startswith(_GZIP):
                plain = cast(BinaryIO, gzip.GzipFile(fileobj=raw))
                start = plain.read(8)
                plain.seek(0)
        except (OSError, EOFError, zlib.error) as error:
            raise _unreadable(path, error) from error
        encoding = next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8")
        escape = "surrogateescape" if encoding.startswith("utf-8") else "strict"
        with io.TextIOWrapper(plain, encoding=encoding, errors=escape, newline="") as text:
            yield Lines(path, text)


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes. A pipe or a device is refused: what is read here is read twice.

    Raises:
        TraceError: it is not there, may not be read, or is none.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise TraceError(f"{path} can't be read: it is a directory; name the file in it")
        if not stat.S_ISREG(mode):
            raise TraceError(
                f"{path} can't be read: it is a pipe or a device; write it to a file first"
            )
        file = path.open("rb")
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    with file:
        yield file


def shown(value: object) -> str:
    """The value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."


def _unreadable(path: Path, error: Exception) -> TraceError:
    why = getattr(error, "strerror", None) or str(error)
    return TraceError(f"{path} can't be read: {why}")
