"""`python -m vqrae_jax NAME …` is `vqrae NAME …`."""

from vqrae_jax import cli

cli.vqrae()
