"""``python -m scclr`` is the ``scclr`` command."""

from scclr.cli import main

if __name__ == "__main__":
    main()
