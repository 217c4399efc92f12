"""How the library that an encoder comes from makes the same network, as code for the model card."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from scclr.api import Run
from scclr.config.build import find_component, is_own, typed_arguments
from scclr.config.errors import optional_library
from scclr.config.resolve import SUPPLIED
from scclr.encoders.resnet import ResNet
from scclr.encoders.timm import Timm, size_options
from scclr.encoders.vit import ViT


@dataclass(frozen=True)
class Recipe:
    """Code that makes ``model``, into which the exported weights are loaded strictly.

    Args:
        library: ``torchvision``, ``timm``, or ``state_dict`` for a class of its own.
        name: of the architecture.
        imports, code: lines of Python.
        prefix: of the encoder's weights, which the names in the file do not have.
        settings: what timm reads in ``config.json``.
    """

    library: str
    name: str
    imports: str
    code: tuple[str, ...]
    prefix: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def weights(self, encoder: nn.Module) -> dict[str, Tensor]:
        """Weights and buffers by the names that the library gives them."""
        return {name.removeprefix(self.prefix): weight for name, weight in encoder.state_dict().items()}

    def files(self, run: Run) -> dict[str, str]:
        """The text of the user's own encoder, as the run has kept it, by the name of its module."""
        source = run.result.get("sources", {}).get("encoder")
        if self.library != "state_dict" or source is None:
            return {}
        path = run.directory / source["file"]
        return {f"{run.config.encoder['_target_'].split('.')[-2]}.py": path.read_text()} if path.is_file() else {}


def recipe(run: Run, *, plain: bool = False) -> Recipe:
    """What makes the encoder of ``run``.

    Args:
        plain: by its own class, also where a library makes it.
    """
    encoder = run.model.encoder
    if plain:
        return _of_class(run)
    known: list[tuple[type[nn.Module], Callable[[Run, Any], Recipe]]] = [(ResNet, _resnet), (ViT, _vit), (Timm, _timm)]
    return next((make(run, encoder) for kind, make in known if type(encoder) is kind), None) or _of_class(run)


def _resnet(run: Run, encoder: ResNet) -> Recipe:
    network, name = encoder.network, f"resnet{run.config.encoder['depth']}"
    conv, code = network.conv1, [f"model = torchvision.models.{name}()", "model.fc = torch.nn.Identity()"]
    if (conv.in_channels, conv.kernel_size) != (3, (7, 7)):
        numbers = f"{conv.in_channels}, 64, {conv.kernel_size[0]}, {conv.stride[0]}, {conv.padding[0]}"
        code.append(f"model.conv1 = torch.nn.Conv2d({numbers}, bias=False)")
    if isinstance(network.maxpool, nn.Identity):
        code.append("model.maxpool = torch.nn.Identity()")
    return Recipe("torchvision", name, "import torchvision", tuple(code), "network.")


def _vit(run: Run, encoder: ViT) -> Recipe:
    node, network = run.config.encoder, encoder.network
    sizes = {
        "image_size": network.image_size,
        "patch_size": network.patch_size,
        "num_layers": node["depth"],
        "num_heads": node["heads"],
        "hidden_dim": network.hidden_dim,
        "mlp_dim": network.mlp_dim,
    }
    code = [f"model = torchvision.models.VisionTransformer({_arguments(sizes)})", "model.heads = torch.nn.Identity()"]
    if network.conv_proj.in_channels != 3:
        numbers = f"{network.conv_proj.in_channels}, {network.hidden_dim}, {network.patch_size}, {network.patch_size}"
        code.append(f"model.conv_proj = torch.nn.Conv2d({numbers})")
    return Recipe("torchvision", "VisionTransformer", "import torchvision", tuple(code), "network.")


def _timm(run: Run, encoder: Timm) -> Recipe:
    node, library = run.config.encoder, optional_library("timm", "encoder=timm")
    sizes = size_options(library, node["name"], node.get("img_size") or run.image_size, node.get("patch_size"))
    given = {"in_chans": run.model.channels, "num_classes": 0, **sizes}
    code = f"model = timm.create_model({node['name']!r}, pretrained=False, {_arguments(given)})"
    statistics = {name: getattr(run.model, name).flatten().tolist() for name in ("mean", "std")}
    settings = {
        "architecture": node["name"].split(".")[0],
        "num_classes": 0,
        "num_features": encoder.feature_dim,
        "model_args": {key: value for key, value in given.items() if key != "num_classes"},
        "pretrained_cfg": {
            **statistics,
            "input_size": [run.model.channels, run.image_size, run.image_size],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "num_classes": 0,
        },
    }
    return Recipe("timm", node["name"], "import timm", (code,), "network.", settings)


def _of_class(run: Run) -> Recipe:
    node = run.config.encoder
    module, _, name = node["_target_"].rpartition(".")
    given = {"in_channels": run.model.channels, "image_size": run.image_size}
    arguments = {**_taken(run, given), **typed_arguments("encoder", node, *SUPPLIED["encoder"])}
    imports = f"from {module} import {name}" + ("" if is_own("encoder", node) else "  # the file beside this card")
    return Recipe("state_dict", name, imports, (f"model = {name}({_arguments(arguments)})",))


def _taken(run: Run, given: dict[str, Any]) -> dict[str, Any]:
    """Those of ``given`` that the constructor of the encoder names."""
    parameters = inspect.signature(find_component("encoder", run.config.encoder)).parameters
    return {key: value for key, value in given.items() if key in parameters}


def _arguments(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in values.items())
