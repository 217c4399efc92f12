"""Weights that another library wrote, for an encoder of ours: torchvision's, timm's, or those of a published method."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scclr.config.errors import UserError, one_line, require
from scclr.config.resolve import ADOPTED
from scclr.config.schema import TrainConfig, require_each
from scclr.config.words import root_key

SUFFIXES = (".pth", ".pth.tar", ".bin", ".safetensors")  # scclr's own checkpoints end in .pt
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # mean and std of pixels, as torchvision's weights take them
# Where a file holds the encoder twice, the one below the first of these is taken, as the methods' authors do.
PREFERRED = ("teacher", "encoder_q", "base_encoder", "backbone", "encoder", "model", "state_dict", "module")
MOST_DEPTH = 5  # of dictionaries in each other
ADVICE = "give a file with a state_dict alone: torch.save(model.state_dict(), file)"


def has_foreign_weights(config: TrainConfig) -> bool:
    """Whether ``init_from`` names a file of weights from elsewhere, by how its name ends."""
    return config.init_from is not None and config.init_from.lower().endswith(SUFFIXES)


def check_foreign(config: TrainConfig, overrides: Iterable[str] = ()) -> None:
    """Refuse what weights from elsewhere, which have no projector, would ignore or cannot do.

    Args:
        overrides: of the command line.

    Raises:
        UserError: a stage that reads a projector; an override that no stage reads; statistics of pixels that do not fit
            together, or that nothing reads.
    """
    given = {"init_mean": config.init_mean, "init_std": config.init_std}
    if not has_foreign_weights(config):
        for name, values in given.items():
            unread = f"{name}={values} is read for weights from elsewhere only, {' '.join(SUFFIXES)}"
            require(values is None, f"{unread}: drop it, or give init_from=<such a file>")
        return
    for name, values in given.items():
        require_each(name, [0.5] if values is None else values, 0 if name == "init_mean" else 1e-4, 1)
    lengths = {name: 0 if values is None else len(values) for name, values in given.items()}
    numbers = f"init_mean={config.init_mean} and init_std={config.init_std}: give both, one number a channel"
    require(len(set(lengths.values())) == 1, numbers)
    if "pretrain" in config.stages:
        return
    theory, stages = "theory" in config.stages, f"stages=[{','.join(config.stages)}]"
    message = f"{stages} reads embeddings, and init_from={config.init_from} has no projector"
    require(not theory or config.projector.depth == 0, f"{message}: type projector.depth=0, which takes h itself")
    unread_keys = {"optimizer"} if theory else {*ADOPTED} - {"encoder", "seed"}
    for override in overrides:
        key = root_key(override)
        require(key not in unread_keys, f"{override}: {stages} with weights from elsewhere reads no {key}; drop it")


def read_weights(source: str) -> dict[str, Tensor]:
    """All dense tensors of a file by their dotted names, on the CPU. Dictionaries in dictionaries are opened.

    Only tensors and plain values are unpickled: no code of the file runs.

    Raises:
        UserError: there is no such file, it cannot be read, or it holds something else.
    """
    path = Path(source)
    require(path.is_file(), f"{path}: no such file; give a file of weights, or a run folder")
    if path.suffix.lower() == ".safetensors":
        try:
            content = import_module("safetensors.torch").load_file(path)
        except ImportError as error:
            raise UserError(f"{path}: to read it, type pip install safetensors") from error
        except Exception as error:  # SafetensorError is a class of its own
            raise UserError(f"{path}: {one_line(error)}; give an intact file") from error
    else:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # of many kinds; PyTorch's texts advise to run what the file holds
            message = f"{path}: damaged, or holds more than tensors and plain values, so it is not read"
            raise UserError(f"{message}; {ADVICE}") from error
    own = isinstance(content, Mapping) and {"format", "config", "model"} <= content.keys()
    require(not own, f"{path}: a checkpoint of scclr; let its name end in .pt")
    found = dict(_flat(content))
    require(bool(found), f"{path}: holds no named tensors; {ADVICE}")
    return found


def _flat(node: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    for name, value in node.items() if isinstance(node, Mapping) and depth < MOST_DEPTH else ():
        if isinstance(value, Tensor):
            if (
                value.layout == torch.strided
                and value.device.type == "cpu"
                and not (value.is_nested or value.is_quantized)
            ):
                yield f"{prefix}{name}", value
        elif isinstance(name, str):
            yield from _flat(value, f"{prefix}{name}.", depth + 1)


def load_foreign(encoder: nn.Module, source: str) -> str:
    """Copy the weights of the file ``source`` into all of ``encoder``, and say what was taken and what was left out.

    With an encoder on the meta device nothing is copied, but everything checked.

    The names of a file may all have a prefix (``module.``, ``state_dict.backbone.``), and so may those of the encoder
    (``network.``). Every weight of the encoder must be in the file, in its shape. What the file has besides may belong
    to no part of the encoder that has weights: a classifier or a projector is left out, two more blocks are not.

    Raises:
        UserError: as ``read_weights``; a weight is missing, has another shape or is not finite; the file has more of a
            part of the encoder, or holds the encoder more than once.
    """
    weights = read_weights(source)
    wanted = _without_common_prefix(encoder.state_dict())
    prefix = _prefix(wanted, weights, source)
    found = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    needed = [name for name in wanted if not name.endswith("num_batches_tracked")]  # older files have none
    missing = [name for name in needed if name not in found]
    parts = {name.split(".")[0] for name in wanted}
    more = [name for name in found if name not in wanted and name.split(".")[0] in parts]
    advice = "choose the encoder that they belong to"
    unlike = f"the encoder has {len(missing)} weights that the file has not{_some(missing)}, and the file has "
    unlike += f"{len(more)} that the encoder has not{_some(more)}"
    require(not missing and not more, f"{source}: {unlike}; {advice}")
    other = [f"{name} {list(found[name].shape)}" for name in needed if found[name].shape != wanted[name].shape]
    if other:
        name = other[0].split(" ")[0]
        shapes = f"{len(other)} weights have another shape, such as {other[0]} instead of {list(wanted[name].shape)}"
        raise UserError(f"{source}: {shapes}; {_shape_advice(name, wanted[name], found[name]) or advice}")
    for name in (name for name in wanted if name in found):
        _copy(wanted[name], found[name], f"{source}: {name}")
    left = [name for name in weights if not name.startswith(prefix) or name.removeprefix(prefix) not in wanted]
    origin = f" below {prefix.removesuffix('.')}" if prefix else ""
    rest = f"; {len(left)} others are left out{_some(left)}" if left else ""
    return f"{source}: {len(needed)} weights of the encoder{origin}{rest}"


def _without_common_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` without the first part of its names, if all have the same one: ``network.conv1.weight``."""
    first = {name.split(".")[0] for name in state}
    nested = len(first) == 1 and all("." in name for name in state)
    return {name.split(".", 1)[1] if nested else name: value for name, value in state.items()}


def _prefix(wanted: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str) -> str:
    """The prefix in the file below which most of the ``wanted`` names are."""
    counts: Counter[str] = Counter()
    for name in weights:
        parts = name.split(".")
        counts.update(
            ".".join([*parts[:i], ""]) if i else "" for i in range(len(parts)) if ".".join(parts[i:]) in wanted
        )
    names = f"none of its {len(weights)} weights{_some(list(weights))} has a name of the encoder's"
    require(bool(counts), f"{source}: {names}{_some(list(wanted))}; choose the encoder that they belong to")
    most = max(counts.values())
    best = sorted((prefix for prefix in counts if counts[prefix] == most), key=_rank)
    message = f"{source}: holds the encoder {len(best)} times, below {' and '.join(best[:2])}; give a file with one"
    whole = 2 * most > len(wanted)  # else it is another architecture, of which every block has some of the names
    require(len(best) == 1 or _rank(best[0]) < _rank(best[1]) or not whole, message)
    return best[0]


def _rank(prefix: str) -> int:
    return min((PREFERRED.index(part) for part in prefix.split(".") if part in PREFERRED), default=len(PREFERRED))


def _some(names: Sequence[str]) -> str:
    return f" ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})" if names else ""


def _shape_advice(name: str, wanted: Tensor, found: Tensor) -> str:
    """What to type if the weight ``name`` has another shape because images have another size or number of channels."""
    if found.ndim == wanted.ndim == 4 and found[:, :1].shape == wanted[:, :1].shape:
        return f"type init_mean and init_std of {found.shape[1]} numbers, one for each channel"
    if name == "conv1.weight":
        return "type encoder.stem=imagenet for weights of large images, encoder.stem=small for those of small ones"
    if "pos_embed" in name:
        return "give images of the size that the weights were made for; encoder=timm also takes encoder.img_size=<that>"
    return ""


@torch.no_grad()
def _copy(weight: Tensor, value: Tensor, message: str) -> None:
    value = value.to(weight.dtype)
    require(bool(value.isfinite().all()), f"{message} is not finite; give other weights")
    weight.copy_(value)  # does nothing to a weight on the meta device


def pixel_statistics(
    encoder: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[list[float], list[float]]:
    """The mean and std of pixels that weights from elsewhere take: the given ones, those that timm has on record for
    the name of the model, or ImageNet's."""
    recorded = (getattr(encoder, "pixel_mean", IMAGENET[0]), getattr(encoder, "pixel_std", IMAGENET[1]))
    return list(mean or recorded[0]), list(std or recorded[1])


def load_own(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy all weights of a checkpoint of scclr, which comes from ``source``, into ``model``.

    Raises:
        UserError: they do not fit.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        detail = str(error).strip().splitlines()[-1].strip()
        message = f"{source}: its weights do not fit this encoder and projector ({detail})"
        raise UserError(message) from error
