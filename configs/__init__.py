"""Configs of runs, one per file; each docstring starts with its launch line."""
