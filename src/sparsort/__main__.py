"""`python -m sparsort`: the command line."""

from __future__ import annotations

from sparsort.recipes.cli import main

if __name__ == "__main__":
    main()
