"""A bundle: a tokenizer as two programs, for machines without this package.

  encode.jax      uint8[b h w 3] -> i32[b *index_shape]
  decode.jax      i32[b *index_shape] -> f32[b h w 3] in [0, 1]
  variables.npz   {leaf name: f32}, the first argument of both programs
  bundle.json     the version card: shapes, ranges, versions, SHA-256
  load.py         opens the folder, in ten lines

Programs are StableHLO, serialised by `jax.export`. The variables are an
argument: inside the programs they would be stored twice and could not be
sharded. They are in numpy's format, which a loader without this package reads
in one line; zip checksums protect the file, and it contains no pickle.

The batch size is any number from 1. Height and width are the tokenizer's own,
or any multiples of its patch if no resampling weights depend on them.

Programs are traced as for a CPU, since the fused attention of the device that
makes a bundle would be a kernel for that device only. JAX opens programs of
its releases of the last six months, later ones as it can; tokenizers on disk
have no such limit, and a new bundle can be made from them.
"""

import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import jaxlib
import numpy as np

from vqrae_jax import __version__, inference
from vqrae_jax.errors import UserError, read_json
from vqrae_jax.export import canonical_json, fingerprint, load, written_whole
from vqrae_jax.files import digest, is_url
from vqrae_jax.models.tokenizer import Tokenizer, describe
from vqrae_jax.ops import trees
from vqrae_jax.specs import EncoderSpec

FORMAT_VERSION = 1
CARD, LOADER, VARIABLES = 'bundle.json', 'load.py', 'variables.npz'
FILES = {'encode.jax', 'decode.jax', LOADER, VARIABLES}
PLATFORMS = ('cpu', 'tpu', 'cuda', 'rocm')


def check_any_size(tokenizer: Tokenizer) -> None:
  """Checks that one program can take images of any size.

  Raises:
    UserError: names what has a fixed size, or is resampled with weights that
      the host computes for one size.
  """
  encoder = tokenizer.encoder_spec
  fault = ''
  if not isinstance(encoder, EncoderSpec):
    fault = f'{type(encoder).__name__} is of another package'
  elif encoder.patch_size != tokenizer.patch_size:
    fault = (
      f'the encoder, of patch {encoder.patch_size}, sees images resized from '
      f'patch {tokenizer.patch_size}'
    )
  elif tokenizer.latents_spec.grid:
    fault = 'statistics of latents are by position'
  elif tokenizer.quantizer.index_axes[:2] != ('gh', 'gw'):
    fault = 'the quantizer has one grid'
  specs = encoder, tokenizer.decoder_spec, tokenizer.features_spec
  for spec in () if fault else filter(None, specs):
    if spec.vit.posemb == 'learned':
      fault = 'learned positions are resampled for each size'
  if fault:
    raise UserError(f'--size=any: {fault}; give a size, or leave it out')


def save_bundle(
  tokenizer: Tokenizer,
  variables: Mapping[str, Any],
  path: str | os.PathLike,
  *,
  size: tuple[int, int] | None = None,
  precision: str = 'default',
  platforms: Sequence[str] = PLATFORMS[:3],
) -> dict[str, Any]:
  """Writes the folder `path`, which must be new; atomic.

  Args:
    tokenizer: with the dtype that the programs are to compute in.
    variables: as `load_tokenizer` gives them, code tables baked.
    path: a local folder.
    size: (h, w) of images; None: any multiples of the patch.
    precision: that of `encode_to_indices`.
    platforms: of `PLATFORMS`; the programs run there, and nowhere else.

  Returns:
    The version card.

  Raises:
    UserError: a continuous tokenizer, a size that it does not take, or an
      unknown platform.
  """
  if is_url(path):
    raise UserError(f'{path} is a URL; a bundle is written to a local folder')
  path = pathlib.Path(os.path.expanduser(path))
  if not tokenizer.codebook_size:
    raise UserError(
      'the tokenizer is continuous (model.quantizer.name="none"): a bundle '
      'needs indices'
    )
  if not platforms or not {*platforms} <= {*PLATFORMS}:
    raise UserError(
      f'platforms={",".join(platforms)} must be of {", ".join(PLATFORMS)}'
    )
  if size is None:
    check_any_size(tokenizer)
    b, gh, gw = jax.export.symbolic_shape('b, gh, gw')
    size = gh * tokenizer.patch_size, gw * tokenizer.patch_size
  else:
    tokenizer.index_shape(*size)  # or it is refused
    (b,) = jax.export.symbolic_shape('b')
  leaves = {
    name: np.asarray(leaf, '<f4')
    for name, leaf in trees.flatten(variables).items()
  }

  def exported(function: Callable, x: jax.ShapeDtypeStruct):
    def program(leaves, x):
      variables = trees.unflatten(leaves)
      return function(tokenizer, variables, x, precision=precision)

    shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), leaves
    )
    make = jax.export.export(jax.jit(program), platforms=tuple(platforms))
    return make(shapes, x)

  images = jax.ShapeDtypeStruct((b, *size, 3), jnp.uint8)
  encode = exported(inference.encode_to_indices, images)
  (indices,) = encode.out_avals
  decode = exported(
    inference.decode_from_indices,
    jax.ShapeDtypeStruct(indices.shape, indices.dtype),
  )
  (decoded,) = decode.out_avals

  def described(x, low, high):
    # A symbolic dimension as written, "b" or "16*gh".
    shape = [n if isinstance(n, int) else str(n) for n in x.shape]
    return dict(dtype=str(x.dtype), shape=shape, range=[low, high])

  model = json.loads(canonical_json(describe(tokenizer)))
  least, most = tokenizer.quantizer.lowest_index, tokenizer.codebook_size - 1
  card = dict(
    format_version=FORMAT_VERSION,
    fingerprint=fingerprint(model, leaves),
    codebook_size=tokenizer.codebook_size,
    patch_size=tokenizer.patch_size,
    images=described(images, 0, 255),
    indices=described(indices, least, most),
    decoded=described(decoded, 0.0, 1.0),
    dtype=tokenizer.decoder_spec.vit.dtype,
    precision=precision,
    platforms=list(platforms),
    calling_convention_version=encode.calling_convention_version,
    versions=dict(
      jax=jax.__version__, jaxlib=jaxlib.__version__, vqrae_jax=__version__
    ),
    model=model,
  )
  with written_whole(path) as folder:
    for name, program in (('encode', encode), ('decode', decode)):
      (folder / f'{name}.jax').write_bytes(program.serialize())
    np.savez(folder / VARIABLES, **leaves)
    shutil.copyfile(load.__file__, folder / LOADER)
    card['files'] = {p.name: digest(p) for p in sorted(folder.iterdir())}
    (folder / CARD).write_text(json.dumps(card, indent=2) + '\n')
  return card


def load_bundle(
  path: str | os.PathLike,
) -> tuple[Callable[[Any], jax.Array], Callable[[Any], jax.Array], dict]:
  """Opens a bundle and verifies the hashes of its files.

  The bundle's own `load.py` opens it without this package.

  Args:
    path: the folder.

  Returns:
    (encode, decode, the version card). encode maps uint8[b h w 3] to i32
    indices, decode indices to f32[b h w 3] in [0, 1].

  Raises:
    UserError: no bundle there, another format version, or a damaged file.
  """
  path = pathlib.Path(os.path.expanduser(path))
  if not (path / CARD).is_file():
    raise UserError(f'no bundle at {path}: it has no {CARD}')
  card = read_json(path / CARD)
  if card.get('format_version') != FORMAT_VERSION:
    raise UserError(
      f'{path} has format version {card.get("format_version")}, this package '
      f'reads {FORMAT_VERSION}; install the version that wrote it'
    )
  files = card.get('files')
  if not isinstance(files, dict) or set(files) != FILES:
    raise UserError(
      f'{path / CARD} is damaged: "files" must have the SHA-256 of '
      f'{", ".join(sorted(FILES))}'
    )
  for name, want in files.items():
    file = path / name
    if not file.is_file() or digest(file) != want:
      raise UserError(
        f'{file} is damaged or missing: its SHA-256 is not that of {CARD}; '
        'copy or export the bundle again'
      )
  return *load.load(path), card
