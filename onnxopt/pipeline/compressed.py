"""How small files become when they are compressed, counted in threads beside other work."""

from __future__ import annotations

import importlib
import threading
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

# a second is 20 to 25 MB
_CHUNK = 1 << 20
_WORKERS = 2
_NO_ZSTD = "zstandard is not installed: pip install onnxopt[zstd]"


class Packer(Protocol):
    """What zlib and both modules of Zstandard give."""

    def compress(self, data: bytes, /) -> bytes:
        """The next piece of the compressed stream."""

    def flush(self) -> bytes:
        """Its end."""


@dataclass(frozen=True)
class Packed:
    """Bytes of files, each compressed on its own. None with the reason why beside it."""

    deflate: int | None
    zstd: int | None
    why_no_zstd: str = ""


class Packing:
    """Compresses files in the background, and writes nothing anywhere. What runs still ends with the block."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="onnxopt-compress")
        self._stopped = threading.Event()
        self._begun: list[Future[Packed]] = []

    def __enter__(self) -> Packing:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.stop()
        self._pool.shutdown(cancel_futures=True)

    def begin(self, files: Iterable[Path]) -> Future[Packed]:
        """Start with these files; the result raises OSError where one can't be read."""
        future = self._pool.submit(self._packed, list(files))
        self._begun.append(future)
        return future

    def stop(self) -> None:
        """Leave what runs unfinished: its figures mean nothing then."""
        self._stopped.set()

    def settle(self) -> None:
        """Return when nothing runs any more, so that what follows can be timed."""
        for future in self._begun:
            with suppress(OSError):
                future.result()

    def _packed(self, files: list[Path]) -> Packed:
        deflate, zstd = 0, 0
        packs_zstd = zstd_packer() is not None
        for file in files:
            deflate += self._count(file, zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS))
            packer = zstd_packer() if packs_zstd else None
            zstd += self._count(file, packer) if packer is not None else 0
        return Packed(deflate, zstd) if packs_zstd else Packed(deflate, None, _NO_ZSTD)

    def _count(self, file: Path, packer: Packer) -> int:
        return sum(len(packer.compress(chunk)) for chunk in self._chunks(file)) + len(packer.flush())

    def _chunks(self, file: Path) -> Iterator[bytes]:
        with file.open("rb") as opened:
            while not self._stopped.is_set() and (chunk := opened.read(_CHUNK)):
                yield chunk


def zstd_packer() -> Packer | None:
    """A fresh one at level 3: Python's own from 3.14 on, else that of the package zstandard; None without both."""
    packer: Packer | None = None
    with suppress(ImportError):
        packer = importlib.import_module("zstandard").ZstdCompressor(level=3).compressobj()
    with suppress(ImportError):
        packer = importlib.import_module("compression.zstd").ZstdCompressor(level=3)
    return packer
