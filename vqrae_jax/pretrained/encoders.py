"""Published encoders: from a source to a spec, its files and its leaves.

Rows of the table and hub ids are downloaded, or found in the hub's cache. A
folder's `config.json` describes its encoder, so any size of a supported family
opens, and so does an encoder that `convert` wrote. A file holds weights only,
so the caller names its row. All keys and shapes are matched with the model
before any value is read (`weights/`). Nothing here trains, and no module of
another package is built.
"""

import dataclasses
import math
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp

from vqrae_jax import encoders, sharding
from vqrae_jax.encoders import converted
from vqrae_jax.errors import UserError, choose, did_you_mean, read_json
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
from vqrae_jax.weights.files import LazyArray, WeightFile, open_weights
from vqrae_jax.weights.load import Pretrained

CONFIG, PIXELS = hub.CONFIGS
_RESAMPLE = {'2': 'bilinear', '3': 'bicubic'}  # PIL's numbers of the filters


@dataclasses.dataclass(frozen=True)
class EncoderSource:
  """Where an encoder's files are, and what describes it.

  Attributes:
    path: what `open_weights` opens.
    row: a row of the table, or None.
    fields: the `EncoderSpec` fields of its `config.json`, or None.
    revision: the commit of the hub's snapshot, or of the one that a converted
      encoder was made from; else None.
    converted: whether `convert` wrote it.
  """

  path: pathlib.Path
  row: str | None = None
  fields: dict | None = None
  revision: str | None = None
  converted: bool = False


def find_encoder(source: str, row: str | None = None) -> EncoderSource:
  """Finds an encoder, downloading it if necessary; opens no weights.

  Args:
    source: a row's name, "hf:ORG/NAME[@REV]", a folder or a file.
    row: the encoder's row, required without a `config.json`; no effect if
      `source` is a row's name.

  Raises:
    UserError: no encoder at the source, an unknown row, a failed download, or a
      `config.json` that is damaged or unsupported.
  """
  if row is not None:
    choose(encoders.ENCODERS, row, 'encoder')
  parsed = hub.parse_source(source, encoders.ENCODERS)
  if parsed.kind == 'row' and row not in (None, source):
    raise UserError(f'"{source}" is a row of the table itself, not "{row}"')
  if parsed.kind in ('row', 'hf'):
    name = parsed.value
    if parsed.kind == 'row':
      row, name = name, encoders.PUBLISHED[name].hub
    path, commit = hub.snapshot(name, parsed.revision)
    found = _describe(path, row or encoders.row_of(name))
    return dataclasses.replace(found, revision=commit)
  if parsed.kind != 'path':
    raise UserError(
      f'"{source}" is not an encoder; write hf:ORG/NAME, a path, or the name '
      'of a row of the table'
    )
  path = pathlib.Path(parsed.value)
  if not path.exists():
    raise UserError(f'no encoder at {path}: there is no such file or folder')
  return _describe(path, row)


def _describe(path: pathlib.Path, row: str | None) -> EncoderSource:
  """A file, or a folder with the fields of its `config.json`."""
  if not (path / CONFIG).is_file():
    return EncoderSource(path, row)
  config = read_json(path / CONFIG)
  if 'format_version' not in config:
    return EncoderSource(path, row, _published_fields(path, config))
  fields, revision = converted.fields(config, str(path)), config.get('revision')
  if not isinstance(revision, str | None):
    raise UserError(f'{path / CONFIG} is damaged: revision={revision!r}')
  return EncoderSource(path, row, fields, revision, converted=True)


def _published_fields(path: pathlib.Path, config: dict) -> dict:
  """An `EncoderSpec`'s fields from the two configs of a published folder."""
  fields = encoders.fields_of(config, str(path / CONFIG))
  if not (path / PIXELS).is_file():
    return fields
  pixels = read_json(path / PIXELS)
  norm = dict(fields['pixel_norm'])
  scale = pixels.get('rescale_factor', 1 / 255)
  odd = not isinstance(scale, float) or not math.isclose(
    scale, 1 / 255, rel_tol=1e-6
  )
  if odd or not pixels.get('do_rescale', True):
    raise UserError(
      f'{path / PIXELS}: do_rescale and rescale_factor must bring 8 bits to '
      '[0, 1], by 1/255'
    )
  for theirs, ours in (('image_mean', 'mean'), ('image_std', 'std')):
    value = pixels.get(theirs)
    if isinstance(value, int | float) and not isinstance(value, bool):
      norm[ours] = (float(value),) * 3
    elif value is not None:
      norm[ours] = tuple(value)
  if not pixels.get('do_normalize', True):
    norm |= dict(mean=(0.0,) * 3, std=(1.0,) * 3)
  fields['pixel_norm'] = norm
  if pixels.get('resample') is not None:
    what = f'resample of {path / PIXELS}'
    fields['resize'] = choose(_RESAMPLE, str(pixels['resample']), what)
  return fields


def _check_fields(found: EncoderSource, spec: EncoderSpec) -> None:
  """Raises a UserError if the `config.json` describes another ViT."""

  def compared(spec: EncoderSpec) -> dict[str, Any]:
    vit = dataclasses.asdict(spec.vit)
    # Only whether there is LayerScale: its initial value has no effect here.
    vit['layer_scale'] = spec.vit.layer_scale is not None
    fields = {f'vit.{k}': v for k, v in vit.items() if k not in RUN_OPTIONS}
    return fields | {'final_norm': spec.final_norm}

  if found.fields is None:
    return
  have, want = build_spec(EncoderSpec, found.fields, CONFIG), compared(spec)
  differ = [
    f'{name}={value}, not {want[name]}'
    for name, value in compared(have).items()
    if value != want[name]
  ]
  if differ:
    raise UserError(
      f'{found.path / CONFIG} is not {found.row or "the model"}: it has '
      f'{"; ".join(differ[:6])}'
    )


def spec_of(found: EncoderSource, output_norm: str = 'affine') -> EncoderSpec:
  """The spec of an encoder: its row's, else that of its `config.json`.

  Raises:
    UserError: it has neither, or `output_norm` is unknown.
  """
  if found.row is not None:
    fields = encoders.ENCODERS[found.row]
  elif found.fields is not None:
    fields = found.fields
  else:
    missing = f'has no {CONFIG}' if found.path.is_dir() else 'is a single file'
    raise UserError(
      f'{found.path} {missing}, so its encoder is unknown; name a row of the '
      'table (row="siglip-base-patch16-224" for instance), or give the folder '
      f'that has both {CONFIG} and the weights'
    )
  section = merge_sections(fields, {'output_norm': output_norm})
  return build_spec(EncoderSpec, section, found.row or CONFIG)


def fit_encoder(
  found: EncoderSource,
  spec: EncoderSpec,
  dtype: str = 'float32',
  mesh: jax.sharding.Mesh | None = None,
) -> Pretrained:
  """Matches the files with all of `spec`'s leaves; reads no value yet.

  `.ignored` lists keys that are not used and why; `.read` and `.load` give
  leaves.

  Args:
    found: from `find_encoder`.
    spec: the encoder to fill.
    dtype: of its leaves.
    mesh: what they are sharded over; None: `load` leaves them on the host.

  Raises:
    UserError: a file that is damaged or does not fit, with both sides of each
      difference.
  """
  _check_fields(found, spec)
  source = open_weights(found.path)
  shapes = {key: array.shape for key, array in source.items()}
  if found.converted:
    (key_format,) = converted.KEY_FORMATS
  else:
    key_format = encoders.key_format(shapes, source.name)

  def leaf(name: str, like: Any) -> jax.ShapeDtypeStruct:
    placed = None
    if mesh is not None:
      axes = sharding.spec_for(f'encoder/{name}', like.shape, mesh)
      placed = jax.sharding.NamedSharding(mesh, axes)
    return jax.ShapeDtypeStruct(like.shape, jnp.dtype(dtype), sharding=placed)

  if spec.layers is not None:
    source = _first_blocks(source, spec.computed.depth, spec.vit.depth)
  side = spec.vit.patch_size
  image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  target = jax.eval_shape(Encoder(spec).init, jax.random.key(0), image)
  return Pretrained(
    source,
    key_format.table(spec, shapes),
    trees.map_named(leaf, target['params']),
    hint=f'the file has the names of {key_format.name}, the model has '
    f'width {spec.vit.width}, depth {spec.vit.depth}, grid {spec.vit.grid}',
  )


def _first_blocks(source: WeightFile, blocks: int, of: int) -> WeightFile:
  """The file with its first `blocks` blocks only, whose keys may be separate or
  stack all `of` blocks."""

  def first(key, array):
    if not ('blocks/' in key or '/encoderblock/' in key):
      return array
    if array.shape[0] != of:
      return array  # does not fit; the match reports it
    read = lambda: array.read()[:blocks]  # noqa: E731
    return LazyArray((blocks, *array.shape[1:]), array.dtype, read)

  numbered = re.compile(r'(?:layers?\.|encoderblock_)(\d+)[./]')
  handles = {
    key: first(key, array)
    for key, array in source.items()
    if not (found := numbered.search(key)) or int(found[1]) < blocks
  }
  return WeightFile(source.name, handles, source.note)


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
  of any size from one patch and any aspect ratio, and returns latents
  f[b h//p w//p d]: the last hidden state without prefix tokens. The remainders
  of h and w modulo the patch p are cropped at the bottom and right.

  Args:
    source: a row of the table ("siglip-large-patch16-256"), a hub id
      "hf:ORG/NAME[@REV]", a folder as `save_pretrained` or `convert` writes
      it, or a file of weights (.safetensors, .npz of big_vision, .pt) with
      `row`.
    output_norm: "affine", the published final norm; "plain", a LayerNorm
      without parameters in its place; "none", no norm.
    row: as in `find_encoder`.
    mesh: each leaf is loaded onto its shards; None: the default device.
    param_dtype: the type of the parameters, "float32" or "bfloat16".
    **options: how to run it, `dtype`, `scan` and `remat` of its `ViTSpec`.

  Returns:
    (encoder, variables).

  Raises:
    UserError: no such source, no connection to it, an unknown row or option,
      or files that do not fit, are damaged or hold NaN.
  """
  for name in options:
    if name not in RUN_OPTIONS:
      near = did_you_mean(name, (*RUN_OPTIONS, 'row', 'mesh', 'param_dtype'))
      raise UserError(f'load_encoder has no option "{name}"{near}')
  choose(dict.fromkeys(DTYPES), param_dtype, 'param_dtype')
  found = find_encoder(source, row)
  spec = spec_of(found, output_norm)
  spec = dataclasses.replace(spec, vit=dataclasses.replace(spec.vit, **options))
  fit = fit_encoder(found, spec, param_dtype, mesh)
  if mesh is not None:
    leaves = fit.load()
  else:  # the default device, uncommitted
    leaves = {name: jnp.asarray(fit.read(name)) for name in fit.target}
  return Encoder(spec), {'params': trees.unflatten(leaves)}
