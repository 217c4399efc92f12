"""A set of image files decoded once into one file of uint8, from which batches are gathered without decoding."""

import fcntl
import hashlib
import json
import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scclr.config import UserError, one_line, require
from scclr.datasets.files import Block, Boxes, Files, OnDisk


@dataclass(frozen=True, kw_only=True, eq=False)
class Mapped(OnDisk):
    """Squares of ``side`` pixels in one file, mapped into memory and not read into it: [all, 3, side, side].

    Training takes the squares, evaluation their centres of S pixels.
    """

    path: Path
    all: int
    side: int

    def read(self, rows: Tensor) -> Block:
        edge = round((self.side - self.size) / 2)
        inside = slice(edge, edge + self.size)
        return Block(self._gather(rows)[..., inside, inside].contiguous(), [])

    def fetch(self, rows: Tensor, boxes: Boxes, side: int) -> Block:
        return Block(self._gather(rows), [])

    def _gather(self, rows: Tensor) -> Tensor:
        images = np.memmap(self.path, np.uint8, "r", shape=(self.all, 3, self.side, self.side))
        return torch.from_numpy(np.asarray(images)[self.index[rows].numpy()])  # [n, 3, side, side]


def cached(files: Files, folder: Path) -> tuple[Mapped, Tensor]:
    """(``files`` as squares of ``files.resize`` pixels in ``folder``, which of them these are), decoded at first use.

    What is there is found by a hash of the files' paths and of the size: delete the folder if files change in place. It
    is written under another name, so a build that was killed leaves nothing that is taken for whole; other processes
    wait for it.

    Raises:
        UserError: too little free disk, a folder that cannot be written, or a broken image.
    """
    side, names = files.resize, files.names[files.index.numpy()]
    digest = hashlib.sha256(f"{files.root.resolve()} {side}\n".encode())
    digest.update(b"\n".join(names.tolist()))
    whole = folder / digest.hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(whole.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not whole.exists():
                _build(files, whole)
        good = torch.tensor(json.loads((whole / "good.json").read_text()), dtype=torch.int64)
        found, size = (whole / "images.u8").stat().st_size, len(files) * 3 * side**2
        require(found == size, f"{whole}: {found:,} bytes instead of {size:,}; delete this folder")
    except OSError as error:
        raise UserError(f"dataset.cache={folder}: {one_line(error)}; give another folder") from error
    bad = sorted(set(range(len(files))) - set(good.tolist()))
    named = [os.fsdecode(bytes(names[i])) for i in bad[:1]]
    corrupt = f"{whole}: {len(bad)} of the files were corrupt when this was made, such as {named}"
    require(files.skip or not bad, f"{corrupt}; type dataset.on_corrupt=skip, or mend them and delete this folder")
    path = whole / "images.u8"
    mapped = Mapped(index=good, size=files.size, workers=files.workers, path=path, all=len(files), side=side)
    return mapped, good


def _build(files: Files, whole: Path) -> None:
    side, part = files.resize, whole.with_suffix(".part")
    size, free = len(files) * 3 * side**2, shutil.disk_usage(whole.parent).free
    what = f"{len(files):,} images of {side} x {side} pixels take {size / 2**30:,.2f} GiB"
    advice = f"dataset.cache={whole.parent}: {what}, {free / 2**30:,.2f} GiB are free; give another folder or a smaller"
    require(size < free, f"{advice} dataset.resize")
    print(f"dataset.cache: {what}, of {free / 2**30:,.2f} free: {whole}", file=sys.stderr)
    shutil.rmtree(part, ignore_errors=True)  # of a build that was killed
    part.mkdir()
    try:
        good = []
        with open(part / "images.u8", "wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # a disk that fills up meanwhile costs no decoding
            for images, readable in replace(files, size=side).squares():
                file.write(images.numpy().data)
                good.append(readable)
            file.flush()
            os.fsync(file.fileno())
        (part / "good.json").write_text(json.dumps(torch.cat(good).nonzero().squeeze(1).tolist()))
        part.rename(whole)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
