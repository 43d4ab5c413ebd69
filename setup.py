"""The packages of vqrae_jax and its page; all else is in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup

REPOSITORY = 'https://github.com/vqrae-jax/vqrae_jax'


def page() -> str:
  """README.md with links that work outside of the repository."""
  text = pathlib.Path(__file__).with_name('README.md').read_text('utf8')
  text = re.sub(
    r'(!\[[^\]]*\]\()(?!https:)', rf'\1{REPOSITORY}/raw/main/', text
  )
  return re.sub(r'(\]\()(?!https:)', rf'\1{REPOSITORY}/blob/main/', text)


setup(
  long_description=page(),
  long_description_content_type='text/markdown',
  packages=[
    *find_packages(include=['vqrae_jax', 'vqrae_jax.*']),
    'vqrae_jax.configs',
  ],
  # Recipes lie at the top of the repository. Installed they are a part of the
  # package, which claims no other name: `cli.load_config` finds them in both.
  package_dir={'vqrae_jax.configs': 'configs'},
)
