"""Writes docs/encoders.md from the tables: rows, counts, licences, parity.

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

_HEAD = """# Encoders

Every encoder that `encoder=dict(name=…)` and `vqrae_jax.load_encoder` take by
name. `python -m tests.golden.make_encoders_doc` writes this page, and a test
checks it.

`python -m vqrae_jax.fetch_weights --names=NAME` downloads an encoder before a
run without internet. `python -m vqrae_jax.convert --source=NAME --out=DIR`
writes it as a directory that `load_encoder` opens. Licences are those that the
repositories state. "Pixels" is the side of the square image that the positions
were learned for; other sizes and aspect ratios resample them. "Params" counts
the encoder alone: no pooling head, no text tower, no decoder. "Parity" is the
relative error |a - b| / |b| over all tokens against the PyTorch model with the
same weights (random, in the published format), in f32, the worst of two or
three image sizes (`tests/encoders/test_parity_real.py`, `make test-slow`); "—"
means not measured.

"""
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
    f'[{row.hub}]({row.url})',
    row.licence,
    f'{figure:.1e}' if isinstance(figure, float) else figure,
  )
  return f'| {" | ".join(map(str, cells))} |\n'


def page() -> str:
  """The text of docs/encoders.md."""
  counts = json.loads(params.PATH.read_text())
  parity = json.loads(PARITY.read_text())
  head = f'| {" | ".join(_COLUMNS)} |\n|{"---|" * len(_COLUMNS)}\n'
  rows = (_row(n, counts[n], parity) for n in ENCODERS)
  return _HEAD + head + ''.join(rows)


if __name__ == '__main__':
  PATH.write_text(page(), encoding='utf8')
