"""Packs sdists and wheels again, so that equal contents are equal files: `repack.py FILE...`.

setuptools and auditwheel keep the order of directories, times, owners and permissions of the machine that builds. Here
entries are sorted, have the time SOURCE_DATE_EPOCH, no owner, and permissions that do not depend on the umask.
"""

from __future__ import annotations

import gzip
import os
import sys
import tarfile
import time
import zipfile
from pathlib import Path


def permissions(mode: int) -> int:
    """Everyone may read, the owner may write, and what was executable stays so."""
    return 0o755 if mode & 0o100 else 0o644


def repack_sdist(path: Path, epoch: int) -> None:
    """Replace a .tar.gz."""
    with (
        tarfile.open(path) as old,
        path.with_suffix(".new").open("wb") as file,
        gzip.GzipFile("", "wb", mtime=0, fileobj=file) as zipped,  # no file name and no time
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in sorted(old.getmembers(), key=lambda member: member.name):
            plain = tarfile.TarInfo(member.name)
            plain.type, plain.size, plain.mtime, plain.mode = member.type, member.size, epoch, permissions(member.mode)
            new.addfile(plain, old.extractfile(member))
    path.with_suffix(".new").replace(path)


def repack_wheel(path: Path, epoch: int) -> None:
    """Replace a .whl. Its RECORD stays last, where installers expect it."""
    when = time.gmtime(epoch)[:6]
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(path.with_suffix(".new"), "w") as new:
        for name in sorted(old.namelist(), key=lambda name: (name.endswith(".dist-info/RECORD"), name)):
            entry = old.getinfo(name)
            if entry.is_dir():
                continue
            plain = zipfile.ZipInfo(name, when)
            plain.external_attr = (0o100000 | permissions(entry.external_attr >> 16)) << 16
            plain.compress_type = zipfile.ZIP_DEFLATED
            new.writestr(plain, old.read(name))
    path.with_suffix(".new").replace(path)


def main(*files: str) -> None:
    """Repack all of them."""
    epoch = int(os.environ["SOURCE_DATE_EPOCH"])
    for path in map(Path, files):
        (repack_wheel if path.suffix == ".whl" else repack_sdist)(path, epoch)


if __name__ == "__main__":
    main(*sys.argv[1:])
