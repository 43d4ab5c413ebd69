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


def _row(name: str, count: int, parity: dict) -> dict:
  """{column: cell}."""
  spec, row = params.spec_of(name), PUBLISHED[name]
  vit, figure = spec.vit, parity.get(name, '—')
  # The published size, in the name: 384 for a grid of 27 patches of 14.
  pixels = re.search(r'(\d{3})(px|$)', name)
  return dict(
    name=f'`{name}`',
    params=f'{count:,}',
    width=vit.width,
    depth=vit.depth,
    patch=vit.patch_size,
    pixels=pixels[1] if pixels else vit.grid[0] * vit.patch_size,
    resized=spec.resize,
    hub=f'[{row.hub}](https://huggingface.co/{row.hub})',
    licence=row.licence,
    parity=f'{figure:.1e}' if isinstance(figure, float) else figure,
  )


def page() -> str:
  """The text of docs/encoders.md, whose words stay as they are."""
  counts = json.loads(params.PATH.read_text())
  parity = json.loads(PARITY.read_text())
  rows = [_row(n, counts[n], parity) for n in ENCODERS]
  head = f'| {" | ".join(rows[0])} |\n|{"---|" * len(rows[0])}\n'
  lines = (f'| {" | ".join(map(str, row.values()))} |\n' for row in rows)
  words = PATH.read_text(encoding='utf8').split('| name |')[0]
  return words + head + ''.join(lines)


if __name__ == '__main__':
  PATH.write_text(page(), encoding='utf8')
