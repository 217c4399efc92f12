"""The model card of an exported encoder: how to load it, what it takes, how it was trained, and what it achieves."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import mean, stdev

from scclr import __version__
from scclr.api import Run
from scclr.api.recipe import Recipe
from scclr.config.errors import UserError
from scclr.config.resolve import essence
from scclr.run.result import read_result

CONFIDENCE = 0.95
BASELINES = {"baseline/untrained/": "untrained encoder", "baseline/pixels/": "raw pixels"}

CARD = """\
---
library_name: {library}
pipeline_tag: image-feature-extraction
tags: [self-supervised-learning, contrastive-learning, scclr]
---

# {name}

An encoder of images that gives {width} features of each. It was pretrained by scclr {version}, a laboratory of
contrastive learning ([arXiv 2510.10572](https://arxiv.org/abs/2510.10572)), without labels unless the loss reads them:
the loss is {loss}, the dataset {dataset}.

## How to load it

```python
{loader}
```

`images` are float32 [N, {channels}, {side}, {side}] with values from 0 to 1, and h is [N, {width}]. {normalization}
In training an image of another size had its shorter side resized, and its center cropped.

## What it achieves

Accuracies are fractions in [0, 1] on the test split, which was touched once; choices were made on a validation split.

{table}

## How it was made

Values that equal a default of scclr are left out, and so are paths.

```json
{configuration}
```
"""


def loader(run: Run, made: Recipe, form: str) -> str:
    """Python code that makes ``h`` of ``images``, in a process that need not know scclr."""
    if form == "onnx":
        return "\n".join(
            [
                "import onnxruntime",
                "",
                'session = onnxruntime.InferenceSession("model.onnx")',
                '(h,) = session.run(None, {"images": images})',
            ]
        )
    rows = {name: getattr(run.model, name).flatten().tolist() for name in ("mean", "std")}
    numbers = {name: ", ".join(f"{value:.9g}" for value in row) for name, row in rows.items()}  # float32 exactly
    statistics = [f"{name} = torch.tensor([{text}]).view(1, -1, 1, 1)" for name, text in numbers.items()]
    return "\n".join(
        [
            "import torch",
            made.imports,
            "from safetensors.torch import load_file",
            "",
            *made.code,
            'model.load_state_dict(load_file("model.safetensors"))',
            "model.eval()",
            *statistics,
            "with torch.no_grad():",
            "    h = model((images - mean) / std)",
        ]
    )


def card(run: Run, form: str, code: str) -> str:
    """The text of the model card, in Markdown with the header that the Hugging Face Hub reads."""
    inside = "Pixels are normalized inside the network."
    outside = "Pixels are normalized by the mean and std above before they enter: the weights do not contain that."
    dataset = str(run.config.dataset["_target_"])
    return CARD.format(
        library=form if form in ("timm", "onnx") else "pytorch",
        name=run.directory.resolve().name,
        version=__version__,
        loss=run.config.loss_name + ("" if run.config.alpha is None else f" (alpha = {run.config.alpha:g})"),
        dataset=dataset.split(".")[-2] if dataset.startswith("scclr.") else dataset,
        width=run.model.encoder.feature_dim,
        loader=code,
        channels=run.model.channels,
        side=run.image_size,
        normalization=inside if form == "onnx" else outside,
        table=table(run.metrics, over_seeds(run)),
        configuration=json.dumps(essence(asdict(run.config)), indent=2),
    )


def over_seeds(run: Run) -> list[dict[str, float]]:
    """The metrics of the finished runs beside ``run`` that differ from it in the seed alone; its own are among them."""
    found = []
    for path in sorted(run.directory.resolve().parent.glob("*/result.json")):
        try:
            other = read_result(path.parent)
        except (UserError, OSError):
            continue  # a damaged file of another run is no reason to refuse this one
        if other.get("group") == run.result.get("group"):
            found.append(dict(other["metrics"]))
    return found


def table(metrics: Mapping[str, float], seeds: Sequence[Mapping[str, float]]) -> str:
    """A row for each metric: this run, what it is compared with, and the mean over seeds with its interval."""
    own = [name for name in metrics if not name.startswith(tuple(BASELINES))]
    if not own:
        return "It was not evaluated."
    compared = {
        prefix: title for prefix, title in BASELINES.items() if any(name.startswith(prefix) for name in metrics)
    }
    columns = ["", "this run", *compared.values()]
    columns += [f"mean of {len(seeds)} seeds [{CONFIDENCE:.0%} interval]"] if len(seeds) > 1 else []
    rows = []
    for name in own:
        cells = [f"`{name}`", *(_short(metrics.get(prefix + name)) for prefix in ("", *compared))]
        cells += [interval([other[name] for other in seeds if name in other])] if len(seeds) > 1 else []
        rows.append(cells)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def interval(values: Sequence[float]) -> str:
    """The mean and its interval by Student's t, from runs of different seeds."""
    if len(values) < 2:
        return ""
    from scipy.stats import t  # slow to import

    center = mean(values)
    half = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return f"{center:.4g} [{center - half:.4g}, {center + half:.4g}]"


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
