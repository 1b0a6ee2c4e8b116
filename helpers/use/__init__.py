"""A finished model in use: opened, served, on a page, for many photos, exported with its card."""
