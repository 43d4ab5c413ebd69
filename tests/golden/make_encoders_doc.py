"""Writes the table of docs/encoders.md: rows, counts, licences, parity.

    python -m tests.golden.make_encoders_doc

Renew it when a row, a count, a licence or a parity figure changes; a test
compares. The parity figures are those of encoder_parity.json, {row: figure}.
"""

import json
import pathlib
import re

from tests.golden import make_encoder_params as params
from vqrae_jax.encoders import ENCODERS, PUBLISHED

PATH = pathlib.Path(__file__).parents[2] / 'docs' / 'encoders.md'
PARITY = pathlib.Path(__file__).with_name('encoder_parity.json')

_COLUMNS = (
  'name', 'params', 'width', 'depth', 'patch', 'pixels', 'resized', 'hub',
  'licence', 'parity',
)  # fmt: skip


def _row(name: str, count: int, parity: dict) -> str:
  spec, row = params.spec_of(name), PUBLISHED[name]
  vit, figure = spec.vit, parity.get(name, '—')
  # The published size, in the name: 384 for a grid of 27 patches of 14.
  pixels = re.search(r'(\d{3})(px|$)', name)
  cells = (
    f'`{name}`',
    f'{count:,}',
    vit.width,
    vit.depth,
    vit.patch_size,
    pixels[1] if pixels else vit.grid[0] * vit.patch_size,
    spec.resize,
    f'[{row.hub}](https://huggingface.co/{row.hub})',
    row.licence,
    f'{figure:.1e}' if isinstance(figure, float) else figure,
  )
  return f'| {" | ".join(map(str, cells))} |\n'


def page() -> str:
  """The text of docs/encoders.md, whose words stay as they are."""
  counts = json.loads(params.PATH.read_text())
  parity = json.loads(PARITY.read_text())
  head = f'| {" | ".join(_COLUMNS)} |\n|{"---|" * len(_COLUMNS)}\n'
  rows = (_row(n, counts[n], parity) for n in ENCODERS)
  words = PATH.read_text(encoding='utf8').split('| name |')[0]
  return words + head + ''.join(rows)


if __name__ == '__main__':
  PATH.write_text(page(), encoding='utf8')
