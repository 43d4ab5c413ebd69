"""Published weights: files in, a model's leaves out, and back.

  source = open_weights('decoder.pt')           {key: lazy array}
  leaves = Pretrained(source, table, target).load()
  arrays = export(table, leaves)                the same table backwards

The tables themselves stand with the models they serve. No torch, no
transformers, no network.
"""

from vqrae_jax.weights.handles import Handle, Source, arrays
from vqrae_jax.weights.pretrained import Pretrained, export
from vqrae_jax.weights.readers import open_weights
from vqrae_jax.weights.rules import (
  PREFIXES,
  Rule,
  Table,
  fill,
  known,
  skip,
)
from vqrae_jax.weights.source_words import SourceWord, parse_source
from vqrae_jax.weights.transforms import by_heads

__all__ = [
  'PREFIXES',
  'Handle',
  'Pretrained',
  'Rule',
  'Source',
  'SourceWord',
  'Table',
  'arrays',
  'by_heads',
  'export',
  'fill',
  'known',
  'open_weights',
  'parse_source',
  'skip',
]
