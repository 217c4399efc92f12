"""Any image model of the library timm."""

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from scclr.config.errors import did_you_mean, one_line, optional_library
from scclr.encoders.weights import IMAGENET


class Timm(nn.Module):
    """A model of timm without its classifier: h is what timm gives the classifier. Nothing is ever downloaded.

    Args:
        image_size: pixels on a side. Models that learn a position for each patch are made for this size. Those that can
            (timm's ``dynamic_img_size``) take views of other sizes too, by interpolation.
        name: as in ``timm.list_models()``, also with the tag of published weights (``vit_small_patch16_224.dino``).
            They are not fetched: give their file as ``init_from``.
        patch_size: pixels on a side of a patch, for models that have patches; null is the model's own.
        img_size: the size of the images whose weights ``init_from`` gives, if it is not ``image_size``.

    Raises:
        ValueError: timm is not installed; an unknown name; a size or number of channels that the model cannot have.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        image_size: int,
        name: str,
        patch_size: int | None = None,
        img_size: int | None = None,
    ) -> None:
        super().__init__()
        library = optional_library("timm", "encoder=timm")
        check_name(library, name)
        for key, value in (("patch_size", patch_size), ("img_size", img_size)):
            if value is not None and not 1 <= value <= 10_000:
                raise ValueError(f"{key}={value}: give a number of pixels from 1 to 10000, or null")
        options = size_options(library, name, img_size or image_size, patch_size)
        if img_size is not None and "dynamic_img_size" not in options and img_size != image_size:
            raise ValueError(f"img_size={img_size}: {name} takes one size only, that of the images, {image_size}")
        message = f"name={name} on images of {in_channels} x {image_size} x {image_size}"
        with warnings.catch_warnings(action="ignore"):
            try:
                self.network = library.create_model(
                    name, pretrained=False, in_chans=in_channels, num_classes=0, **options
                )
                self.feature_dim = self._width(in_channels, image_size)
            except (RuntimeError, ValueError, AssertionError, TypeError, LookupError, ZeroDivisionError) as error:
                raise ValueError(f"{message}: {one_line(error) or type(error).__name__}; give another size") from error
        # What the published weights of this name take; most are ImageNet's, and those of many transformers are not.
        recorded = library.get_pretrained_cfg(name)
        self.pixel_mean = list(getattr(recorded, "mean", IMAGENET[0]))
        self.pixel_std = list(getattr(recorded, "std", IMAGENET[1]))

    @torch.no_grad()
    def _width(self, channels: int, side: int) -> int:
        """The features of an image, counted by a forward pass in eval mode."""
        device = next(self.network.parameters()).device
        h = self.network.eval()(torch.zeros(1, channels, side, side, device=device))
        self.network.train()
        if not isinstance(h, Tensor) or h.ndim != 2:
            raise ValueError("its output is no vector for each image")
        return h.shape[1]

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that do not decay besides biases and norms, as timm has them."""
        return {f"network.{name}" for name in getattr(self.network, "no_weight_decay", set)()}

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)  # [B, feature_dim]


def check_name(library: Any, name: str) -> None:
    """Raise ``ValueError`` unless timm has a model ``name``, which may have the tag of published weights.

    timm itself would take ``hf-hub:...`` and fetch it.
    """
    models = library.list_models()
    known = name in models or name in library.list_pretrained()
    if not known:
        shown = did_you_mean(name, models) or f"; timm.list_models() lists {len(models):,} names"
        raise ValueError(f"name={name}: timm {library.__version__} has no such model{shown}")


def size_options(library: Any, name: str, side: int, patch_size: int | None) -> dict[str, Any]:
    """The arguments of the model's constructor that say the size of images and patches.

    timm has no list of them, so the model is built once without memory to find its class.

    Raises:
        ValueError: a ``patch_size`` for a model without patches.
    """
    with warnings.catch_warnings(action="ignore"):
        try:
            with torch.device("meta"):
                model = library.create_model(name, pretrained=False)
        except RuntimeError:  # some versions, such as 1.0.20, read numbers from tensors that have none here
            model = library.create_model(name, pretrained=False)
    taken = inspect.signature(type(model).__init__).parameters
    options: dict[str, Any] = {"img_size": side} if "img_size" in taken else {}
    options |= {"dynamic_img_size": True} if "dynamic_img_size" in taken else {}
    if patch_size is not None:
        if "patch_size" not in taken:
            raise ValueError(f"patch_size={patch_size}: {name} has none; drop it")
        options["patch_size"] = patch_size
    return options
