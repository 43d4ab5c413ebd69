"""A tokenizer on disk: a directory that loads identically on any machine.

  config.json         format version, the full model config, the fingerprint
  model.safetensors   "params/…" and "codebook/…", little-endian, as trained

Blocks are stored stacked, whatever `scan` was. The codebook holds the baked
code table ("codebook/quantizer/codes"), which inference reads and never
computes; SimVQ's basis and map are stored too, for later training. Statistics
of latents are "codebook/latents/mean" and "…/std".

The fingerprint is the SHA-256 of the canonical JSON of the model config and,
for each leaf, sorted by name, its name, shape and values as little-endian f32.
Equal tokenizers have equal fingerprints, whatever their run options;
`load_tokenizer` verifies the fingerprint.
"""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from vqrae_jax.encoders import converted
from vqrae_jax.errors import UserError, read_json
from vqrae_jax.files import Path, is_url, to_path
from vqrae_jax.models.tokenizer import (
  Tokenizer,
  build_tokenizer,
  describe,
  is_training_only,
  variable_shapes,
)
from vqrae_jax.ops import trees
from vqrae_jax.weights.hub import parse_source, snapshot

FORMAT_VERSION = 1
CONFIG, WEIGHTS = 'config.json', 'model.safetensors'


def canonical_json(value: Any) -> str:
  """JSON with sorted keys and no spaces: one text for one value."""
  return json.dumps(
    value, sort_keys=True, separators=(',', ':'), ensure_ascii=True
  )


def fingerprint(
  model: dict,
  leaves: Mapping[str, Any],
  read: Callable[[Any], np.ndarray] = np.asarray,
) -> str:
  """64 hex digits, computed as the module's docstring says.

  Args:
    model: the full model config; {} for a tree of weights alone.
    leaves: {leaf name: array}.
    read: copies one array to the host; called leaf by leaf.
  """
  digest = hashlib.sha256(canonical_json(model).encode())
  for name in sorted(leaves):
    leaf = np.ascontiguousarray(read(leaves[name]).astype('<f4'))
    digest.update(f'\n{name} {list(leaf.shape)}\n'.encode())
    digest.update(leaf.tobytes())
  return digest.hexdigest()


def fingerprint_of(tokenizer: Tokenizer, variables: Any) -> str:
  """The fingerprint of a tokenizer whose code table is baked, as
  `load_tokenizer` returns it."""
  model = json.loads(canonical_json(describe(tokenizer)))
  return fingerprint(model, trees.flatten(variables))


@functools.partial(jax.jit, static_argnums=0)
def _baked(tokenizer, variables):
  return tokenizer.apply(variables, method='baked_codebook')


def bake(tokenizer: Tokenizer, variables: Any) -> dict[str, np.ndarray]:
  """{leaf name: array on the host} of a tokenizer, its code table baked."""
  leaves = trees.flatten(variables)
  # A table that is already baked is computed again, from the weights.
  for name in [n for n in leaves if n.endswith('/basis')]:
    leaves.pop(f'{name.removesuffix("basis")}codes', None)
  tables = _baked(tokenizer, trees.unflatten(leaves))
  for name, table in trees.flatten(tables).items():
    leaves[f'codebook/quantizer/{name}'] = table
  return {
    name: np.asarray(leaf)
    for name, leaf in jax.device_get(leaves).items()
    if not is_training_only(name)
  }


def check_target(path: Path) -> None:
  """Checks that `path` is absent or holds a tokenizer.

  Raises:
    UserError: `path` holds something else, which a tokenizer would overwrite.
  """
  if not (path.exists() or (not is_url(path) and path.is_symlink())):
    return
  names = {p.name for p in path.iterdir()} if path.is_dir() else set()
  foreign = names - {CONFIG, WEIGHTS}
  if foreign or not is_tokenizer(path):
    what = f'it holds {sorted(foreign)[0]}' if foreign else 'no tokenizer'
    raise UserError(
      f'{path} exists and is not replaced: {what}; name another folder'
    )


@contextlib.contextmanager
def written_whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a new folder beside `path` to fill, and then moves it to `path`.

  The previous contents of `path` stay until then, and are kept if filling
  fails.
  """
  # A unique name: two writers never share a folder, and no link is followed.
  path = path.resolve()  # of a link, its target is replaced
  temporary = path.with_name(f'.{uuid.uuid4().hex}.writing')
  temporary.mkdir(parents=True)
  try:
    yield temporary
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise
  old = temporary.with_suffix('.replaced')
  if path.exists():
    path.rename(old)
  temporary.rename(path)
  shutil.rmtree(old, ignore_errors=True)


def save_tokenizer(
  tokenizer: Tokenizer, variables: Any, path: str | os.PathLike
) -> str:
  """Writes the directory `path`, replacing a tokenizer there; atomic.

  Args:
    tokenizer: the module.
    variables: its variables, on any devices.
    path: the directory, or gs://…; written beside itself first, then renamed.

  Returns:
    The fingerprint.
  """
  from safetensors.numpy import save, save_file

  path = to_path(path)
  check_target(path)
  leaves = bake(tokenizer, variables)
  model = json.loads(canonical_json(describe(tokenizer)))
  config = {
    'format_version': FORMAT_VERSION,
    'fingerprint': fingerprint(model, leaves),
    'model': model,
  }
  leaves = {n: np.ascontiguousarray(leaves[n]) for n in sorted(leaves)}
  text = json.dumps(config, indent=2) + '\n'
  if is_url(path):  # without its config it is no tokenizer: that comes last
    path.mkdir(parents=True, exist_ok=True)
    (path / WEIGHTS).write_bytes(save(leaves))
    (path / CONFIG).write_text(text)
    return config['fingerprint']
  with written_whole(path) as folder:
    (folder / CONFIG).write_text(text)
    save_file(leaves, folder / WEIGHTS)
    # The library writes 0600, whatever the umask (safetensors 0.8, 2026-11).
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)
  return config['fingerprint']


def is_tokenizer(path: Path) -> bool:
  """Whether a folder holds a tokenizer, by its config."""
  try:
    config = read_json(path / CONFIG)
  except (OSError, UserError):
    return False
  return (
    (path / WEIGHTS).is_file()
    and {'format_version', 'model'} <= config.keys()
    and converted.KEY not in config
  )


def _read_config(path: Path) -> dict:
  if path.is_file():
    raise UserError(
      f'no tokenizer at {path}: it is a file; convert a checkpoint first: '
      f'python -m vqrae_jax.convert --source=vqrae_torch:{path} --config=… '
      '--out=DIR'
    )
  if not path.is_dir():
    raise UserError(f'no tokenizer at {path}: there is no such folder')
  for name in (CONFIG, WEIGHTS):
    if not (path / name).is_file():
      inside = path / 'tokenizer'
      hint = f'; did you mean "{inside}"?' if inside.is_dir() else ''
      raise UserError(f'{path} is no tokenizer: it has no {name}{hint}')
  config = read_json(path / CONFIG)
  if converted.KEY in config:
    raise UserError(
      f'{path} is an encoder, not a tokenizer; open it with load_encoder, or '
      'start a run from it with init.encoder'
    )
  for key in ('format_version', 'model', 'fingerprint'):
    if key not in config:
      raise UserError(f'{path / CONFIG} is damaged: it has no "{key}"')
  version, model = config['format_version'], config['model']
  config['fingerprint'] = str(config['fingerprint'])
  if version != FORMAT_VERSION:
    raise UserError(
      f'{path} has format version {version}, this package reads '
      f'{FORMAT_VERSION}; install the version that wrote it'
    )
  if not isinstance(model, dict):
    raise UserError(f'{path / CONFIG} is damaged: model is no section')
  return config


def load_tokenizer(
  source: str | os.PathLike,
  *,
  trusted: Collection[str] = (),
  **options: Any,
) -> tuple[Tokenizer, dict]:
  """Loads a tokenizer.

  Args:
    source: the directory, or gs://…, that training or `save_tokenizer` wrote;
      or "hf:ORG/NAME[@REV]", a Hub repository made by `vqrae_jax.push`. Its
      two files are read from the Hub's cache if the Hub cannot be reached or
      `HF_HUB_OFFLINE=1`.
    trusted: packages that may be imported for an encoder or quantizer that is
      a class of another package ("package.module:Class"). Importing code runs
      it.
    **options: run options: dtype, scan, remat.

  Returns:
    (tokenizer, variables); the variables are on the default device, and
    `jax.device_put` places them on any mesh.

  Raises:
    UserError: no tokenizer there, a damaged or foreign file, values that do
      not match the fingerprint, or code of a package that is not trusted.
  """
  if isinstance(source, str) and source.startswith('hf:'):
    parsed = parse_source(source)
    folder, _ = snapshot(parsed.value, parsed.revision, (CONFIG, WEIGHTS))
    try:
      return load_tokenizer(folder, trusted=trusted, **options)
    except UserError as e:
      raise UserError(f'{source}: {e}') from None
  from safetensors import SafetensorError
  from safetensors.numpy import load, load_file

  path = to_path(source)
  config = _read_config(path)
  try:
    file = path / WEIGHTS
    leaves = load(file.read_bytes()) if is_url(path) else load_file(file)
  except (SafetensorError, OSError, ValueError) as e:
    raise UserError(f'{path / WEIGHTS} cannot be read: {e}') from None
  trusted = () if trusted is None else trusted
  tokenizer = build_tokenizer(config['model'] | options, trusted=trusted)
  trees.check_same(variable_shapes(tokenizer), leaves, str(path))
  found = fingerprint(config['model'], leaves)
  if found != config['fingerprint']:
    raise UserError(
      f'{path} is damaged or was edited: its fingerprint is {found[:12]}…, '
      f'{CONFIG} says {config["fingerprint"][:12]}…'
    )
  variables = trees.unflatten(leaves)
  return tokenizer, jax.tree.map(jax.numpy.asarray, variables)
