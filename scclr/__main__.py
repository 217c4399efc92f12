"""``python -m scclr`` is the ``scclr`` command."""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:  # the first entry is the current folder: a file torch.py there must hide nothing
        sys.path.append(sys.path.pop(0))
    from scclr.cli import main

    main()
