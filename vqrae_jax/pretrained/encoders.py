"""Published encoders: a source word to a spec, its files, and its leaves.

A row of the table and a hub id are fetched or found in the hub's cache; a
folder says by its `config.json` what it holds, so that any size of a known
family opens, and encoders that `convert` stored; a file is weights alone, and
a row's name says which. Files are held to the model whole before a value is
read (`weights/`). Nothing here trains, and no module of another package is
built.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from vqrae_jax import encoders, sharding, weights
from vqrae_jax.encoders import converted, published
from vqrae_jax.errors import UserError, choose, did_you_mean
from vqrae_jax.models.encoder import Encoder
from vqrae_jax.ops import trees
from vqrae_jax.specs import (
  DTYPES,
  RUN_OPTIONS,
  EncoderSpec,
  build_spec,
  merge_sections,
)
from vqrae_jax.weights import hub

CONFIG, PIXELS = hub.CONFIGS
_RESAMPLE = {'2': 'bilinear', '3': 'bicubic'}  # PIL's numbers
_MAX_CONFIG = 1 << 22


@dataclasses.dataclass(frozen=True)
class Found:
  """Where an encoder's files are, and what is known of it.

  Attributes:
    word: the source as it was given.
    path: what `weights.open_weights` opens.
    row: a row of the table, or None.
    told: an `EncoderSpec`'s fields as `config.json` has them, or None.
    revision: the commit of a hub's snapshot, of which a stored encoder was
      made too; else None.
    stored: whether it is in this package's own format.
  """

  word: str
  path: pathlib.Path
  row: str | None = None
  told: dict | None = None
  revision: str | None = None
  stored: bool = False


def find_encoder(word: str, row: str | None = None) -> Found:
  """Reads a source word; fetches if it must; opens no weights.

  Args:
    word: a row's name, "hf:ORG/NAME[@REV]", a folder or a file.
    row: the row that a folder or file is, if its `config.json` does not say.

  Raises:
    UserError: nothing there, or a word of another kind.
  """
  if row is not None:
    choose(encoders.ENCODERS, row, 'encoder')
  source = weights.parse_source(word, encoders.ENCODERS)
  if source.kind in ('row', 'hf'):
    name = source.value
    if source.kind == 'row':
      row, name = name, published.PUBLISHED[name].hub
    path, commit = hub.snapshot(name, source.revision)
    row = row or published.row_of(name)
    return dataclasses.replace(_found(word, path, row), revision=commit)
  if source.kind != 'path':
    raise UserError(
      f'"{word}" is no encoder; write hf:ORG/NAME, a path, or the name of a '
      'row of the table'
    )
  path = pathlib.Path(source.value)
  if not path.exists():
    raise UserError(f'no encoder at {path}: there is no such file or folder')
  return _found(word, path, row)


def _found(word: str, path: pathlib.Path, row: str | None) -> Found:
  """What a file, or a folder's `config.json`, says by itself."""
  if not (path / CONFIG).is_file():
    return Found(word, path, row)
  config = _json(path / CONFIG)
  if 'format_version' not in config:
    return Found(word, path, row, _told(path, config))
  told, revision = converted.fields(config, str(path)), config.get('revision')
  if not isinstance(revision, str | None):
    raise UserError(f'{path / CONFIG} is damaged: revision={revision!r}')
  return Found(word, path, row, told, revision, stored=True)


def _json(path: pathlib.Path) -> dict:
  try:
    if path.stat().st_size > _MAX_CONFIG:
      raise ValueError('too long')
    value = json.loads(path.read_bytes())
  except (OSError, ValueError) as e:
    raise UserError(f'{path} is no JSON ({e}); fetch it again') from None
  if not isinstance(value, dict):
    raise UserError(f'{path} is damaged: it is no section of keys')
  return value


def _told(path: pathlib.Path, config: dict) -> dict:
  """An `EncoderSpec`'s fields as a published folder's files have them."""
  fields = encoders.fields_of(config, str(path / CONFIG))
  if not (path / PIXELS).is_file():
    return fields
  pixels = _json(path / PIXELS)
  norm = dict(fields['pixel_norm'])
  for key, ours in (('image_mean', 'mean'), ('image_std', 'std')):
    if isinstance(pixels.get(key), list):
      norm[ours] = tuple(pixels[key])
  fields['pixel_norm'] = norm
  if 'resample' in pixels:
    what = f'resample of {path / PIXELS}'
    fields['resize'] = choose(_RESAMPLE, str(pixels['resample']), what)
  return fields


def _check_told(found: Found, spec: EncoderSpec, who: str) -> None:
  """`config.json` describes the model that is to be filled."""
  if found.told is None:
    return
  theirs = build_spec(EncoderSpec, found.told, CONFIG)
  # An initial value, of no meaning where weights are loaded.
  left_out = {*RUN_OPTIONS, 'layer_scale'}
  names = [f.name for f in dataclasses.fields(spec.vit)]
  pairs = [
    (f'vit.{n}', getattr(theirs.vit, n), getattr(spec.vit, n))
    for n in names
    if n not in left_out
  ]
  pairs.append(('final_norm', theirs.final_norm, spec.final_norm))
  scaled = [s.vit.layer_scale is not None for s in (theirs, spec)]
  pairs.append(('LayerScale', *scaled))
  other = [f'{n}={a}, not {b}' for n, a, b in pairs if a != b]
  if other:
    raise UserError(
      f'{found.path / CONFIG} is not {who}: it has {"; ".join(other[:6])}'
    )


def spec_of(found: Found, output_norm: str = 'affine') -> EncoderSpec:
  """The spec of what was found: its row's, else as `config.json` says.

  Raises:
    UserError: neither is there, or they disagree.
  """
  if found.row is not None:
    fields = encoders.ENCODERS[found.row]
  elif found.told is not None:
    fields = found.told
  elif found.path.is_dir():
    raise UserError(
      f'{found.path} has no {CONFIG}, so what it holds is unknown; fetch it '
      'beside the weights, or name a row of the table: row=…'
    )
  else:
    raise UserError(
      f'{found.path} is a file, which does not say what it holds; name a row '
      'of the table (row="siglip-base-patch16-224" for instance), or the '
      f'folder that has its {CONFIG}'
    )
  section = merge_sections(fields, {'output_norm': output_norm})
  spec = build_spec(EncoderSpec, section, found.row or CONFIG)
  if found.row is not None:
    _check_told(found, spec, f'the encoder {found.row}')
  return spec


def shapes_of(spec: EncoderSpec) -> Any:
  """The parameters of an encoder as a tree of ShapeDtypeStructs, f32."""
  side = spec.vit.patch_size
  image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  shapes = jax.eval_shape(Encoder(spec).init, jax.random.key(0), image)
  return shapes['params']


def fit_encoder(
  found: Found, spec: EncoderSpec, target: Any = None
) -> weights.Pretrained:
  """The files held to `spec`, whole; no value is read yet.

  `.ignored` says what is left out and why; `.read` and `.load` give leaves.

  Args:
    found: from `find_encoder`.
    spec: the encoder to fill.
    target: its parameters as ShapeDtypeStructs, for another type or placed on
      a mesh; f32 on the host by default.

  Raises:
    UserError: a damaged file, or one that does not fit; both sides shown.
  """
  _check_told(found, spec, 'the model')
  source = weights.open_weights(found.path)
  shapes = {key: handle.shape for key, handle in source.items()}
  if found.stored:
    (naming,) = converted.NAMINGS
  else:
    naming = encoders.naming_of(shapes, source.name)
  return weights.Pretrained(
    source,
    naming.table(spec, shapes),
    shapes_of(spec) if target is None else target,
    hint=f'the file has the names of {naming.name}, the model has '
    f'width {spec.vit.width}, depth {spec.vit.depth}, grid {spec.vit.grid}',
  )


def target_of(spec: EncoderSpec, dtype: str, mesh: Any = None) -> Any:
  """`shapes_of` in another type, placed on a mesh if there is one."""

  def leaf(name, shape):
    place = None
    if mesh is not None:
      rule = sharding.spec_for(f'encoder/{name}', shape.shape, mesh)
      place = jax.sharding.NamedSharding(mesh, rule)
    return jax.ShapeDtypeStruct(shape.shape, jnp.dtype(dtype), sharding=place)

  return trees.map_named(leaf, shapes_of(spec))


def load_encoder(
  source: str,
  output_norm: str = 'affine',
  *,
  row: str | None = None,
  mesh: jax.sharding.Mesh | None = None,
  param_dtype: str = 'float32',
  **options: Any,
) -> tuple[Encoder, dict]:
  """A published encoder with its weights.

  `encoder.apply(variables, images)` takes f32[b h w 3] in [0, 1], or uint8,
  of any size and aspect ratio, and gives latents f[b h//p w//p d]: the last
  hidden state without prefix tokens. What h and w leave modulo the patch p is
  cropped at the bottom and right.

  Args:
    source: a row of the table ("siglip-large-patch16-256"), a hub id
      "hf:ORG/NAME[@REV]", a folder as `save_pretrained` or `convert` writes
      it, or a file of weights (.safetensors, .npz of big_vision, .pt), which
      wants `row`.
    output_norm: "affine", the published final norm; "plain", a LayerNorm
      without parameters in its place; "none", before it.
    row: the row of the table that a folder or a file is.
    mesh: lays each leaf straight onto its shards; the default device if None.
    param_dtype: the type of the parameters, "float32" or "bfloat16".
    **options: how to run it: dtype, scan, remat.

  Returns:
    (encoder, variables).

  Raises:
    UserError: no such source, no way to it, or files that do not fit, are
      damaged or hold NaN; nothing is loaded in part.
  """
  for name in options:
    if name not in RUN_OPTIONS:
      near = did_you_mean(name, (*RUN_OPTIONS, 'row', 'mesh', 'param_dtype'))
      raise UserError(f'unknown option "{name}" of load_encoder{near}')
  if param_dtype not in DTYPES:
    near = did_you_mean(param_dtype, DTYPES)
    raise UserError(f'param_dtype={param_dtype!r}{near}')
  found = find_encoder(source, row)
  spec = spec_of(found, output_norm)
  spec = dataclasses.replace(spec, vit=dataclasses.replace(spec.vit, **options))
  fit = fit_encoder(found, spec, target_of(spec, param_dtype, mesh))
  leaves = fit.load() if mesh is not None else fit.load_on_device()
  return Encoder(spec), {'params': trees.unflatten(leaves)}
