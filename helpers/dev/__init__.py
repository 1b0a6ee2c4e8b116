"""Tools of the repository itself: paired notebooks, their committed outputs, the benchmark, the check at 7B."""
