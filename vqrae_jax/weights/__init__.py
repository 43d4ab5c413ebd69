"""Published weights: files in, a model's leaves out, and back.

  source = open_weights('decoder.pt')           {key: lazy array}
  leaves = Pretrained(source, table, target).load()
  arrays = export(table, leaves)                the same table backwards

The tables themselves stand with the models they serve. No torch, no
transformers. Names are imported when first used: `import vqrae_jax` needs
tables, not readers.
"""

import importlib

_HOMES = {
  'files': 'LazyArray WeightFile arrays open_weights write_safetensors',
  'load': 'Pretrained export',
  'rules': 'PREFIXES Rule Table by_heads computed constant ignore',
  'hub': 'Source parse_source',
}
_HOME_OF = {
  name: home for home, names in _HOMES.items() for name in names.split()
}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str):
  if name not in _HOME_OF:
    raise AttributeError(f'module "{__name__}" has no attribute "{name}"')
  home = importlib.import_module(f'{__name__}.{_HOME_OF[name]}')
  return getattr(home, name)
