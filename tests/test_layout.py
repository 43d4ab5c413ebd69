"""The package's import order, as data (docs/architecture.md)."""

import ast
import pathlib

import vqrae_jax

PACKAGE = pathlib.Path(vqrae_jax.__file__).parent

# A package or module imports those of a lower row only (and row 0 itself).
ORDER = (
  {'errors', 'files', 'paths', 'plugins', 'specs', 'types', 'ops'},
  {'nn', 'programs', 'tokens', 'weights'},
  {'quantizers', 'encoders'},
  {'models', 'losses', 'optim', 'sharding', 'data', 'hosts'},
  {'pretrained', 'inference'},
  {'export'},
  {'evaluate'},
  {'train'},
  {
    '__main__', 'cli', 'convert', 'demo', 'doctor', 'fetch_weights',
    'latent_stats', 'preflight', 'push', 'reconstruct_images', 'tokenize',
  },
)  # fmt: skip
RANK = {name: rank for rank, row in enumerate(ORDER) for name in row}

# Narrower than their row: all of the package that these may import.
ONLY = {
  'errors': set(),
  'paths': {'errors'},
  'plugins': {'errors'},
  'files': set(),
  'types': set(),
  'specs': {'errors'},
  'ops': {'errors'},
  'weights': {'ops', 'files', 'paths', 'errors'},
  'encoders': {'weights', 'specs', 'errors'},
  'losses': {'nn', 'weights', 'types', 'ops', 'specs', 'errors'},
  'optim': {'ops', 'specs', 'types', 'errors'},
  'sharding': {'ops', 'specs', 'types', 'errors'},
  'tokens': {'files', 'errors'},
  'data': {'tokens', 'specs', 'files', 'paths', 'errors'},
}


def part(path: pathlib.Path) -> str:
  """The package or module at the top that a file belongs to."""
  name = path.relative_to(PACKAGE).parts[0].removesuffix('.py')
  commands = (
    'train/export.py',
    *(f'{name}/__main__.py' for name in ('train', 'evaluate', 'export')),
  )
  return 'cli' if str(path.relative_to(PACKAGE)) in commands else name


def imports(path: pathlib.Path):
  """Full names of all that a file imports, wherever in it."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import'
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def test_import_order():
  wrong = []
  for path in PACKAGE.rglob('*.py'):
    me = part(path)
    if me == '__init__':
      continue
    for name in imports(path):
      top, *rest = name.split('.')
      if top != 'vqrae_jax' or rest[0] in (me, '__version__'):
        continue
      lower = RANK[rest[0]] < RANK[me] or RANK[me] in (0, len(ORDER) - 1)
      if not lower or rest[0] not in ONLY.get(me, RANK):
        wrong.append(f'{path.relative_to(PACKAGE)} imports {name}')
  assert not wrong


def test_data_and_encoders_need_no_device():
  """`data` and `tokens` touch no device, `encoders` is data for tables."""
  rooms = dict(data={'jax', 'flax'}, tokens={'jax', 'flax'}, encoders={'jax'})
  for room, banned in rooms.items():
    for path in (PACKAGE / room).rglob('*.py'):
      assert not {n.split('.')[0] for n in imports(path)} & banned, path


def test_public_names():
  names = set(vqrae_jax.__all__)
  assert names == {
    'UserError', 'build_tokenizer', 'codebook_usage', 'decode_from_indices',
    'encode', 'encode_to_indices', 'load_encoder', 'load_tokenizer',
    'reconstruct',
  }  # fmt: skip
  assert all(getattr(vqrae_jax, name).__doc__ for name in names)
  # A submodule of a function's name would replace it.
  assert not names & {path.stem for path in PACKAGE.rglob('*')}


def test_configs_import_ml_collections_and_common_only():
  configs = [*(PACKAGE.parent / 'configs').glob('*.py')]
  # Recipes import the models of others.
  allowed = {'ml_collections', 'importlib'}
  allowed |= {f'configs.{path.stem}' for path in configs}
  for path in configs:
    assert set(imports(path)) <= allowed, path
