"""The encoder of a run as files for other libraries, in a folder that the Hugging Face Hub would take.

Such a folder holds the weights (``model.safetensors``) or the network (``model.onnx``), ``config.json`` and a model
card. Nothing is uploaded.
"""

import os
import secrets
import shutil
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from scclr.api import Encoder, Run
from scclr.api.card import card, loader
from scclr.api.recipe import Recipe, recipe
from scclr.config.errors import UserError, one_line, require, require_choice
from scclr.evaluate.features import encoder_hash
from scclr.run.files import read_json, storage_error, write_atomic, write_json, write_text
from scclr.run.machine import versions

FORMATS = ("torchvision", "timm", "state_dict", "onnx")
EXTRA = "pip install 'scclr[export]'"
WEIGHTS, NETWORK = "model.safetensors", "model.onnx"
NEAR = 1e-4  # relative and absolute: how far onnxruntime's h may be from the encoder's


def export(run: Run, form: str | None = None, to: str | Path | None = None) -> Path:
    """Write the encoder of ``run`` into a folder, and return its path.

    The folder appears as a whole or not at all. An export of the same run that is there is replaced.

    Args:
        form: ``torchvision`` or ``timm``: weights under the names of that library, for an encoder that comes from it;
            ``state_dict``: weights under the names of the encoder's own class; ``onnx``: the network, which normalizes
            pixels itself and takes any number of images. None: the first of these that fits the encoder.
        to: the folder; None is ``export-<form>`` in the run folder.

    Raises:
        UserError: another format, or one that does not fit the encoder; the run has no weights; a library is missing;
            ``to`` holds something else, or cannot be written.
    """
    made = recipe(run)
    form = made.library if form is None else form
    require_choice("--format", form, FORMATS)
    fits = form in (made.library, "state_dict", "onnx")
    require(fits, f"--format={form}: {made.name} is no model of {form}; choose {made.library}, or onnx")
    made = made if form != "state_dict" else recipe(run, plain=True)
    target = run.directory / f"export-{form}" if to is None else Path(to)
    refuse_other(run, target)
    partial = target.absolute().with_name(f".{target.name}.{secrets.token_hex(8)}.partial")
    try:
        partial.mkdir(parents=True)
        if form == "onnx":
            write_onnx(run.encoder, run.image_size, partial / NETWORK, made.name)
        else:
            write_weights(made.weights(run.model.encoder), partial / WEIGHTS)
        for name, text in made.files(run).items():
            write_text(partial / name, text)
        write_json(partial / "config.json", described(run, made, form))
        write_text(partial / "README.md", card(run, form, loader(run, made, form)))
        _put(partial, target)
    except OSError as error:
        denied = UserError(f"{target.parent}: cannot write there ({error.strerror}); type --to <a folder of yours>")
        raise storage_error(error, target) or denied from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def refuse_other(run: Run, target: Path) -> None:
    """Raise ``UserError`` if ``target`` holds anything but an export of ``run``."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    advice = "type --to <a new folder>"
    path = target / "config.json"
    require(path.is_file(), f"{target}: exists already, and is no export; {advice}")
    origin = read_json(path).get("scclr")
    name = origin.get("run") if isinstance(origin, dict) else None
    require(name == run.directory.resolve().name, f"{target}: exists already, from {name or 'elsewhere'}; {advice}")


def described(run: Run, made: Recipe, form: str) -> dict[str, Any]:
    """What ``config.json`` holds: the keys that timm reads, for a model of timm, and ``scclr``."""
    about = {
        "run": run.directory.resolve().name,
        "group": run.result.get("group"),
        "format": form,
        "encoder": made.name,
        "feature_dim": int(run.model.encoder.feature_dim),  # type: ignore[arg-type]
        "channels": run.model.channels,
        "image_size": run.image_size,
        "normalized_inside": form == "onnx",
        **{name: getattr(run.model, name).flatten().tolist() for name in ("mean", "std")},
        "encoder_sha256": encoder_hash(run.model.encoder),
        "metrics": run.metrics,
        "versions": versions(),
    }
    return {**(made.settings if form == "timm" else {}), "scclr": about}


def write_weights(weights: dict[str, torch.Tensor], path: Path) -> None:
    """Write ``weights`` in safetensors' format.

    Raises:
        UserError: safetensors is not installed.
    """
    library = find("safetensors.torch", "safetensors")
    copies = {name: weight.detach().clone().contiguous() for name, weight in weights.items()}  # none share memory
    content = library.save(copies, metadata={"format": "pt"})
    write_atomic(path, lambda file: file.write(content))


@torch.no_grad()
def write_onnx(encoder: Encoder, side: int, path: Path, name: str) -> None:
    """Write ``encoder`` for images float32 [N, C, side, side] in [0, 1], any N, and compare onnxruntime's h with it.

    Raises:
        UserError: onnx, onnxscript or onnxruntime is not installed; ONNX cannot express the encoder, or its h differs
            by more than 1e-4.
    """
    for library in ("onnx", "onnxscript"):
        find(library, library)
    runtime = find("onnxruntime", "onnxruntime")
    images = torch.rand(3, encoder.mean.shape[1], side, side, generator=torch.Generator().manual_seed(0))
    try:
        with warnings.catch_warnings(action="ignore"):
            torch.onnx.export(
                encoder, (images,), path, input_names=["images"], output_names=["h"], dynamo=True, verbose=False,
                external_data=False, dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            )  # fmt: skip
            session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # the exporter's, onnxscript's and onnxruntime's are of many kinds
        if isinstance(error, OSError):
            raise
        raise UserError(
            f"--format=onnx: ONNX does not express {name} ({_reason(error)}); leave --format out"
        ) from error
    for part in (images[:1], images):
        h, expected = torch.from_numpy(session.run(None, {"images": part.numpy()})[0]), encoder(part)
        near = h.shape == expected.shape and torch.allclose(h, expected, rtol=NEAR, atol=NEAR)
        message = f"--format=onnx: onnxruntime's features are not those of {name} within {NEAR:g}; leave --format out"
        require(near, message)


def _reason(error: BaseException) -> str:
    """The first line of the first cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error) or type(error).__name__


def find(module: str, package: str) -> Any:
    """Import a library that only the export needs.

    Raises:
        UserError: it is not installed.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            return import_module(module)
    except ImportError as error:
        raise UserError(f"this format needs {package}: type {EXTRA}") from error


def _put(partial: Path, target: Path) -> None:
    """Give the folder ``partial`` the name ``target``; an older folder of this name is deleted afterwards."""
    older = partial.with_suffix(".older")
    if target.exists():
        os.replace(target, older)
    os.replace(partial, target)
    shutil.rmtree(older, ignore_errors=True)
