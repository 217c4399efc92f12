"""Data sets of Hugging Face's library ``datasets``, from the disk or from its cache. Nothing is ever downloaded."""

import hashlib
import io
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from scclr.config.errors import UserError, did_you_mean, one_line, optional_library, require
from scclr.datasets import ImageSet, Parts, Source
from scclr.datasets.decode import UNREADABLE, center_crop
from scclr.datasets.files import Block, Boxes, OnDisk, Problem
from scclr.datasets.imagefolder import check_sizes, default_workers, read_all

ADVICE = "give dataset.root=<a folder of save_to_disk or of .parquet files, or a name in the library's cache>"
SAVED = ("dataset_dict.json", "dataset_info.json")  # of save_to_disk
AT_ONCE = 1000  # rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows(OnDisk):
    """Images in the rows of a table, decoded whenever they are asked for.

    The shorter side is resized to ``resize`` (antialiased) and the center cropped: to ``size`` pixels to evaluate, to
    ``resize`` pixels for random crops.
    """

    table: Any  # of the library, with the encoded images
    column: str
    resize: int
    source: str  # for messages

    def read_center(self, rows: Tensor, *, replace_broken: bool = True) -> Block:
        return self._decode(rows, self.size)

    def read_crops(self, rows: Tensor, boxes: Boxes, side: int) -> Block:
        return self._decode(rows, self.resize)

    def checked_images(self, block: Block) -> Tensor:
        for problem in block.problems:
            raise UserError(f"{problem.path}: {problem.text}; take this row out of the data")
        return block.images

    def _decode(self, rows: Tensor, side: int) -> Block:
        images, problems = torch.zeros(len(rows), 3, side, side, dtype=torch.uint8), []
        for i, row in enumerate(self.index[rows].tolist()):
            value = self.table[row][self.column]
            encoded = value.get("bytes") if isinstance(value, Mapping) else value
            path = value.get("path") if isinstance(value, Mapping) else None
            try:
                if encoded is None and path is None:
                    raise ValueError("there is no image")
                with Image.open(io.BytesIO(encoded) if encoded is not None else str(path)) as image:
                    images[i] = center_crop(image, self.resize, side)
            except UNREADABLE as error:
                text = re.sub(r" <_io\.BytesIO.*>", "", one_line(error)) or type(error).__name__
                problems.append(Problem(i, f"{self.source}, row {row}", text, True))
        return Block(images, problems)


@dataclass(frozen=True, kw_only=True)
class HuggingFace(Source):
    """``root`` is a folder that ``save_to_disk`` wrote, a ``.parquet`` file or a folder of them, or the name of a data
    set that the library has in its cache.

    A file ``train-00000-of-00002.parquet`` or ``train/0000.parquet`` belongs to the split ``train``. The library writes
    parquet files into its cache once more, to map them into memory. Images become RGB of ``image_size`` pixels a side;
    random crops are taken from the squares of ``resize`` pixels.

    Args:
        images, labels: the columns. null labels: there are none. Labels are a ``ClassLabel``, whole numbers, or text.
        train_split: the split to train on.
        test_split: null: ``test``, if there is one; else the share ``test`` is set apart.
        validation_split: null: the share ``validation`` is set apart.
        config: which configuration of a data set in the cache, if there are several.
        image_size, resize, in_memory, workers: as of ``ImageFolder``.

    Raises:
        ValueError: a size or a number out of range, or an empty name.
    """

    root: str
    image_size: int
    images: str = "image"
    labels: str | None = "label"
    train_split: str = "train"
    test_split: str | None = None
    validation_split: str | None = None
    config: str | None = None
    resize: int | None = None
    in_memory: bool = True
    workers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self.image_size, self.resize, self.workers)
        library()

    def read(self) -> Parts:
        tables = self._tables()
        if self.labels is None:
            train = self._rows(tables["train"], self.train_split)
            return Parts(ImageSet(train, torch.full((len(train),), -1)), None, [])
        values = {name: self._labels(table, self.labels) for name, table in tables.items()}
        found, feature = set(values["train"]), tables["train"].features[self.labels]
        names = [name for name in getattr(feature, "names", None) or sorted(found) if name in found]
        number = {name: i for i, name in enumerate(names)}
        parts = {}
        for name, table in tables.items():
            extra = sorted({*map(str, values[name])} - {*map(str, names)})
            message = f"{self.root}: the {name} images have {len(extra)} classes that the others have not"
            require(not extra, f"{message}, such as {extra[:1]}; take them out")
            labels = torch.tensor([number[value] for value in values[name]])
            parts[name] = ImageSet(self._rows(table, name), labels)
        classes = [str(name) for name in names]
        return Parts(parts["train"], parts.get("test"), classes, validation=parts.get("validation"))

    def digest(self) -> str:
        """A hash of the number of bytes and the label of every image.

        Two copies have the same digest. An image that is replaced by another one of the same size is not noticed.
        """
        digest = hashlib.sha256()
        for name, table in self._tables().items():
            labels = [None] * len(table) if self.labels is None else self._labels(table, self.labels)
            digest.update(f"{name} {labels}\n".encode())
            for batch in table.select_columns([self.images]).with_format("arrow").iter(AT_ONCE):
                column = batch[self.images]
                lengths = import_module("pyarrow.compute").binary_length(_field(column, "bytes"))
                digest.update(f"{lengths.to_pylist()} {lengths.null_count and _field(column, 'path')}\n".encode())
        return digest.hexdigest()[:16]

    def materialize(self, data: ImageSet) -> ImageSet:
        return read_all(data) if self.in_memory else data

    def _rows(self, table: Any, split: str) -> Rows:
        return Rows(
            index=torch.arange(len(table)),
            size=self.image_size,
            workers=default_workers() if self.workers is None else self.workers,
            table=table,
            column=self.images,
            resize=self.resize or self.image_size,
            source=f"{self.root}: {split}",
        )

    def _tables(self) -> dict[str, Any]:
        """The tables with encoded images of the splits that are used."""
        found = self._open()
        named = {"train": self.train_split, "test": self.test_split, "validation": self.validation_split}
        if self.labels is None:
            named = {"train": self.train_split}
        elif self.test_split is None and "test" in found and self.train_split != "test":
            named["test"] = "test"
        tables = {}
        for key, split in named.items():
            if split is not None:
                there = f"there are {', '.join(found)}{did_you_mean(split, found)}"
                require(split in found, f"dataset.{key}_split={split}: {self.root} has no such split; {there}")
                tables[key] = self._encoded(found[split])
        return tables

    def _encoded(self, table: Any) -> Any:
        features = table.features
        for key, column in (("images", self.images), ("labels", self.labels)):
            there = f"there are {', '.join(features)}{did_you_mean(str(column), features)}"
            known = column is None or column in features
            require(known, f"dataset.{key}={column}: {self.root} has no such column; {there}")
        require(len(table) > 0, f"{self.root}: a split has no rows; {ADVICE}")
        feature = features[self.images]
        kind = library().Image
        if isinstance(feature, kind):
            return table.cast_column(self.images, kind(decode=False))
        encoded = isinstance(feature, Mapping) and {"bytes", "path"} <= feature.keys()
        encoded |= getattr(feature, "dtype", "") in ("binary", "large_binary")
        message = f"dataset.images={self.images}: this column of {self.root} has no image files"
        require(encoded, f"{message}, but {getattr(feature, 'dtype', type(feature).__name__)}; name another column")
        return table

    def _labels(self, table: Any, column: str) -> list[Any]:
        """The labels of all rows: whole numbers or text, of a ``ClassLabel`` the names of its classes."""
        values = table.select_columns([column]).with_format("arrow")[:][column].to_pylist()
        where = f"dataset.labels={column}"
        missing = sum(value is None or (isinstance(value, int) and value < 0) for value in values)
        advice = "give labelled splits, or dataset.labels=null for images without labels"
        require(missing == 0, f"{where}: {missing:,} of {len(values):,} rows of {self.root} have no label; {advice}")
        kinds = {type(value) for value in values}
        plain = kinds in ({int}, {str}, {bool})
        shown = " and ".join(sorted(kind.__name__ for kind in kinds))
        require(plain, f"{where}: this column has values of type {shown}; name one of whole numbers or text")
        names = getattr(table.features[column], "names", None)
        return values if names is None else [names[value] for value in values]

    def _open(self) -> Mapping[str, Any]:
        """The tables of all splits."""
        datasets, root = library(), Path(self.root)
        with _quiet(datasets):
            try:
                if any((root / name).is_file() for name in SAVED):
                    found = datasets.load_from_disk(str(root))
                elif files := self._parquet(root):
                    found = datasets.load_dataset("parquet", data_files=files)
                else:
                    require(not root.exists(), f"{root}: no data set of save_to_disk and no .parquet files; {ADVICE}")
                    cache = import_module("datasets.packaged_modules.cache.cache").Cache
                    named = {"repo_id": self.root} if "/" in self.root else {"dataset_name": self.root}
                    found = cache(**named, config_name=self.config, version="auto", hash="auto").as_dataset()
            except UserError:
                raise
            except Exception as error:  # of many kinds
                raise UserError(f"{self.root}: {one_line(error) or type(error).__name__}; {ADVICE}") from error
        return found if isinstance(found, Mapping) else {self.train_split: found}

    def _parquet(self, root: Path) -> dict[str, list[str]]:
        """The parquet files of each split."""
        if root.is_file() and root.suffix == ".parquet":
            return {self.train_split: [str(root)]}
        files: dict[str, list[str]] = defaultdict(list)
        for path in sorted(root.rglob("*.parquet")) if root.is_dir() else ():
            split = path.parent.name if path.stem.isdecimal() else re.sub(r"-\d+-of-\d+.*$", "", path.stem)
            files[re.sub(r"\W+", "_", split)].append(str(path))
        return dict(files)


def library() -> Any:
    """The library ``datasets``.

    Raises:
        ValueError: it is not installed.
    """
    return optional_library("datasets", "dataset=huggingface")


def _field(column: Any, name: str) -> Any:
    """One field of a column of images, or the column itself if it holds the bytes alone."""
    kind = import_module("pyarrow.types")
    if not kind.is_struct(column.type):
        return column
    return import_module("pyarrow.compute").struct_field(column, name)


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No messages and progress bars of the library."""
    log, bars = datasets.utils.logging, datasets.utils
    before, shown = log.get_verbosity(), bars.is_progress_bar_enabled()
    log.set_verbosity_error()
    bars.disable_progress_bars()
    try:
        yield
    finally:
        log.set_verbosity(before)
        if shown:
            bars.enable_progress_bars()
