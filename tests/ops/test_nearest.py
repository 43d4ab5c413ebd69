"""The nearest code, against float64."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from vqrae_jax import sharding
from vqrae_jax.ops import codes, nearest, nearest_kernels
from vqrae_jax.ops.nearest import nearest_code

search = jax.jit(nearest_code, static_argnames=('distance', 'return_margin'))


def squares(z, table):
  """f64[n k]: squared distances."""
  z, table = (np.asarray(x, np.float64) for x in (z, table))
  rows = np.maximum(2**22 // max(table.size, 1), 1)  # at a time
  return np.concatenate(
    [
      ((part[:, None] - table) ** 2).sum(-1)
      for part in np.split(z, range(rows, len(z), rows))
    ]
  )


def excess(z, table, index, best=None):
  """How far beyond the least its squared distance is, of what is allowed."""
  z, table = (np.asarray(x, np.float64) for x in (z, table))
  chosen = table[index]
  found = ((z - chosen) ** 2).sum(-1)
  best = squares(z, table).min(1) if best is None else best
  norms = np.linalg.norm(z, axis=-1) + np.linalg.norm(chosen, axis=-1)
  return ((found - best) / np.maximum(norms**2, 1e-300)).max() * 2**21


def drawn(n, k, c, shift=0.0, seed=0):
  rng = np.random.default_rng(seed)
  return (rng.normal(shift, 1, (m, c)).astype('f4') for m in (n, k))


@pytest.mark.parametrize('n, k, c', ((40, 30, 9), (7, 1, 1), (1, 13, 4)))
def test_it_is_brute_force(n, k, c):
  for shift in (0, 10, -100):
    z, table = drawn(n, k, c, shift)
    index, margin = search(z, table, return_margin=True)
    assert excess(z, table, index) <= 1
    lengths = np.sort(np.sqrt(squares(z, table)), axis=-1)
    want = lengths[:, 1] - lengths[:, 0] if k > 1 else np.full(n, np.inf)
    np.testing.assert_allclose(margin, want, rtol=1e-4, atol=1e-5)


def test_by_angle():
  z, table = drawn(40, 30, 9, 1)
  table *= 10.0 ** np.random.default_rng(0).integers(-20, 18, (30, 1))
  table, z = table.astype('f4'), (z * 1e19).astype('f4')
  index, margin = search(z, table, distance='cosine', return_margin=True)
  units = [
    x / np.linalg.norm(x, axis=-1, keepdims=True)
    for x in (z.astype('f8'), table.astype('f8'))
  ]
  assert excess(*units, index) <= 1
  lengths = np.sort(np.sqrt(squares(*units)), axis=-1)
  np.testing.assert_allclose(margin, lengths[:, 1] - lengths[:, 0], atol=1e-5)
  with pytest.raises(ValueError, match='cosine'):
    search(z, table, distance='dot')


@pytest.mark.parametrize('size', (1e-30, 1e-18, 1e18, 1e36))
def test_squares_need_not_lie_in_f32(size):
  z, table = drawn(40, 30, 9, 3)
  z, table = z * np.float32(size), table * np.float32(size)
  z[:5] *= np.float32(1e-6)
  index, margin = search(z, table, return_margin=True)
  assert excess(z, table, index) <= 1
  assert len(np.unique(index)) > 10
  lengths = np.sort(np.sqrt(squares(z, table)), axis=-1)
  want = (lengths[:, 1] - lengths[:, 0]) / size
  np.testing.assert_allclose(margin / size, want, rtol=1e-3, atol=1e-5)


def test_long_codes_take_no_digits_of_others():
  """Codes that an average has lost lie far away; so would the mean."""
  z, table = drawn(40, 30, 9)
  table[::10] = 1e6
  index = search(z, table)
  assert excess(z, table, index) <= 1 and len(np.unique(index)) > 5


def test_what_is_not_finite_moves_no_other_token():
  z, table = drawn(9, 30, 4)
  want = search(z, table)
  z[3], z[5] = np.nan, np.inf
  index = search(z, table)
  others = [i for i in range(9) if i not in (3, 5)]
  np.testing.assert_array_equal(index[others,], want[others,])
  assert ((index >= 0) & (index < 30)).all()
  z, table = drawn(8, 16, 4)
  want = search(z, np.delete(table, 5, 0))
  want = want + (want >= 5)
  for lost in (np.nan, np.inf, -np.inf):
    table[5, 0] = lost
    for mesh in (None, sharding.make_mesh('fsdp', jax.devices()[:4])):
      with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        np.testing.assert_array_equal(search(z, table), want)


@pytest.mark.parametrize(
  'z, table', [((3, 1), (7, 8)), ((3, 8), (7, 1)), ((3, 8), (0, 8)),
               ((8,), (8,)), ((), (3, 1))],
)  # fmt: skip
def test_widths_that_differ(z, table, monkeypatch):
  monkeypatch.setattr(jaxtyping.config, 'jaxtyping_disable', True)
  with pytest.raises(ValueError, match=r'\[\.\.\. c\] and \[k c\]'):
    search(jnp.zeros(z), jnp.zeros(table))


@pytest.mark.parametrize('size', (2.0**-126, 3e38))
def test_angles_of_the_least_and_largest_tokens(size):
  axes = np.eye(3, dtype='f4') * np.float32(size)
  index = search(axes, axes[::-1], distance='cosine')
  np.testing.assert_array_equal(index, [2, 1, 0])


def test_chunks_do_not_change_the_answer(monkeypatch):
  z, table = drawn(103, 17, 5)
  z, table = map(jnp.asarray, (z, table))
  whole = nearest_code(z, table, return_margin=True)
  monkeypatch.setattr(codes, 'SCORES_PER_CHUNK', 17 * 10)
  for x, y in zip(
    nearest_code(z, table, return_margin=True), whole, strict=True
  ):
    np.testing.assert_array_equal(x, y)


def test_nothing_larger_than_a_chunk_is_made(monkeypatch):
  """No copy of all tokens either."""
  monkeypatch.setattr(codes, 'SCORES_PER_CHUNK', 512 * 64)
  z = jax.ShapeDtypeStruct(((1 << 14) + 1, 64), jnp.float32)
  table = jax.ShapeDtypeStruct((512, 64), jnp.float32)
  compiled = jax.jit(nearest_code).lower(z, table).compile()
  used = compiled.memory_analysis().temp_size_in_bytes
  assert used < (1 << 14) * 64 * 4 / 4, used


def test_equal_rows_give_the_lowest_index():
  z, table = drawn(64, 333, 65)
  table[1:] = table[0]
  assert (search(z, table) == 0).all()
  table = jnp.array([[1.0, 0], [0, 1.0], [1.0, 0]])
  assert int(nearest_code(jnp.array([2.0, 0.0]), table)) == 0


def test_bf16_is_its_values_in_f32():
  z, table = (jnp.asarray(x, jnp.bfloat16) for x in drawn(256, 500, 8))
  want = nearest_code(z.astype(jnp.float32), table.astype(jnp.float32))
  np.testing.assert_array_equal(nearest_code(z, table), want)


@pytest.mark.parametrize(
  'layout, n, k',
  (('dp', 8, 50), ('fsdp', 8, 50), ('fsdp', 8, 48), ('fsdp', 1, 48)),
)
def test_rows_of_a_sharded_codebook_are_not_gathered(layout, n, k):
  """They go round; each device searches for its own tokens."""
  mesh = sharding.make_mesh(layout)
  z = jax.random.normal(jax.random.key(0), (n, 4, 4, 6))
  table = jax.random.normal(jax.random.key(1), (k, 6))
  table = table.at[-1].set(table[0])  # on the last device and the first
  z = z.at[0, 0, 0].set(table[0]).at[-1, -1, -1].set(table[0])
  whole = search(z, table, return_margin=True)
  assert whole[0][0, 0, 0] == whole[0][-1, -1, -1] == 0
  with jax.set_mesh(mesh):
    rows = jax.P('fsdp') if k % 8 == 0 else jax.P()
    batch = sharding.batch_sharding(mesh) if n == 8 else None
    table = jax.device_put(table, jax.NamedSharding(mesh, rows))
    z = z if batch is None else jax.device_put(z, batch)
    found = search(z, table, return_margin=True)
    np.testing.assert_array_equal(found[0], whole[0])
    np.testing.assert_allclose(found[1], whole[1], rtol=1e-4, atol=1e-6)
    run = jax.jit(nearest_code, out_shardings=batch)
    text = run.lower(z, table).compile().as_text()
  assert 'all-gather' not in text or n == 1
  assert f'f32[{k},6]' not in text or k % 8
  assert ('collective-permute' in text) == (layout == 'fsdp' and k % 8 == 0)


GROUPS = dict(
  plain=nearest.grouped,
  tpu=functools.partial(nearest_kernels.tpu_groups, interpret=True),
  gpu=functools.partial(nearest_kernels.gpu_groups, interpret=True),
)


@pytest.mark.parametrize('way', GROUPS)
def test_candidates_in_bf16_are_compared_in_f32(way, monkeypatch):
  """The answer is that of f32, also where bf16 cannot tell codes apart: where
  it lists them, where they are too many, and where two are of one group."""

  def shortlisted(codes, margins):
    return nearest.shortlist(codes, groups=GROUPS[way])

  z, table = drawn(150, 1100, 70, 2)
  z[:60] = table[:60] + 0.1 * (z[:60] - 2)
  table[400:440] = table[9]  # too many, equal
  table[517] = table[516]
  # Pairs that bf16 mixes up: apart, of one group, neighbours.
  for first, step in ((100, 300), (88, 512), (700, 1)):
    rows = first + 2 * np.arange(6)
    table[rows + step] = table[rows] + 1e-3 * (table[rows + 50] - 2)
    z[first // 10 + 60 :][:6] = table[rows + step]
  z[149] = table[516]
  want = search(z, table)
  assert excess(z, table, want) <= 1 and want[149] == 516
  with monkeypatch.context() as patch:
    patch.setitem(nearest.SEARCHES, 'default', shortlisted)
    found = jax.jit(lambda z, table: nearest_code(z, table))(z, table)
  np.testing.assert_array_equal(found, want)


def traced_with(kernel, **how):
  """4096 codes of 768 for 512 tokens, by a kernel."""

  def run(z, rows):
    half_norms = 0.5 * jnp.sum(rows * rows, axis=-1)
    table = nearest.Codes(rows, half_norms, jnp.arange(len(rows)))
    return nearest.shortlist(table, groups=kernel)(z).index

  shapes = (jax.ShapeDtypeStruct((n, 768), jnp.float32) for n in (512, 4096))
  return jax.jit(run, **how).trace(*shapes)


@pytest.mark.parametrize(
  'platform, kernel, device',
  [
    ('tpu', nearest_kernels.tpu_groups, AbstractDevice('TPU v5e', 1, 'tpu')),
    ('cuda', nearest_kernels.gpu_groups,
     AbstractDevice('NVIDIA H100 80GB HBM3', None, 'gpu')),
  ],
)  # fmt: skip
def test_kernels_are_written_for_their_platforms(platform, kernel, device):
  mesh = AbstractMesh((1,), ('x',), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    traced = traced_with(kernel)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
  assert 'custom_call' in text


@pytest.mark.slow
def test_the_kernel_compiles_for_a_tpu(v5e):
  """All scores would be 8 MiB."""
  one = jax.sharding.SingleDeviceSharding(v5e[0])
  how = dict(in_shardings=one, out_shardings=one)
  compiled = traced_with(nearest_kernels.tpu_groups, **how).lower().compile()
  assert 'tpu_custom_call' in compiled.as_text()
  assert compiled.memory_analysis().temp_size_in_bytes < 2**21


@pytest.mark.slow
def test_the_kernel_compiles_for_a_gpu(h100):
  """All scores would be 8 MiB; what bounds the error of a score is measured
  from values that were rounded, which casts alone would not be."""
  one = jax.sharding.SingleDeviceSharding(h100[0])
  how = dict(in_shardings=one, out_shardings=one)
  lowered = traced_with(nearest_kernels.gpu_groups, **how).lower()
  compiled = lowered.compile()
  text = compiled.as_text()
  assert 'gpu_step' in text and text.count('reduce-precision(') >= 2
  assert compiled.memory_analysis().temp_size_in_bytes < 2**23


def cells():
  """name: (n, k, c, kind)."""
  sizes = (
    (1, 1), (3, 2), (64, 16), (1024, 256), (4096, 64), (1024, 1536),
    (16384, 8), (4096, 3200), (262144, 4),
  )  # fmt: skip
  kinds = 'random', 'clustered', 'near ties', 'huge', 'duplicates', 'bf16'
  found = {}
  for k, c in sizes:
    for kind in kinds:
      n = min(30_000, int(2e11 / (k * c) / 12), int(4e9 / k / 12))
      found[f'{kind}, {k} x {c}'] = max(n, 500), k, c, kind
  return found


def nearest_in_f64(z, table, rows=256):
  """f64[n]: the least squared distances, from products in f64, the best few
  of which are computed again from differences."""
  z, table = (np.asarray(x, np.float64) for x in (z, table))
  half, found = 0.5 * (table**2).sum(-1), []
  for part in np.split(z, range(rows, len(z), rows)):
    scores = half - part @ table.T
    few = min(4, len(table))
    at = np.argpartition(scores, few - 1, axis=1)[:, :few]
    found.append(((part[:, None] - table[at]) ** 2).sum(-1).min(1))
  return np.concatenate(found)


@pytest.mark.slow
@pytest.mark.parametrize('cell', cells())
def test_a_million_tokens(cell):
  """Over all cells; none is outside the tolerance."""
  n, k, c, kind = cells()[cell]
  rng = np.random.default_rng(abs(hash((k, c))) % 2**31)
  table = rng.normal(size=(k, c)).astype('f4')
  near = table[rng.integers(0, k, n)]
  z = near + rng.normal(0, 0.3, (n, c)).astype('f4')
  if kind == 'random':
    z = rng.normal(size=(n, c)).astype('f4')
  elif kind == 'clustered':
    shift = rng.normal(0, 10, c).astype('f4')
    table, z = table * 0.1 + shift, z * 0.1 + shift
  elif kind == 'near ties':  # codes in pairs, an ulp from one another
    table[1::2] = np.nextafter(table[: k // 2 * 2 : 2], np.float32(np.inf))
  elif kind == 'huge':
    sizes = 10.0 ** rng.uniform(-7, 7, (k, 1))
    table, z = (table * sizes).astype('f4'), near
    z = z * (10.0 ** rng.uniform(-7, 7, (n, 1))).astype('f4')
  elif kind == 'duplicates':
    table = table[rng.integers(0, max(k // 8, 1), k)]
  elif kind == 'bf16':
    z, table = (jnp.asarray(x, jnp.bfloat16) for x in (z, table))
  index = np.asarray(search(z, table))
  assert excess(z, table, index, nearest_in_f64(z, table)) <= 1
  if kind == 'duplicates':
    first = np.unique(table, axis=0, return_index=True, return_inverse=True)
    np.testing.assert_array_equal(index, first[1][first[2].ravel()][index])
