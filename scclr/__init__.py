"""scclr: self-supervised contrastive learning with a balance between attraction and repulsion.

In the order in which data flows, from a command line to ``result.json``:

    cli          the command line, its help and its exit codes
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

Imports point down the list ``__main__``, cli, train, components, theory, pretrain, evaluate, datasets, encoders, run,
losses, augment, config.
"""

__version__ = "0.1.0"
