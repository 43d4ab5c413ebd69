"""The documentation site: `make docs` builds it into docs/_build/html.

Warnings are errors there. Pages of the reference are written by `generate.py`
before the build; the notebooks run in it.
"""

import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

project = 'vqrae_jax'
author = copyright = 'The vqrae_jax authors'
extensions = [
  'myst_nb',
  'sphinx.ext.autodoc',
  'sphinx.ext.napoleon',
  'sphinx_copybutton',
]
exclude_patterns = ['_build', '**/.ipynb_checkpoints', 'jupyter_execute']
root_doc = 'index'

html_theme = 'furo'
html_static_path = ['_static']
html_css_files = ['wide.css']
html_title = 'vqrae_jax'
html_theme_options = {
  'source_repository': 'https://github.com/vqrae-jax/vqrae_jax',
  'source_branch': 'main',
  'source_directory': 'docs/',
}

myst_enable_extensions = ['attrs_inline', 'colon_fence', 'deflist']
myst_heading_anchors = 3
suppress_warnings = ['myst.header']  # an included file begins at level 1

# In every build: `make docs` reads all pages again, so outputs are of now.
nb_execution_mode = 'force'
nb_execution_timeout = 600
nb_execution_raise_on_error = True

default_role = 'code'  # docstrings are Markdown's
autodoc_member_order = 'bysource'
autodoc_typehints_format = 'short'
napoleon_use_ivar = True


def setup(app):
  from docs import generate

  app.connect('builder-inited', lambda app: generate.write(HERE))
