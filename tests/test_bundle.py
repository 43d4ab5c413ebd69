"""Bundles: programs that give the same without this package."""

import functools
import json
import pathlib
import subprocess
import sys

import jax
import jax.export
import numpy as np
import pytest

import vqrae_jax
from tests import tiny
from vqrae_jax import export
from vqrae_jax.errors import UserError
from vqrae_jax.export import __main__ as command
from vqrae_jax.export import bundle

# What a user of a bundle runs: by its own loader, without this package.
FRESH = """
import importlib.util, pathlib, sys
sys.modules['vqrae_jax'] = None
import numpy as np
for folder in map(pathlib.Path, sys.argv[1:]):
  spec = importlib.util.spec_from_file_location('load', folder / 'load.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  encode, decode = module.load()
  with np.load(folder.with_suffix('.npz')) as asked:
    indices = {n: np.asarray(encode(x)) for n, x in asked.items()}
  found = {f'images{n}': np.asarray(decode(x)) for n, x in indices.items()}
  np.savez(folder.with_suffix('.found.npz'), **indices, **found)
others = {name.partition('.')[0] for name in sys.modules if sys.modules[name]}
assert not others & {'vqrae_jax', 'flax', 'safetensors', 'optax'}, others
"""
as_users = functools.partial(jax.jit, compiler_options=tiny.AS_USERS)


def tokenizer(kind, folder, **vit):
  """The directory of a tiny tokenizer; `vit` are fields of both its ViTs."""
  config = tiny.model(kind, depth=1)
  for part in ('encoder', 'decoder'):
    config[part]['vit'] = config[part]['vit'] | vit
  export.save_tokenizer(*tiny.built(config), folder / kind)
  return folder / kind


def exported(tokenizer, *flags):
  """Its bundle, by the command."""
  out = tokenizer.with_suffix('.bundle')
  command.main([f'--tokenizer={tokenizer}', f'--out={out}', *flags])
  return out


def run_fresh(*bundles):
  """Answers of (bundle, [images]) by an interpreter of its own, which compiles
  as users do: for each {"0": indices, "images0": pixels, …}."""
  ours = {'XLA_FLAGS', 'PYTHONPATH'}
  env = {k: v for k, v in tiny.alone(1).items() if k not in ours}
  for folder, images in bundles:
    np.savez(folder.with_suffix('.npz'), **{str(i): x for i, x in images})
  folders = [str(folder) for folder, _ in bundles]
  subprocess.run(
    [sys.executable, '-I', '-c', FRESH, *folders],
    check=True, cwd=pathlib.Path(folders[0]).parent, env=env,
  )  # fmt: skip
  for folder, _ in bundles:
    with np.load(folder.with_suffix('.found.npz')) as found:
      yield dict(found)


def check_equal(path, images, found, atol=0, **options):
  """Indices are equal, and pixels to `atol`, to those of the public API."""
  tokenizer, variables = vqrae_jax.load_tokenizer(path)
  encode, decode = (
    as_users(functools.partial(fn, tokenizer, **options))
    for fn in (vqrae_jax.encode_to_indices, vqrae_jax.decode_from_indices)
  )
  for name, x in images:
    indices = encode(variables, x)
    np.testing.assert_array_equal(found[str(name)], indices)
    want, have = decode(variables, indices), found[f'images{name}']
    if atol:
      np.testing.assert_allclose(have, want, atol=atol)
    else:
      np.testing.assert_array_equal(have, np.asarray(want))


def test_indices_are_identical_in_a_fresh_interpreter(tmp_path):
  """Pixels too, but where positions are computed in f32 for any size."""
  fixed = tokenizer('simvq-cosine', tmp_path)
  free = tokenizer('fsq-cosmos', tmp_path, posemb='sincos2d')
  batches = [(b, tiny.images(b)) for b in (1, 3)]
  sizes = [(3, tiny.images(3)), (1, tiny.images(1, 8, 20))]
  one, other = run_fresh(
    (exported(fixed), batches),
    (exported(free, '--size=any', '--precision=canonical'), sizes),
  )
  check_equal(fixed, batches, one)
  check_equal(free, sizes, other, atol=1e-5, precision='canonical')


@pytest.mark.slow
def test_every_quantizer(tmp_path):
  made = [tokenizer(kind, tmp_path) for kind in tiny.FORMS]
  asked = [(b, tiny.images(b)) for b in (1, 3, 16)]
  answers = run_fresh(*((exported(path), asked) for path in made))
  for path, found in zip(made, answers, strict=True):
    check_equal(path, asked, found)


def test_half_precision_and_the_card(tmp_path, capsys):
  """The card says what is in the folder; a bundle that was copied badly is
  refused."""
  path = tokenizer('residual-vq', tmp_path)
  out = exported(path, '--dtype=bfloat16', '--platforms=cpu', '--size=8x12')
  card = json.loads((out / bundle.CARD).read_text())
  config = json.loads((path / export.CONFIG).read_text())
  assert card['fingerprint'] == config['fingerprint']
  assert card['fingerprint'] in capsys.readouterr().out
  assert card['model'] == config['model'] and card['codebook_size'] == 64
  assert card['images'] == dict(
    dtype='uint8', shape=['b', 8, 12, 3], range=[0, 255]
  )
  assert card['indices'] == dict(
    dtype='int32', shape=['b', 2, 3, 2], range=[-1, 63]
  )
  assert card['decoded']['range'] == [0, 1] and card['platforms'] == ['cpu']
  assert card['files'].keys() | {bundle.CARD} == {p.name for p in out.iterdir()}
  encode, decode, opened = bundle.load_bundle(out)
  assert opened == card
  images = tiny.images(2, 8, 12)
  half = vqrae_jax.load_tokenizer(path, dtype='bfloat16')
  indices = encode(images)
  want = jax.jit(functools.partial(vqrae_jax.encode_to_indices, half[0]))
  np.testing.assert_array_equal(indices, want(half[1], images))
  assert decode(indices).shape == (2, 8, 12, 3)
  data = bytearray((out / 'decode.jax').read_bytes())
  data[-9] ^= 1
  (out / 'decode.jax').write_bytes(data)
  with pytest.raises(UserError, match=r'decode\.jax'):
    bundle.load_bundle(out)
  with pytest.raises(UserError, match='gs://b/x is a URL'):
    bundle.save_bundle(*half, 'gs://b/x')
  (out / bundle.CARD).write_text(json.dumps(card | dict(files={})))
  with pytest.raises(UserError, match='"files" must have .*load.py'):
    bundle.load_bundle(out)
  (out / bundle.CARD).write_text(json.dumps(card | dict(format_version=9)))
  with pytest.raises(UserError, match='version 9'):
    bundle.load_bundle(out)
  with pytest.raises(UserError, match=bundle.CARD):
    bundle.load_bundle(path)
