"""The packages of vqrae_jax; all else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
  packages=[
    *find_packages(include=['vqrae_jax', 'vqrae_jax.*']),
    'vqrae_jax.configs',
  ],
  # Recipes lie at the top of the repository. Installed they are a part of the
  # package, which claims no other name: `cli.load_config` finds them in both.
  package_dir={'vqrae_jax.configs': 'configs'},
)
