"""The documents as they are committed; `make docs` builds and runs them."""

import json
import pathlib
import re

import pytest

from vqrae_jax import cli
from vqrae_jax.train.config import read_config

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = ROOT / 'docs' / 'notebooks'
NOTEBOOKS = sorted(FOLDER.glob('*.ipynb'))


def cells(path, kind):
  """(id, source) of each cell of a kind."""
  found = json.loads(path.read_text(encoding='utf8'))['cells']
  return [
    (c['id'], ''.join(c['source'])) for c in found if c['cell_type'] == kind
  ]


def python_of(source):
  """A cell without the lines that IPython alone reads; of a cell in another
  language, nothing."""
  if source.startswith('%%bash'):
    return ''
  lines = source.splitlines()
  return '\n'.join(x for x in lines if not x.lstrip().startswith(('%', '!')))


def test_there_are_notebooks():
  assert {path.stem for path in NOTEBOOKS} >= {
    'tour', 'downstream', 'own_pictures',
  }  # fmt: skip


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_nothing_is_stored(path):
  notebook = json.loads(path.read_text(encoding='utf8'))
  assert (notebook['nbformat'], notebook['nbformat_minor']) == (4, 5)
  assert notebook['metadata']['kernelspec']['name'] == 'python3'
  ids = [cell['id'] for cell in notebook['cells']]
  assert len(set(ids)) == len(ids)
  for cell in notebook['cells']:
    if cell['cell_type'] == 'code':
      assert cell['outputs'] == [] and cell['execution_count'] is None


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_has_a_title_and_its_own_badge(path):
  first = cells(path, 'markdown')[0][1]
  assert first.startswith('# ')
  colab = 'https://colab.research.google.com'
  page = f'github/vqrae-jax/vqrae_jax/blob/main/docs/notebooks/{path.name}'
  badge = f'![Open in Colab]({colab}/assets/colab-badge.svg)'
  assert f'[{badge}]({colab}/{page})' in first


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_are_python(path):
  for name, source in cells(path, 'code'):
    compile(python_of(source), f'{path.stem}/{name}', 'exec')


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_links_lead_to_files(path):
  for _, source in cells(path, 'markdown'):
    for link in re.findall(r'\]\(([^)]*)\)', source):
      assert link.startswith('https://') or (path.parent / link).is_file(), link


def test_the_config_of_own_pictures_is_read(tmp_path):
  source = dict(cells(FOLDER / 'own_pictures.ipynb', 'code'))['config']
  file = tmp_path / 'mine.py'
  file.write_text(python_of(source))
  config = read_config(cli.load_config(f'{file}:steps=40'))
  assert config.batch_size == 8


def test_the_readme_is_short_and_its_links_lead_to_files():
  text = (ROOT / 'README.md').read_text()
  assert len(text.splitlines()) <= 150
  links = re.findall(r'\]\(\s*([^)#]*)', text)
  assert len(links) > 10
  for link in links:
    assert link.startswith('https://') or (ROOT / link).exists(), link


def test_what_a_block_is_left_out_for_exists():
  """A block that does not run names what runs in its place, if there is."""
  pages = [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')]
  text = '\n'.join(path.read_text() for path in pages)
  reasons = re.findall(r'<!-- (?:not run|parsed only): ([^<>]+) -->', text)
  assert len(reasons) > 10
  for path in re.findall(r'tests/[\w/.]*', ' '.join(reasons)):
    assert (ROOT / path).exists(), path
