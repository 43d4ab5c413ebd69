"""The public door: light to import, pure, and clear when misused."""

import functools
import json
import statistics
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import vqrae_jax
from tests import tiny
from vqrae_jax import sharding

HEAVY = ('orbax', 'grain', 'optax', 'torch', 'transformers', 'tensorflow')

PROBE = """
import json, sys, time
start = time.perf_counter()
import jax, flax.linen
base = time.perf_counter()
import vqrae_jax
{touch}
end = time.perf_counter()
heavy = [m for m in {heavy} if m in sys.modules]
print(json.dumps([end - base, heavy]))
"""


def probe(touch=''):
  code = PROBE.format(heavy=HEAVY, touch=touch)
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  return json.loads(done.stdout)


def test_import_is_light(capsys):
  """Beyond jax and flax.linen: at most 0.3 s (median of 5), nothing heavy.

  The pure door functions count as well: a downstream pipeline touches them.
  """
  touch = 'vqrae_jax.encode_to_indices, vqrae_jax.build_tokenizer'
  runs = [probe(touch) for _ in range(5)]
  seconds = statistics.median(r[0] for r in runs)
  with capsys.disabled():
    print(f'\nimport vqrae_jax: {seconds:.3f} s beyond jax, flax.linen')
  assert all(not heavy for _, heavy in runs), runs[0][1]
  assert seconds <= 0.3


@pytest.mark.parametrize('kind', ('fsq-cosmos', 'simvq-cosine', 'vq-ema'))
def test_jit_vmap_and_symbolic_export(kind):
  tokenizer, variables = tiny.built(tiny.model(kind))
  images = jnp.asarray(tiny.images(6)) / 255.0
  encode = functools.partial(vqrae_jax.encode_to_indices, tokenizer)
  decode = functools.partial(vqrae_jax.decode_from_indices, tokenizer)
  indices = jax.jit(encode)(variables, images)

  stacked = images.reshape(2, 3, *images.shape[1:])
  mapped = jax.jit(jax.vmap(encode, (None, 0)))(variables, stacked)
  np.testing.assert_array_equal(mapped.reshape(indices.shape), indices)

  (b,) = export.symbolic_shape('b')
  shapes = jax.tree.map(
    lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), variables
  )
  for fn, x in ((encode, images), (decode, indices)):
    want = jax.jit(fn)(variables, x)
    symbolic = jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype)
    stored = export.export(jax.jit(fn))(shapes, symbolic).serialize()
    found = export.deserialize(stored).call(variables, x)
    np.testing.assert_allclose(found, want, atol=1e-5)


def test_large_batches_of_tokens_export_in_chunks(monkeypatch):
  """A symbolic count of tokens goes through the padded loop."""
  from vqrae_jax.ops import codes

  monkeypatch.setattr(codes, 'SCORES_PER_CHUNK', 64 * 10)
  tokenizer, variables = tiny.built(tiny.model('vq-ema'))
  images = tiny.images(5)
  encode = functools.partial(vqrae_jax.encode_to_indices, tokenizer)
  (b,) = export.symbolic_shape('b')
  symbolic = jax.ShapeDtypeStruct((b, 16, 16, 3), jnp.uint8)
  stored = export.export(jax.jit(encode))(variables, symbolic)
  chunked = jax.jit(encode)(variables, images)
  monkeypatch.undo()
  whole = vqrae_jax.encode_to_indices(tokenizer, variables, images)
  np.testing.assert_array_equal(stored.call(variables, images), whole)
  np.testing.assert_array_equal(chunked, whole)


def test_each_half_needs_only_its_own_variables():
  tokenizer, variables = tiny.built(tiny.model('vq-ema', projection=True))
  images = tiny.images(2)
  params, codebook = variables['params'], variables['codebook']

  def only(*names):
    return {'params': {n: params[n] for n in names}, 'codebook': codebook}

  indices = vqrae_jax.encode_to_indices(
    tokenizer, only('encoder', 'quantizer'), images
  )
  painted = vqrae_jax.decode_from_indices(
    tokenizer, only('quantizer', 'decoder'), indices
  )
  assert painted.shape == (2, 16, 16, 3)


def test_uint8_is_float_over_255():
  tokenizer, variables = tiny.built(tiny.model())
  images = tiny.images(2)
  encode = jax.jit(functools.partial(vqrae_jax.encode, tokenizer))
  np.testing.assert_allclose(
    encode(variables, images),
    encode(variables, images.astype(np.float32) / np.float32(255)),
    atol=1e-5,
  )


def test_canonical_is_float32_whatever_the_tokenizer_runs_in():
  config = tiny.model('simvq-l2')
  plain, variables = tiny.built(config)
  half = vqrae_jax.build_tokenizer(config | dict(dtype='bfloat16'))
  images = tiny.images(4)
  encode = functools.partial(vqrae_jax.encode_to_indices, precision='canonical')
  np.testing.assert_array_equal(
    encode(half, variables, images), encode(plain, variables, images)
  )
  with pytest.raises(vqrae_jax.UserError, match='did you mean "canonical"'):
    vqrae_jax.encode(plain, variables, images, precision='canonic')


def test_reconstruct_gives_losses_if_asked():
  tokenizer, variables = tiny.built(tiny.model('simvq-l2'))
  images = tiny.images(2)
  assert vqrae_jax.reconstruct(tokenizer, variables, images).losses is None
  out = vqrae_jax.reconstruct(tokenizer, variables, images, losses=True)
  assert set(out.losses) == {'l1', 'l2', 'commit', 'codebook'}
  error = np.asarray(out.images, np.float64) - images / 255.0
  np.testing.assert_allclose(out.losses['l1'], np.abs(error).mean(), rtol=1e-5)
  np.testing.assert_allclose(out.losses['l2'], (error**2).mean(), rtol=1e-5)


def test_inside_a_callers_shard_map():
  """Each device searches alone; no second shard_map is nested."""
  mesh = sharding.make_mesh()
  tokenizer, variables = tiny.built(tiny.model('vq-ema'))
  images = tiny.images(8)
  encode = functools.partial(vqrae_jax.encode_to_indices, tokenizer)
  want = jax.jit(encode)(variables, images)
  spec = jax.sharding.PartitionSpec('data')
  with jax.set_mesh(mesh):
    mapped = jax.shard_map(
      functools.partial(encode, variables), in_specs=spec, out_specs=spec
    )
    found = jax.jit(mapped)(images)
  np.testing.assert_array_equal(found, want)


def test_usage():
  counts = jnp.array([[0, 3, 1, 0], [1, 1, 1, 1]])
  np.testing.assert_array_equal(vqrae_jax.codebook_usage(counts), [0.5, 1.0])


@pytest.mark.parametrize(
  'images, words',
  [
    (np.zeros((2, 18, 16, 3), np.uint8), '18x16 is no multiple of .* patch 4'),
    (np.zeros((2, 16, 16, 3), np.int32), 'uint8 in'),
    (np.zeros((2, 16, 16, 4), np.uint8), 'channels last'),
    (np.zeros((16, 16, 3), np.uint8), 'add a batch axis'),
    (np.zeros((2, 3, 16, 16), np.uint8), 'channels last'),
    (np.zeros((2, 0, 16, 3), np.uint8), 'no multiple'),
    ([[0.0]], 'an array is needed here, not a list'),
  ],
)
def test_bad_images_say_what_is_right(images, words):
  tokenizer, variables = tiny.built(tiny.model())
  with pytest.raises(vqrae_jax.UserError, match=words):
    vqrae_jax.encode_to_indices(tokenizer, variables, images)


def test_bad_indices_say_what_is_right():
  tokenizer, variables = tiny.built(tiny.model())
  for indices, words in (
    (np.zeros((2, 4, 4)), 'integers'),
    (np.zeros((4, 4), np.int32), 'axes'),
    ([1, 2], 'not a list'),
  ):
    with pytest.raises(vqrae_jax.UserError, match=words):
      vqrae_jax.decode_from_indices(tokenizer, variables, indices)
