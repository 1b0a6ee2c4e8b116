"""Tools of the repository itself: paired notebooks, committed outputs, environment files, GPU groups."""
