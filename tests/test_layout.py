"""The house's plan as data: import order, sizes, names, precision."""

import ast
import pathlib
import re
import statistics

import pytest

import vqrae_jax

PACKAGE = pathlib.Path(vqrae_jax.__file__).parent
FILES = sorted(PACKAGE.rglob('*.py'))

# Rank of each room: a room may import rooms of a lower rank, and itself.
RANKS = {
  'errors': 0, 'paths': 0, 'specs': 0, 'types': 0, 'ops': 0,
  'nn': 1, 'weights': 1,
  'quantizers': 2, 'encoders': 2,
  'models': 3, 'losses': 3, 'optim': 3, 'sharding': 3, 'data': 3,
  'export': 4, 'inference': 4, 'pretrained': 4, 'proof': 4,
  'evaluate': 5, 'store_encoder': 5,
  'train': 6,
  'command': 7, 'config_flag': 7, 'convert': 7, 'fetch_weights': 7,
  'latent_stats': 7, 'reconstruct_images': 7,
}  # fmt: skip

# Narrower than their rank: all that these may import from the package.
ONLY = {
  'errors': set(),
  'paths': set(),
  'specs': {'errors'},
  'types': set(),
  'ops': {'ops', 'errors'},
  'weights': {'weights', 'ops', 'paths', 'errors'},
  'encoders': {'encoders', 'weights', 'specs', 'errors'},
  'losses': {'losses', 'nn', 'weights', 'types', 'ops', 'specs', 'errors'},
  'optim': {'ops', 'specs', 'types', 'errors'},
  'sharding': {'ops', 'specs', 'types', 'errors'},
  'data': {'data', 'specs', 'paths', 'errors'},
}

# Packages from outside that a room may import.
OUTSIDE = {
  'ops': {'jax', 'jaxtyping', 'numpy'},
  'data': {'PIL', 'absl', 'array_record', 'grain', 'numpy'},
  'encoders': set(),
  'weights': {'huggingface_hub', 'jax', 'ml_dtypes', 'numpy', 'safetensors'},
}

# `train.__main__` is a command line that lives in its room.
EXTRA = {'train/__main__.py': {'command', 'config_flag'}}


def room(path):
  return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def imports(path):
  """Full names of all that a file imports, wherever in it."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import'
      for alias in node.names:
        yield f'{node.module}.{alias.name}'


@pytest.mark.parametrize(
  'path', FILES, ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_import_order(path):
  me = room(path)
  if me == '__init__':
    return
  extra = EXTRA.get(str(path.relative_to(PACKAGE)), set())
  for name in imports(path):
    top, *rest = name.split('.')
    if top != 'vqrae_jax':
      if me in OUTSIDE and top not in OUTSIDE[me] | STDLIB:
        raise AssertionError(f'{path.name} imports {name}')
      continue
    other = rest[0]
    assert other in RANKS, f'{name}: no rank for the room {other}'
    if other == me or other in extra:
      continue
    assert (
      RANKS[other] < RANKS[me]
      or RANKS[me] == 7
      or (RANKS[me] == RANKS[other] == 0)
    ), f'{path.name} ({me}) imports {name}'
    if me in ONLY:
      assert other in ONLY[me], f'{path.name} ({me}) imports {name}'
  if me in ('quantizers', 'encoders'):
    other = {'quantizers': 'encoders', 'encoders': 'quantizers'}[me]
    assert not any(n.startswith(f'vqrae_jax.{other}') for n in imports(path))


STDLIB = {
  'collections', 'concurrent', 'contextlib', 'copy', 'dataclasses', 'difflib',
  'errno', 'fcntl', 'fnmatch', 'functools', 'glob', 'hashlib', 'heapq',
  'http', 'importlib', 'io', 'json', 'math', 'os', 'pathlib', 'pickletools',
  're', 'struct', 'tempfile', 'threading', 'time', 'typing', 'types',
  'urllib', 'warnings', 'zipfile', 'zlib',
}  # fmt: skip


def test_every_room_has_a_rank():
  assert {room(p) for p in FILES} - {'__init__'} <= set(RANKS)


def test_sizes():
  lines = {p: p.read_text().count('\n') for p in FILES}
  longest = max(lines, key=lines.get)
  assert lines[longest] <= 400, f'{longest} has {lines[longest]} lines'
  assert statistics.median(lines.values()) < 200


def test_no_file_bears_a_door_function_name():
  files = {p.stem for p in FILES} | {p.parent.name for p in FILES}
  assert not files & set(vqrae_jax.__all__)


def test_door_names():
  assert set(vqrae_jax.__all__) == {
    'UserError',
    'build_tokenizer',
    'codebook_usage',
    'decode_from_indices',
    'encode',
    'encode_to_indices',
    'load_encoder',
    'load_tokenizer',
    'reconstruct',
  }
  for name in vqrae_jax.__all__:
    assert getattr(vqrae_jax, name).__doc__


DOTS = re.compile(
  r'\.(?:dot|matmul|einsum|tensordot|vdot|inner|dot_general'
  r'|conv_general_dilated)\('
  r'|nn\.(?:Dense|Conv|DenseGeneral|Einsum)\('
)
PRECISE = ('quantizers', 'losses', 'ops')


@pytest.mark.parametrize(
  'path',
  [p for p in FILES if room(p) in PRECISE],
  ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_every_dot_asks_for_the_highest_precision(path):
  source = path.read_text()
  assert not re.search(
    r'[\w\])] @ [\w(]', re.sub(r'#.*|"""[\s\S]*?"""', '', source)
  )
  for match in DOTS.finditer(source):
    depth, end = 1, match.end()
    while depth:
      depth += {'(': 1, ')': -1}.get(source[end], 0)
      end += 1
    call = source[match.start() : end]
    assert re.search(r'precision=(jax\.lax\.Precision\.)?HIGHEST', call), (
      f'{path.name}: {call}'
    )


def test_words_that_do_not_occur():
  for path in FILES:
    text = path.read_text()
    assert not re.search(r'\bstage', text, re.I), path
    assert 'TYPE_CHECKING' not in text, path
    assert path.name != 'utils.py'


def test_flags_are_defined_inside_main():
  """A module-level flag would belong to every process that imports it."""
  for path in FILES:
    for node in ast.parse(path.read_text()).body:
      if isinstance(node, ast.Expr | ast.Assign):
        assert 'DEFINE_' not in ast.unparse(node), path


def test_configs_import_ml_collections_and_common_only():
  recipes = [p.stem for p in (PACKAGE.parent / 'configs').glob('*.py')]
  for path in (PACKAGE.parent / 'configs').glob('*.py'):
    allowed = {'ml_collections', 'configs.common'}
    if path.stem == 'finetune_decoder':  # of any recipe's model
      allowed |= {f'configs.{name}' for name in recipes}
    assert set(imports(path)) <= allowed, path
    first = ast.get_docstring(ast.parse(path.read_text())).split('\n')[0]
    if path.stem not in ('common', '__init__'):
      want = f'python -m vqrae_jax.train --config=configs/{path.name}'
      assert first.startswith(want), path
