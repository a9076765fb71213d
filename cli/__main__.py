"""`python -m cli`: the command where there is no script to start, as torchrun needs it."""

from __future__ import annotations

from cli.app import main

if __name__ == "__main__":
    main()
