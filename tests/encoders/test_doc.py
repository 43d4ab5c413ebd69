"""docs/encoders.md agrees with the tables."""

from tests.golden import make_encoders_doc as doc
from vqrae_jax.encoders import ENCODERS


def test_the_page_agrees_with_the_tables():
  renew = 'renew it: python -m tests.golden.make_encoders_doc'
  assert doc.PATH.read_text(encoding='utf8') == doc.page(), renew


def test_every_encoder_has_a_line():
  lines = doc.page().splitlines()
  for name in ENCODERS:
    assert sum(line.startswith(f'| `{name}` ') for line in lines) == 1
  so400m = next(
    x for x in lines if x.startswith('| `siglip-so400m-patch14-384')
  )
  assert '| 1152 | 27 | 14 | 384 | bicubic |' in so400m
