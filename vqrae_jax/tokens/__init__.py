"""Dumps of tokens: what `python -m vqrae_jax.tokenize` writes, and readers.

    dump = open_dump('tokens', fingerprint='3f2a…')
    dump[0]  # {'tokens': i32[gh gw], 'label': 7, 'key': 'cat/1.jpg', 'view': 0}
    grain.MapDataset.source(dump).shuffle(seed=0).batch(256)

Numpy only: no device is touched, and no jax imported.
"""

from vqrae_jax.tokens.dump import Dump, Writer, open_dump
from vqrae_jax.tokens.formats import FORMATS, Layout, Shard, find_format

__all__ = [
  'FORMATS',
  'Dump',
  'Layout',
  'Shard',
  'Writer',
  'find_format',
  'open_dump',
]
