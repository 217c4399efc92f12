"""A set of image files decoded once into one file of uint8, from which batches are gathered without decoding."""

import hashlib
import json
import math
import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scclr.config.errors import UserError, one_line, require
from scclr.datasets.files import Block, Boxes, Files, OnDisk
from scclr.datasets.reading import reading
from scclr.run.lock import file_lock

VERSION = 2  # of the pixels: 2 turns images upright and scales 16-bit ones


@dataclass(frozen=True, kw_only=True, eq=False)
class Mapped(OnDisk):
    """Squares of ``side`` pixels in one file [.., 3, side, side], which is mapped into memory.

    Training takes the squares, evaluation their centers of S pixels.
    """

    path: Path
    side: int

    def read_center(self, rows: Tensor, *, replace_broken: bool = True) -> Block:
        edge = round((self.side - self.size) / 2)
        inside = slice(edge, edge + self.size)
        return Block(self._gather(rows)[..., inside, inside].contiguous(), [])

    def read_crops(self, rows: Tensor, boxes: Boxes, side: int) -> Block:
        return Block(self._gather(rows), [])

    def _gather(self, rows: Tensor) -> Tensor:
        squares = np.memmap(self.path, np.uint8, "r").reshape(-1, 3, self.side, self.side)
        return torch.from_numpy(np.asarray(squares)[self.index[rows].numpy()])  # [n, 3, side, side]


def cached(files: Files, folder: Path, content: str) -> tuple[Mapped, Tensor]:
    """The readable ones of ``files`` as squares of ``files.resize`` pixels, and a mask of these: bool [N].

    At first use all files of the set are decoded into ``folder``, also those that ``files`` was indexed to leave out.
    They are written under another name first, so a build that was killed leaves nothing that looks finished. Other
    processes wait for the build.

    Args:
        content: what identifies the images besides their paths; other images are another cache.

    Raises:
        UserError: too little free disk, a folder that cannot be written, or a broken image.
    """
    side, total = files.resize, len(files.names)
    digest = hashlib.sha256(f"{files.root.resolve()} {side} {VERSION} {content}\n".encode(errors="surrogateescape"))
    digest.update(b"\n".join(files.names.tolist()))
    squares = folder / digest.hexdigest()[:16]
    path = squares / "images.u8"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock(squares.with_suffix(".lock"), math.inf):
            if not squares.exists():
                _build(files, squares)
        good = (squares / "good.json").read_text()
        found, size = path.stat().st_size, total * 3 * side**2
    except OSError as error:
        raise UserError(f"dataset.cache={folder}: {one_line(error)}; give another folder") from error
    readable = torch.zeros(total, dtype=torch.bool)
    with reading(squares / "good.json", "it is damaged; delete this folder"):
        readable[json.loads(good)] = True
    require(found == size, f"{squares}: {found:,} bytes instead of {size:,}; delete this folder")
    bad = (~readable).nonzero().squeeze(1).tolist()
    named = [os.fsdecode(bytes(files.names[i])) for i in bad[:1]]
    corrupt = f"{squares}: {len(bad)} of the files were corrupt when this was made, such as {named}"
    require(files.skip or not bad, f"{corrupt}; type dataset.on_corrupt=skip, or replace them and delete this folder")
    mask = readable[files.index]
    return Mapped(index=files.index[mask], size=files.size, workers=files.workers, path=path, side=side), mask


def _build(files: Files, squares: Path) -> None:
    side, total, part = files.resize, len(files.names), squares.with_suffix(".part")
    size, free = total * 3 * side**2, shutil.disk_usage(squares.parent).free
    need = f"{total:,} images of {side} x {side} pixels take {size / 2**30:,.2f} GiB"
    advice = "give another folder or a smaller dataset.resize"
    require(size < free, f"dataset.cache={squares.parent}: {need}, {free / 2**30:,.2f} GiB are free; {advice}")
    print(f"dataset.cache: {need}, of {free / 2**30:,.2f} free: {squares}", file=sys.stderr)
    shutil.rmtree(part, ignore_errors=True)  # left by a build that was killed
    part.mkdir()
    try:
        masks = []
        with open(part / "images.u8", "wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is noticed before anything is decoded
            for images, readable in replace(files, size=side, index=torch.arange(total)).iterate(replace_broken=False):
                file.write(images.numpy().data)
                masks.append(readable)
            file.flush()
            os.fsync(file.fileno())
        (part / "good.json").write_text(json.dumps(torch.cat(masks).nonzero().squeeze(1).tolist()))
        part.rename(squares)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
