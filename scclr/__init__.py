"""scclr: self-supervised contrastive learning with a balance between attraction and repulsion.

``scclr.train``, ``scclr.load`` and ``scclr.results`` are the command line's work from Python. The losses are in
``scclr.losses``. This file imports nothing that takes time.

In the order in which data flows, from a command line to ``result.json``:

    cli          the command line, its help and its exit codes
    report       a page of tables, statistics and figures about finished runs
    api          runs from Python, their encoders for other programs, and their evaluation anew
    config       the configuration: schema, composition, identity of a run, construction of components
    train        the stages of a run in order; components builds what they need
    datasets     images and labels, their splits, and what each training step reads
    augment      random views of images
    encoders     images to representations h, and by the projector to embeddings z
    losses       attraction and repulsion of embeddings
    pretrain     the training loop
    evaluate     protocols on the features of the frozen encoder
    theory       how far the loss is from the supervised objective that it approximates
    run          what keeps a run alive and on record: files, checkpoints, signals, processes, log, sweeps

Imports point down the list ``__main__``, cli, report, api, train, components, theory, pretrain, evaluate, datasets,
encoders, run, losses, augment, config.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scclr.config.errors import UserError

if TYPE_CHECKING:
    from scclr.api import Run

__all__ = ["UserError", "load", "results", "train"]
__version__ = "0.1.0"


def train(*words: str) -> "Run":
    """Do one run, as ``scclr train <words>`` does, and load it: ``scclr.train("loss=balanced", "alpha=0.5")``.

    A run with these words that is finished is only loaded, and one that was interrupted goes on from its checkpoint.
    Ctrl-C saves one first. Torch's random generators and settings are afterwards as they were. In a script, a call with
    ``nproc=2`` or more belongs below ``if __name__ == "__main__":``, because each process imports the script.

    Args:
        words: ``key=value``, ``group=choice`` and flags such as ``"--config-dir=my_conf"``.

    Raises:
        UserError: the words, the data or the machine do not allow the run; the message says what to give instead.
    """
    from scclr import api

    return api.train(*words)


def load(directory: str | Path, trust: Iterable[str] = ()) -> "Run":
    """The finished run in a run folder, with its ``config``, ``metrics``, ``model``, ``encoder`` and ``features``.

    ``evaluations`` is what ``scclr evaluate`` has added to it.

    Args:
        trust: packages outside scclr whose components the run may be made of. To build them runs their code.

    Raises:
        UserError: the folder holds no finished run, or one of an untrusted component.
    """
    from scclr import api

    return api.Run(directory, trust)


def results(directory: str | Path) -> list[dict[str, Any]]:
    """One flat dict for each finished run below a folder: ``pandas.DataFrame(scclr.results("runs"))``.

    It has the folder, the loss, every key of the configuration (``alpha``, ``seed``, ``loss.temperature``), the
    metrics (``logreg-v1/top1``, as fractions), those that ``scclr evaluate`` has added (``mnist/knn-v1/top1``), and the
    seconds of each stage. Where a protocol was evaluated on a dataset with several options, the names of these have a
    hash of the options: ``mnist-1a2b3c4d/knn-v1/top1``.

    Raises:
        UserError: there are none, or a file about one is damaged.
    """
    from scclr import api

    return api.results(directory)
