"""Runs, one file each; a config's docstring is its launch line."""
