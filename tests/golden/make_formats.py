"""python -m tests.golden.make_formats, which writes tests/golden/vN/.

A tiny tokenizer, its bundle and dumps of its tokens as this version writes
them, with images, their indices and pixels (expected.npz).
`tests/test_formats.py` opens every vN: what was written once stays readable. A
folder is never renewed: a new format version gets a folder of its own, of the
next N, and this script its number.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

import vqrae_jax
from tests import tiny
from vqrae_jax import export
from vqrae_jax.export import bundle
from vqrae_jax.ops.nearest import nearest_code
from vqrae_jax.tokens import FORMATS, Shard, Writer

N = 0
FOLDER = pathlib.Path(__file__).parent / f'v{N}'
SMALL = dict(width=16, depth=2, mlp_dim=24, num_heads=2)
# Between the best and the second best code, far above what CPUs differ by.
MARGIN = 0.005


def model() -> dict:
  """A config of two blocks a network and a SimVQ of 32 codes."""
  config = tiny.model('simvq-cosine', num_codes=32, code_dim=8)
  for part in ('encoder', 'decoder'):
    config[part]['vit'] = config[part]['vit'] | SMALL
  return config


def write_dumps(tokenizer, variables, indices, folder: pathlib.Path) -> None:
  """In each format: shards of two images and of one. The class of an image is
  its number, and its second view has the codes K - 1 - index."""
  k, size = tokenizer.codebook_size, tokenizer.native_size
  views = np.stack([indices, k - 1 - indices], 1)
  for name, form in FORMATS.items():
    config = dict(
      fingerprint=export.fingerprint_of(tokenizer, variables),
      format=name,
      shard_count=2,
      codebook_size=k,
      index_shape=views.shape[2:],
      image_size=size,
      flip=True,
      offset=int(form.sequences),
      eod=k + 1 if form.sequences else None,
    )
    writer = Writer(folder / name, config)
    for number, images in enumerate(([0, 1], [2])):
      shard = Shard(
        number,
        [f'{i}.png' for i in images],
        images,
        [*range(len(images))],
        [[[0.0, 0.0, *size]]] * len(images),
        images[0],
      )
      writer.write(shard, views[images], f'shard {number}')
    assert writer.finish()


def main() -> None:
  """Writes the folder, which must be new."""
  if FOLDER.exists():
    sys.exit(f'{FOLDER} exists; a format that is written is not renewed')
  images = tiny.images(3)
  for seed in range(100):
    tokenizer, variables = tiny.built(model(), seed)
    (search,) = tokenizer.apply(
      variables, jnp.asarray(images), method='search_codes'
    )
    _, margin = nearest_code(search.tokens, search.table, return_margin=True)
    if float(margin.min()) > MARGIN:
      break
  else:
    sys.exit('no seed has indices that are far from others')
  print(f'seed {seed}, least margin {float(margin.min()):.4f}')
  export.save_tokenizer(tokenizer, variables, FOLDER / 'tokenizer')
  tokenizer, variables = vqrae_jax.load_tokenizer(FOLDER / 'tokenizer')
  size = tokenizer.native_size
  bundle.save_bundle(tokenizer, variables, FOLDER / 'bundle', size=size)
  encode, decode = (
    jax.jit(fn, static_argnums=0)
    for fn in (vqrae_jax.encode_to_indices, vqrae_jax.decode_from_indices)
  )
  indices = encode(tokenizer, variables, images)
  pixels = decode(tokenizer, variables, indices)
  print(f'{len(np.unique(indices))} codes used')
  write_dumps(tokenizer, variables, np.asarray(indices), FOLDER / 'tokens')
  np.savez_compressed(
    FOLDER / 'expected.npz', images=images, indices=indices, pixels=pixels
  )


if __name__ == '__main__':
  main()
