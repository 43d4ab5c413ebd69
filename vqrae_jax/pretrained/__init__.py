"""Weights that others published, in their names: tables and loading."""
