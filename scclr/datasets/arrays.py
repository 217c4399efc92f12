"""Images that NumPy has saved: arrays in an .npz file, or .npy files in a folder."""

import hashlib
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scclr.config.errors import UserError, did_you_mean, one_line, require
from scclr.datasets import ImageSet, Parts, Source
from scclr.datasets.files import Block, Boxes, OnDisk
from scclr.datasets.reading import reading
from scclr.run.machine import memory_limit

HASHED = 10_000  # images of each array, at equal distances
MEASURED = 10_000  # images from whose pixels a mean and a std are proposed
ADVICE = "save it with numpy.save or numpy.savez"


@dataclass(frozen=True, kw_only=True, eq=False)
class MappedArray(OnDisk):
    """Images [N, C, S, S] or [N, S, S, C] of uint8 in a .npy file, which is mapped into memory."""

    array: np.ndarray  # a view [N, C, S, S]

    @property
    def shape(self) -> torch.Size:
        return torch.Size([len(self.index), *self.array.shape[1:]])

    def read_center(self, rows: Tensor, *, replace_broken: bool = True) -> Block:
        return Block(torch.from_numpy(np.ascontiguousarray(self.array[self.index[rows].numpy()])), [])

    def read_crops(self, rows: Tensor, boxes: Boxes, side: int) -> Block:
        return self.read_center(rows)


@dataclass(frozen=True, kw_only=True)
class Arrays(Source):
    """Arrays by name: in ``root``, an .npz file, the array ``images``; in a folder the file ``images.npy``. In a folder
    ``train/images`` is the array ``images`` of ``train.npz``, so two files can be two splits.

    Images are uint8, or floats in [0, 1], which are rounded to 256 levels: [N, S, S], [N, S, S, C] or [N, C, S, S] with
    S pixels a side and as many channels as ``mean`` has numbers. Labels are whole numbers or text, one for each image.
    Pickled objects are never read.

    Args:
        images, labels: names of the arrays to train on; null labels: there are none.
        test_images, test_labels: names of the arrays to test on; null: ``test`` sets a share apart.
        in_memory: false maps .npy files of uint8 into memory, and reads what a batch needs.

    Raises:
        ValueError: an empty name, or a test array of which the other one is missing.
    """

    root: str
    images: str = "images"
    labels: str | None = "labels"
    test_images: str | None = None
    test_labels: str | None = None
    in_memory: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if "" in (self.images, self.labels, self.test_images, self.test_labels):
            raise ValueError("a name of an array is empty: give images, labels, test_images and test_labels, or null")
        if (self.test_images is None) != (self.test_labels is None):
            raise ValueError("test_images and test_labels belong together: give both, or null for both")
        if self.labels is None and self.test_images is not None:
            raise ValueError("labels=null: without labels there is nothing to test; drop test_images and test_labels")

    @cached_property
    def image_size(self) -> int:
        """Pixels on a side."""
        return int(self._shaped(self.images, self._open(self.images)).shape[-1])

    def read(self) -> Parts:
        train = self._image_set(self.images)
        if self.labels is None:
            return Parts(ImageSet(train, torch.full((len(train),), -1)), None, [])
        values = self._labels(self.labels, len(train))
        classes, found = np.unique(values, return_inverse=True)
        labelled, names = ImageSet(train, torch.from_numpy(found).long()), [str(name) for name in classes]
        if self.test_images is None or self.test_labels is None:
            return Parts(labelled, None, names)
        test = self._image_set(self.test_images)
        sides = f"{self._where(self.test_images)} has {test.shape[2]} pixels a side, and {self.images} {train.shape[2]}"
        require(test.shape[1:] == train.shape[1:], f"{sides}: give images of one size")
        other = self._labels(self.test_labels, len(test))
        number, texts = {name: i for i, name in enumerate(names)}, [str(value) for value in other.tolist()]
        extra = sorted({*texts} - {*names})
        known = f"{self._where(self.test_labels)} has {len(extra)} classes that {self.labels} has not"
        require(not extra, f"{known}, such as {extra[:1]}; give training images of them, or take them out")
        return Parts(labelled, ImageSet(test, torch.tensor([number[text] for text in texts])), names)

    def digest(self) -> str:
        """A hash of shapes and types, of all labels and of up to 10,000 images of each array, at equal distances."""
        names = (self.images, self.labels, self.test_images, self.test_labels)
        digest = hashlib.sha256()
        for name in (name for name in names if name is not None):
            array = self._open(name)
            step = 1 if name in (self.labels, self.test_labels) else max(1, -(-len(array) // HASHED))
            digest.update(f"{array.shape} {array.dtype.str}\n".encode())
            digest.update(np.ascontiguousarray(array[::step]).data)
        return digest.hexdigest()[:16]

    def _image_set(self, name: str) -> Tensor | MappedArray:
        array = self._shaped(name, self._open(name))
        if not self.in_memory:
            mapped = isinstance(array, np.memmap) and array.dtype == np.uint8
            advice = "only .npy files of uint8 can be mapped; type dataset.in_memory=true, or save it as such"
            require(mapped, f"{self._where(name)}: {advice}")
            return MappedArray(index=torch.arange(len(array)), size=array.shape[-1], workers=0, array=array)
        self._require_memory(name, array.size)
        if array.dtype == np.uint8:
            return torch.from_numpy(np.array(array, order="C"))
        pixels = torch.empty(array.shape, dtype=torch.uint8)
        for start in range(0, len(array), HASHED):
            part = np.asarray(array[start : start + HASHED], dtype=np.float32)
            low, high = float(part.min()), float(part.max())
            reach = f"{self._where(name)}: its floats reach from {low:g} to {high:g}"
            require(low >= 0 and high <= 1, f"{reach}; give uint8, or floats from 0 to 1")  # also false for NaN
            pixels[start : start + HASHED] = torch.from_numpy(np.rint(part * 255).astype(np.uint8))
        return pixels

    def _shaped(self, name: str, array: np.ndarray) -> np.ndarray:
        """The images as [N, C, S, S]."""
        where, shape, channels = self._where(name), list(array.shape), len(self.mean)
        kind = array.dtype == np.uint8 or (array.dtype.kind == "f" and array.dtype.itemsize <= 8)
        require(kind, f"{where} has {array.dtype} numbers; give uint8, or floats from 0 to 1")
        images = array.ndim in (3, 4) and len(array) > 0
        require(images, f"{where} has the shape {shape}; give images [N, H, W], [N, H, W, C] or [N, C, H, W]")
        layouts = [array[:, None]] if array.ndim == 3 else [array, array.transpose(0, 3, 1, 2)]
        fitting = [layout for layout in layouts if layout.shape[1] == channels]
        if not fitting:
            likely = min(layouts, key=lambda layout: layout.shape[1])
            wrong = f"{where} has the shape {shape}, and dataset.mean={self.mean} is of {channels} channels"
            raise UserError(f"{wrong}; {self._proposal(likely)}")
        square = [layout for layout in fitting if layout.shape[2] == layout.shape[3]]
        require(bool(square), f"{where} has the shape {shape}; give square images")
        return square[0]

    def _proposal(self, images: np.ndarray) -> str:
        """What to type as mean and std of images [N, C, H, W]."""
        part = images[:: max(1, len(images) // MEASURED)]
        if part.size * 24 > memory_limit() or images.shape[1] > 100:
            return "give one number for each channel"
        part = part.astype(np.float64) / (255 if images.dtype == np.uint8 else 1)
        measured = {"mean": part.mean((0, 2, 3)), "std": part.std((0, 2, 3))}
        words = [f"dataset.{key}=[{','.join(f'{x:.4f}' for x in values)}]" for key, values in measured.items()]
        return f"type {' '.join(words)}, which are those of its channels"

    def _labels(self, name: str, images: int) -> np.ndarray:
        """Labels [N]."""
        labels, where = np.asarray(self._open(name)), self._where(name)
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        shape = f"{where} has the shape {list(labels.shape)}: give one label for each of the {images:,} images"
        require(labels.shape == (images,), shape)
        require(labels.dtype.kind in "iubUS", f"{where} has {labels.dtype} numbers; give whole numbers or text")
        least = int(labels.min()) if labels.dtype.kind == "i" else 0
        message = f"{where}: {int((labels < 0).sum()) if least < 0 else 0:,} labels are negative, such as {least}"
        require(least >= 0, f"{message}; give numbers from 0, or dataset.labels=null if there are none")
        return labels.astype(str) if labels.dtype.kind == "S" else labels

    def _where(self, name: str) -> str:
        """The array, for messages."""
        path, key = self._place(name)
        return str(path) if key is None else f"{path}: {key}"

    def _place(self, name: str) -> tuple[Path, str | None]:
        """The file of an array, and its key in it if that is an .npz."""
        root = Path(self.root)
        if root.is_file():
            require(root.suffix == ".npz", f"{root}: give an .npz file, or the folder of .npy files")
            return root, name
        require(root.is_dir(), f"{root}: no such file or folder; give an .npz file, or a folder of .npy files")
        file, _, key = name.partition("/")
        return (root / f"{file}.npz", key) if key else (root / f"{file}.npy", None)

    def _open(self, name: str) -> np.ndarray:
        """The array; that of a .npy file is mapped into memory."""
        path, key = self._place(name)
        files = sorted(other.stem for other in path.parent.glob(f"*{path.suffix}"))
        there = f"there are {', '.join(files[:5])}" if files else f"the folder has no {path.suffix} files"
        require(path.is_file(), f"{path}: no such file; {there}{did_you_mean(path.stem, files)}")
        with reading(path, ADVICE):
            if key is None:
                return np.load(path, mmap_mode="r", allow_pickle=False)
            require(zipfile.is_zipfile(path), f"{path}: damaged, or no .npz file; {ADVICE}")
            with zipfile.ZipFile(path) as archive:
                sizes = {entry.filename.removesuffix(".npy"): entry.file_size for entry in archive.infolist()}
        require(key in sizes, f"{path}: no array {key}; there are {', '.join(sizes)}{did_you_mean(key, sizes)}")
        self._require_memory(name, sizes[key])
        try:
            with reading(path, ADVICE), np.load(path, allow_pickle=False) as content:
                return np.asarray(content[key])
        except zipfile.BadZipFile as error:
            raise UserError(f"{path}: {one_line(error)}; {ADVICE}") from error

    def _require_memory(self, name: str, size: int) -> None:
        limit, need = memory_limit(), f"{self._where(name)} takes {size / 2**30:,.1f} GiB"
        advice = "save it as a .npy file, and type dataset.in_memory=false"
        require(size < limit, f"{need} of {limit / 2**30:,.1f} GiB of memory: {advice}")
