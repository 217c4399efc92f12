"""How image files are decoded: torchvision's pixels from any kind of file that Pillow reads."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from augment_helpers import simclr
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import PHOTOGRAPHS, all_images, write_photographs
from PIL import Image, ImageFile, ImageOps
from torchvision.transforms.v2 import functional as F

from scclr.config.errors import UserError
from scclr.datasets.decode import center_crop, crops, decode, upright_size
from scclr.datasets.loader import views


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def opened(path: Path) -> Image.Image:
    return Image.open(io.BytesIO(path.read_bytes()))


@pytest.mark.parametrize("size", [(61, 50), (50, 61), (40, 40), (30, 90)])
def test_the_center_is_torchvisions_resize_and_crop(size: tuple[int, int]) -> None:
    image = PHOTOGRAPHS[0].resize(size)
    expected = F.center_crop(F.resize(pixels(image), [40], antialias=True), [32, 32])
    assert torch.equal(center_crop(image, 40, 32), expected)


@given(st.tuples(st.integers(0, 20), st.integers(0, 30), st.integers(1, 30), st.integers(1, 40)))
@settings(deadline=None, max_examples=30)
def test_crops_are_torchvisions_resized_crop(box: tuple[int, int, int, int]) -> None:
    image = PHOTOGRAPHS[1].resize((70, 50))
    cut = crops(image, torch.tensor([box, (0, 0, 50, 70)], dtype=torch.float32), 24)
    assert torch.equal(cut[0], F.resized_crop(pixels(image), *box, [24, 24], antialias=True))
    assert torch.equal(cut[1], F.resize(pixels(image), [24, 24], antialias=True))


def test_a_large_jpeg_is_reduced_while_decoding(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    PHOTOGRAPHS[0].save(path, quality=95)
    assert decode(opened(path), 427 / 48).shape == (3, 107, 160)  # a quarter, more than twice 48
    assert decode(opened(path), 427 / 120).shape == (3, 427, 640)
    reduced = crops(opened(path), torch.tensor([[13.0, 101.0, 400.0, 500.0]]), 48)[0]
    whole = F.resized_crop(pixels(opened(path)), 13, 101, 400, 500, [48, 48], antialias=True)
    assert (reduced.float() - whole.float()).abs().mean() < 3  # levels of 255; the box is rounded to reduced pixels


def test_cmyk_grey_and_png_come_out_in_rgb(tmp_path: Path) -> None:
    write_photographs(tmp_path, size=(70, 70))
    images = torch.cat(list(all_images(tmp_path, image_size=70).blocks(7)))
    assert opened(tmp_path / "china" / "2.jpg").mode == "CMYK"
    expected = [pixels(opened(path)) for path in sorted(tmp_path.glob("*/*"))]
    assert torch.equal(images, torch.stack(expected))
    assert torch.equal(images[1, 0], images[1, 2])


def write_tiff12(path: Path, values: np.ndarray) -> None:
    """A grey TIFF of 12 bits a pixel, which Pillow does not write: one strip, two pixels in three bytes."""
    pairs = values.reshape(-1, 2).astype(np.uint32)
    packed = (pairs[:, 0] << 12 | pairs[:, 1]).astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:].tobytes()
    height, width = values.shape
    entries = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 122), (277, 1), (278, height)]
    entries.append((279, len(packed)))
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4) + packed)


@pytest.mark.parametrize("kind", ["png", "pgm", "little.tif", "big.tif", "12.tif"])
def test_16_bit_images_are_scaled_to_8_bits(kind: str, tmp_path: Path) -> None:
    most = 4095 if kind == "12.tif" else 65535
    values = np.linspace(0, most, 32 * 24).round().astype(np.uint16).reshape(24, 32)
    path = tmp_path / f"image.{kind}"
    if kind == "12.tif":
        write_tiff12(path, values)
    else:
        Image.fromarray(values.astype(">u2") if kind == "big.tif" else values).save(path)
    found = decode(opened(path), 1)
    expected = [(int(value) * 255 * 2 + most) // (2 * most) for value in values.flat]  # rounded
    assert found.shape == (3, 24, 32)
    assert found[0].flatten().tolist() == found[2].flatten().tolist() == expected


@pytest.mark.parametrize(("mode", "kind"), [("F", "floating-point"), ("I", "32-bit integer")])
def test_pixels_without_a_known_range_are_refused(mode: str, kind: str, tmp_path: Path) -> None:
    write_photographs(tmp_path, per_class=2)
    Image.new(mode, (30, 30), 200).save(tmp_path / "china" / "1.tiff")
    message = f"china/1.tiff: its {kind} pixels have no known range: save it with 8 or 16 bits a channel; replace or"
    with pytest.raises(UserError, match=message):
        list(all_images(tmp_path).blocks(4))
    whole = torch.cat(list(all_images(tmp_path, on_corrupt="skip").blocks(4)))
    assert torch.equal(whole[2], whole[0]), "the first of its class"


def write_oriented(path: Path, orientation: int) -> None:
    """A photograph of which the EXIF tag says how to turn it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    PHOTOGRAPHS[0].resize((60, 40)).save(path, exif=exif, **({"lossless": True} if path.suffix == ".webp" else {}))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff"])
def test_images_are_turned_upright(kind: str, orientation: int, tmp_path: Path) -> None:
    path = tmp_path / f"image.{kind}"
    write_oriented(path, orientation)
    upright = ImageOps.exif_transpose(opened(path))
    assert upright.size == ((60, 40) if orientation < 5 else (40, 60))
    assert upright_size(opened(path)) == (upright.height, upright.width)
    assert torch.equal(decode(opened(path), 1), pixels(upright))
    assert torch.equal(center_crop(opened(path), 30, 24), center_crop(upright, 30, 24))
    box = torch.tensor([[3.0, 5.0, 20.0, 30.0]])
    assert torch.equal(crops(opened(path), box, 16), crops(upright, box, 16))


def test_random_crops_are_drawn_for_upright_images(tmp_path: Path) -> None:
    for folder in ("stored", "upright"):
        for name in ("cat", "dog"):
            (tmp_path / folder / name).mkdir(parents=True)
            for i in range(1, 9):
                path = tmp_path / folder / name / f"{i}.png"
                write_oriented(path, i)
                if folder == "upright":
                    ImageOps.exif_transpose(opened(path)).save(path)
    stored, upright = (
        views(all_images(tmp_path / folder), simclr(), seed=0, step=0) for folder in ("stored", "upright")
    )
    assert torch.equal(stored, upright)


def test_the_size_is_read_from_the_header_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a PNG whose orientation lies behind its pixels: this one is ignored, while decoding too."""
    plain, oriented = tmp_path / "plain.png", tmp_path / "oriented.png"
    PHOTOGRAPHS[0].resize((60, 40)).save(plain)
    write_oriented(oriented, 6)
    data = oriented.read_bytes()
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4])
    late = tmp_path / "late.png"
    late.write_bytes(data[:start] + data[end:-12] + data[start:end] + data[-12:])  # before IEND
    assert torch.equal(decode(opened(late), 1), decode(opened(plain), 1))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    sizes = [upright_size(opened(path)) for path in (plain, oriented, late)]
    assert sizes == [(40, 60), (60, 40), (40, 60)]


def test_a_damaged_orientation_is_ignored(tmp_path: Path) -> None:
    write_photographs(tmp_path, per_class=1)
    PHOTOGRAPHS[0].resize((60, 40)).save(tmp_path / "china" / "1.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01")
    assert len(torch.cat(list(all_images(tmp_path).blocks(4)))) == 3
