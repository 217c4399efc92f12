"""The commands about a finished run: ``export``, ``embed``, ``evaluate``."""

import argparse
import re
from typing import NoReturn

from scclr.config.errors import UserError, require

EXPORT_HELP = """\
usage: scclr export <run> [--format torchvision|timm|state_dict|onnx] [--to <folder>]

Write the encoder of a finished run for other libraries, with config.json and a model card that says how to load it.
The default format is that of the library that the encoder comes from; state_dict is that of the encoder's own class.
The default folder is export-<format> in the run folder. It is laid out for the Hugging Face Hub; nothing is uploaded.

examples
  scclr export runs/default/<run>
  scclr export runs/default/<run> --format onnx --to my_encoder"""

EMBED_HELP = """\
usage: scclr embed <run> <folder of images> <out.npz or out.parquet> [--layer h|z] [--skip]

Write the features of all images in a folder and below: h, the encoder's output, or z, the projector's. Images are
resized as the run's dataset does. The same command goes on after an interruption. A file that cannot be decoded is
named, and with --skip left out.

examples
  scclr embed runs/default/<run> photos features.npz
  scclr embed runs/default/<run> photos features.parquet --layer z --skip"""

EVALUATE_HELP = """\
usage: scclr evaluate <run> [protocols=[...]] [dataset=<name>] [key=value ...]

Evaluate a finished run again: by other protocols, or on other data than its own. The numbers are added to the run, in
its folder evaluations; typing the command again shows them, and overwrite=true computes them anew. Keys of probe and
dataset, device and nproc are those of `scclr train`.

examples
  scclr evaluate runs/default/<run> protocols=[knn200,ncc]
  scclr evaluate runs/default/<run> dataset=fashion_mnist protocols=[logreg] probe.protocols.logreg.max_iter=100"""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all others here."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` says more")


def _parser(command: str, *positional: str) -> Parser:
    parser = Parser(prog=f"scclr {command}", add_help=False, allow_abbrev=False)
    for name in ("run", *positional):
        parser.add_argument(name)
    return parser


def _trusted(argv: list[str]) -> tuple[list[str], list[str]]:
    """(the packages that the words ``trust=[...]`` name, the other words)."""
    names = [name for word in argv if word.startswith("trust=") for name in re.findall(r"[\w.]+", word[6:])]
    return names, [word for word in argv if not word.startswith("trust=")]


def export(argv: list[str]) -> None:
    """``scclr export RUN``: write its encoder for another library."""
    trust, words = _trusted(argv)
    parser = _parser("export")
    parser.add_argument("--format", default=None)
    parser.add_argument("--to", default=None)
    args = parser.parse_args(words)

    import scclr
    from scclr.api.export import export as write

    print(write(scclr.load(args.run, trust), args.format, args.to))


def embed(argv: list[str]) -> None:
    """``scclr embed RUN FOLDER OUT``: write the features of a folder of images."""
    trust, words = _trusted(argv)
    parser = _parser("embed", "folder", "out")
    parser.add_argument("--layer", default="h")
    parser.add_argument("--skip", action="store_true")
    args = parser.parse_args(words)

    import scclr
    from scclr.api.embed import embed as write

    print(write(scclr.load(args.run, trust), args.folder, args.out, layer=args.layer, skip=args.skip))


def evaluate(argv: list[str]) -> None:
    """``scclr evaluate RUN WORDS``: evaluate it again, and show what is known."""
    trust, words = _trusted(argv)
    require(bool(words) and "=" not in words[0], "type scclr evaluate <run>, such as runs/default/<run>")

    import scclr
    from scclr.api.evaluate import evaluate as measure
    from scclr.api.evaluate import report

    run = scclr.load(words[0], trust)
    records = measure(run, words[1:])
    if records:  # in the main process
        print(report(run, records))
