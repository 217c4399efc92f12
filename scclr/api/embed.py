"""Features of a folder of images, in a file, in blocks that memory holds and that a killed program need not repeat.

Dimensions: N images, D features of each.
"""

import glob
import hashlib
import os
import shutil
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from scclr.api import Run
from scclr.augment import with_channels
from scclr.components import pick_device
from scclr.config.errors import UserError, did_you_mean, require, require_choice
from scclr.datasets.files import Files, printable
from scclr.datasets.imagefolder import default_workers, say_left_out
from scclr.datasets.listing import list_images
from scclr.datasets.reading import reading
from scclr.encoders.model import Model
from scclr.encoders.weights import has_foreign_weights
from scclr.evaluate.features import encoder_hash
from scclr.run.files import read_json, storage_error, write_atomic, write_json
from scclr.run.lock import HeldError, file_lock

LAYERS = ("h", "z")
SUFFIXES = (".npz", ".parquet")
BATCH = 256  # images in a forward pass
SHARD = 16 * BATCH  # images whose features are kept at once
ADVICE = "give a folder of images"


@dataclass(frozen=True)
class Rows:
    """Features that are done: of the images ``readable`` among those from ``first`` on."""

    readable: np.ndarray  # bool [n]
    features: np.ndarray  # float32 [images that are readable, D]


def embed(run: Run, folder: str | Path, out: str | Path, *, layer: str = "h", skip: bool = False) -> Path:
    """Write the features of all image files below ``folder`` into ``out``, and return its path.

    ``.npz`` holds the arrays ``files`` [N], paths below the folder, and ``h`` or ``z``, float32 [N, D], in the order of
    the paths. ``.parquet`` has the columns ``file`` and ``h`` or ``z``, a list of D numbers. Images are read as
    ``dataset=imagefolder`` reads them: turned upright, the shorter side resized as the run's dataset does, the center
    cropped to the size that the encoder was made for.

    Every 4096 images the features are kept in ``<out>.parts``. The same command goes on from there after an end of any
    kind. When all is done the parts are merged into ``out`` and deleted.

    Args:
        layer: ``h``, the encoder's output, or ``z``, the projector's.
        skip: leave files out that cannot be decoded. They are named on standard error in any case.

    Raises:
        UserError: no images, a file that cannot be decoded, or an ``out`` that exists or cannot be written.
    """
    root, path = Path(folder), Path(out)
    require_choice("--layer", layer, LAYERS)
    hint = did_you_mean(path.suffix, SUFFIXES)
    require(path.suffix in SUFFIXES, f"{path}: give a file that ends in {' or '.join(SUFFIXES)}{hint}")
    require(not path.exists(), f"{path}: exists already; delete it, or give another file")
    require(path.absolute().parent.is_dir(), f"{path.absolute().parent}: no such folder; make it, or give another file")
    if path.suffix == ".parquet":
        find_pyarrow()
    foreign = "pretrain" not in run.config.stages and has_foreign_weights(run.config)
    message = f"--layer z: {run.config.init_from} has no projector; leave --layer out"
    require(layer == "h" or not foreign, message)
    files = list_files(run, root)
    parts = path.with_name(f"{path.name}.parts")
    try:
        parts.mkdir(exist_ok=True)
        with file_lock(parts / ".lock", 0):
            for old in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):  # of a killed program
                old.unlink()
            broken = _fill(run.model, files, parts, layer, identity(run, files, layer))
            named = f"{root}: {broken:,} of {len(files):,} files cannot be decoded"
            require(broken < len(files), f"{named}; {ADVICE}")
            require(skip or broken == 0, f"{named}; replace them, or type --skip to leave them out")
            write = write_npz if path.suffix == ".npz" else write_parquet
            write_atomic(path, lambda file: write(file, files, parts, layer))
            shutil.rmtree(parts)
    except HeldError as error:
        raise UserError(f"{path}: another process writes it; wait for it, or give another file") from error
    except OSError as error:
        denied = UserError(f"{path}: cannot be written ({error.strerror}); give another file")
        raise storage_error(error, path) or denied from error
    return path


def list_files(run: Run, root: Path) -> Files:
    """The image files below ``root``, which are read as the run's encoder takes them.

    Raises:
        UserError: there are none, or a folder cannot be read.
    """
    require(root.is_dir(), f"{root}: no such folder; {ADVICE}")
    with reading(root, ADVICE):
        names, labels, others = list_images(root, None)
    require(bool(names), f"{root}: no images in this folder or below; {ADVICE}")
    say_left_out(root, others)
    size, resize = run.image_size, run.config.dataset.get("resize")
    return Files(
        index=torch.arange(len(names)),
        size=size,
        workers=default_workers(),
        root=root,
        names=np.array([os.fsencode(name) for name in names]),
        labels=torch.tensor(labels),
        resize=max(size, resize or size),
        skip=True,  # each is named; the end decides
    )


def identity(run: Run, files: Files, layer: str) -> dict[str, Any]:
    """What the parts of one output have in common: the encoder, the layer, and the images by name and size in bytes."""
    digest = hashlib.sha256(os.fsencode(files.root.resolve()))
    with reading(files.root, ADVICE):
        for name in files.names.tolist():
            digest.update(name + b"\0%d\0" % os.stat(os.path.join(os.fsencode(files.root), name)).st_size)
    model = hashlib.sha256((encoder_hash(run.model) + layer).encode()).hexdigest()
    return {"model": model, "files": digest.hexdigest(), "pixels": [files.size, files.resize], "shard": SHARD}


def _fill(model: Model, files: Files, parts: Path, layer: str, wanted: dict[str, Any]) -> int:
    """Compute the parts that are missing; returns how many files could not be decoded.

    Parts of something else, such as of another encoder, are deleted.
    """
    about = parts / "parts.json"
    if not about.is_file() or read_json(about) != wanted:
        for old in parts.glob("*.npz"):
            old.unlink()
        write_json(about, wanted)
    starts = range(0, len(files), SHARD)
    done = next((i for i, first in enumerate(starts) if not _part(parts, first).is_file()), len(starts))
    first = done * SHARD
    if done > 0:
        print(f"{parts}: goes on after {min(len(files), first):,} of {len(files):,} images", file=sys.stderr)
    for start in starts[:done]:
        for name in files.names[start : start + SHARD][~read_part(parts, start).readable].tolist():
            print(f"corrupt image: {printable(os.path.join(files.root, os.fsdecode(name)))}", file=sys.stderr)
    for rows in _shards(model, files[slice(first, None)], layer) if done < len(starts) else ():
        write_part(_part(parts, first), rows)
        first += len(rows.readable)
    return sum(int((~read_part(parts, start).readable).sum()) for start in starts)


def _shards(model: Model, files: Files, layer: str) -> Iterator[Rows]:
    device = pick_device("auto")
    model = model.to(device).eval()
    features: list[Tensor] = []
    masks: list[Tensor] = []
    for images, readable in files.iterate(BATCH, replace_broken=False, pin=device.type == "cuda"):
        features.append(_features(model, images.to(device), layer).cpu()[readable])
        masks.append(readable)
        if sum(map(len, masks)) == SHARD:
            yield Rows(torch.cat(masks).numpy(), torch.cat(features).numpy())
            features, masks = [], []
    if masks:
        yield Rows(torch.cat(masks).numpy(), torch.cat(features).numpy())


@torch.no_grad()
def _features(model: Model, images: Tensor, layer: str) -> Tensor:
    pixels = with_channels(images, model.channels).float() / 255
    return (model.represent(pixels) if layer == "h" else model(pixels)[1]).float()


def _part(parts: Path, first: int) -> Path:
    return parts / f"{first:012d}.npz"


def write_part(path: Path, rows: Rows) -> None:
    """Write the features of one part, atomically."""
    write_atomic(path, lambda file: np.savez(file, readable=rows.readable, features=rows.features))


def read_part(parts: Path, first: int) -> Rows:
    """The part that begins with the image ``first``.

    Raises:
        UserError: it is damaged.
    """
    path = _part(parts, first)
    with reading(path, f"it is damaged; delete {parts}"), np.load(path, allow_pickle=False) as content:
        return Rows(content["readable"], content["features"])


def _blocks(files: Files, parts: Path) -> Iterator[tuple[list[str], np.ndarray]]:
    """(paths below the folder, features) of one part after the other."""
    for first in range(0, len(files), SHARD):
        rows = read_part(parts, first)
        names = files.names[first : first + SHARD][rows.readable].tolist()
        yield [printable(os.fsdecode(name)) for name in names], rows.features


def write_npz(file: IO[bytes], files: Files, parts: Path, layer: str) -> None:
    """The arrays ``files`` and ``h`` or ``z`` as ``numpy.load`` takes them, written block by block."""
    count = sum(len(names) for names, _ in _blocks(files, parts))
    longest = max(len(name) for names, _ in _blocks(files, parts) for name in names)
    width = next(features.shape[1] for _, features in _blocks(files, parts))
    text = np.dtype(f"<U{longest}")
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open("files.npy", "w", force_zip64=True) as member:
            _header(member, (count,), text)
            for names, _ in _blocks(files, parts):
                member.write(np.array(names, text).tobytes())
        with archive.open(f"{layer}.npy", "w", force_zip64=True) as member:
            _header(member, (count, width), np.dtype("<f4"))
            for _, features in _blocks(files, parts):
                member.write(features.astype("<f4").tobytes())


def _header(member: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    described = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, described)


def write_parquet(file: IO[bytes], files: Files, parts: Path, layer: str) -> None:
    """The columns ``file`` and ``h`` or ``z``, a row group for each part."""
    arrow, parquet = find_pyarrow()
    width = next(features.shape[1] for _, features in _blocks(files, parts))
    schema = arrow.schema([("file", arrow.string()), (layer, arrow.list_(arrow.float32(), width))])
    with parquet.ParquetWriter(file, schema) as writer:
        for names, features in _blocks(files, parts):
            column = arrow.FixedSizeListArray.from_arrays(arrow.array(features.reshape(-1)), width)
            writer.write_table(arrow.table([arrow.array(names), column], schema=schema))


def find_pyarrow() -> tuple[Any, Any]:
    """The libraries ``pyarrow`` and ``pyarrow.parquet``.

    Raises:
        UserError: pyarrow is not installed.
    """
    try:
        return import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        raise UserError("a .parquet file needs pyarrow: type pip install 'scclr[datasets]', or give .npz") from error
