"""What the notebooks share: one file, one job (see the tree in README.md)."""
