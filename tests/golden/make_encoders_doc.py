"""Writes docs/encoders.md out of the tables: rows, counts, licences, parity.

    python -m tests.golden.make_encoders_doc

Renew it when a row, a count, a licence or a parity figure changes; a test
compares. The parity figures are those of encoder_parity.json, {row: words},
where there are any.
"""

import json
import pathlib

from tests.golden import make_encoder_params as params
from vqrae_jax.encoders import ENCODERS, PUBLISHED

PATH = pathlib.Path(__file__).parents[2] / 'docs' / 'encoders.md'
PARITY = pathlib.Path(__file__).with_name('encoder_parity.json')

_HEAD = """# Encoders

Every encoder that `encoder=dict(name=…)` and `vqrae_jax.load_encoder` take by
name. This page is written by `python -m tests.golden.make_encoders_doc` and
checked by a test.

`python -m vqrae_jax.fetch_weights --names=NAME` brings one ahead of a run on
a closed network, `python -m vqrae_jax.convert --source=NAME --out=DIR` stores
one as a directory that `load_encoder` opens; licences are those that the
repositories state. Pixels are the side of the square image that the positions
were learned for; any other size and ratio is reached by resampling them.
Params are of the encoder alone: no pooling head, no text tower, no decoder.
Parity is the relative error
|a - b| / |b| over all tokens against the PyTorch model of the same weights,
random ones in the published format, in f32, the worst of two or three sizes of
image (`tests/encoders/test_parity_real.py`, by `make test-slow`); "—" is not
measured for this row.

"""
_COLUMNS = (
  'name', 'params', 'width', 'depth', 'patch', 'pixels', 'resized', 'hub',
  'licence', 'parity',
)  # fmt: skip


def _figure(value: object) -> str:
  return f'{value:.1e}' if isinstance(value, float) else str(value)


def _row(name: str, count: int, parity: dict) -> str:
  spec, row = params.encoder(name).spec, PUBLISHED[name]
  vit = spec.vit
  cells = (
    f'`{name}`',
    f'{count:,}',
    vit.width,
    vit.depth,
    vit.patch_size,
    _pixels(name, vit),
    spec.resize,
    f'[{row.hub}]({row.url})',
    row.licence,
    _figure(parity.get(name, '—')),
  )
  return f'| {" | ".join(map(str, cells))} |\n'


def _pixels(name: str, vit) -> int:
  """The published size: 384 for a grid of 27 patches of 14, the name says."""
  side = vit.grid[0] * vit.patch_size
  told = [int(w) for w in name.replace('px', '').split('-') if w.isdigit()]
  near = [n for n in told if 0 <= n - side < vit.patch_size]
  return near[0] if near else side


def page() -> str:
  """The whole of docs/encoders.md."""
  counts = json.loads(params.PATH.read_text())
  parity = json.loads(PARITY.read_text()) if PARITY.is_file() else {}
  head = f'| {" | ".join(_COLUMNS)} |\n|{"---|" * len(_COLUMNS)}\n'
  rows = (_row(n, counts[n], parity) for n in ENCODERS)
  return _HEAD + head + ''.join(rows)


if __name__ == '__main__':
  PATH.write_text(page(), encoding='utf8')
