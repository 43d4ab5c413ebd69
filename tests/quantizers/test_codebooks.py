"""Codebooks in training: EMA usage, updates, initialization from data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import codebooks
from vqrae_jax import quantizers
from vqrae_jax.ops import codes as code_ops

K, D, TOKENS = 1024, 96, 1568


def made(width, name='vq', **fields):
  return quantizers.build(dict(name=name, **fields), width, 'float32')


def clustered():
  """Batches of LayerNorm'd tokens around 500 centres in 24 dimensions."""
  rng = np.random.default_rng(0)
  mean = rng.normal(size=D)
  basis = rng.normal(size=(24, D))
  centers = rng.normal(size=(500, 24))

  def batch():
    c = 0.4 * centers[rng.integers(500, size=TOKENS)]
    c = c + 0.15 * rng.normal(size=c.shape)
    z = mean + c @ basis + 0.2 * rng.normal(size=(TOKENS, D))
    z = (z - z.mean(-1, keepdims=True)) / z.std(-1, keepdims=True)
    return jnp.asarray(z, jnp.float32)

  return batch


def usage(quantizer, variables, batch):
  """The share of codes used over ten batches."""
  count = jax.jit(lambda z: quantizer.apply(variables, z).stats['counts'])
  return float(code_ops.usage(sum(count(batch()) for _ in range(10)))[0])


def usage_after_training(data_init, steps):
  """The same after so many EMA steps."""
  quantizer, batch = made(D, num_codes=K, data_init=data_init), clustered()
  z = batch()
  codebook = quantizer.init(jax.random.key(0), z[:8])['codebook']
  if data_init:
    codebook = quantizer.init_codebook(codebook, z, jax.random.key(1))
  else:  # as usual: random codes, counts of zero
    codebook = codebook | {'counts': jnp.zeros(K)}

  @jax.jit
  def step(codebook, z):
    out = quantizer.apply({'codebook': codebook}, z, train=True)
    return quantizer.update_codebook(codebook, out.stats)

  for _ in range(steps):
    codebook = step(codebook, batch())
  return usage(quantizer, {'codebook': codebook}, batch)


@pytest.mark.slow
def test_ema_codebook_stays_in_use():
  """Clustered tokens: at least 60 % of the codes after 60 steps; the usual
  initialization loses them at once."""
  assert usage_after_training(True, 60) >= 0.60
  assert usage_after_training(False, 10) < 0.05


def test_ema_update_is_the_formula():
  quantizer = made(3, num_codes=5, decay=0.9, epsilon=1e-3)
  rng = np.random.default_rng(0)
  n, w = rng.random(5) * 4, rng.normal(size=(5, 3))
  count, total = np.array([3, 0, 1, 8, 0]), rng.normal(size=(5, 3))
  old = dict(codes=jnp.array(w), counts=jnp.array(n), sums=jnp.array(w))
  stats = dict(counts=jnp.array(count)[None], sums=jnp.array(total)[None])
  new = quantizer.update_codebook(old, stats)
  n2, w2 = 0.9 * n + 0.1 * count, 0.9 * w + 0.1 * total
  smooth = (n2 + 1e-3) / (n2.sum() + 5e-3) * n2.sum()
  np.testing.assert_allclose(new['counts'], n2, rtol=1e-5)
  np.testing.assert_allclose(new['sums'], w2, rtol=1e-5)
  won, idle = count > 0, count == 0
  want = w2[won] / smooth[won, None]
  np.testing.assert_allclose(new['codes'][won], want, rtol=1e-5)
  np.testing.assert_array_equal(new['codes'][idle], old['codes'][idle])


def test_idle_codes_stay_where_they_are():
  """Not at the origin, beside each other, after thousands of steps."""
  quantizer = made(2, num_codes=3)
  codes = jnp.array([[1.0, 0], [5.0, 5.0], [-5.0, 5.0]])
  codebook = dict(codes=codes, counts=jnp.ones(3), sums=codes)
  stats = dict(
    counts=jnp.array([[9, 0, 0]]), sums=jnp.array([[[9.0, 0]] + [[0.0, 0]] * 2])
  )
  step = jax.jit(quantizer.update_codebook)
  for _ in range(4000):
    codebook = step(codebook, stats)
  np.testing.assert_array_equal(codebook['codes'][1:], codes[1:])
  # One that wins again moves to its tokens.
  back = dict(counts=jnp.array([[9, 1, 0]]), sums=jnp.full((1, 3, 2), 2.0))
  moved = step(codebook, back)['codes'][1]
  np.testing.assert_allclose(moved, 2.0, rtol=2e-2)


def test_stats_are_sums_over_tokens():
  quantizer = made(4, num_codes=7, affine=True)
  z = jax.random.normal(jax.random.key(0), (3, 5, 4))
  variables = jax.jit(quantizer.init)(jax.random.key(1), z)
  run = jax.jit(lambda z: quantizer.apply(variables, z, train=True).stats)
  stats, *halves = map(run, (z, z[:1], z[1:]))
  assert stats['counts'].sum() == 15
  for name in ('counts', 'sums', 'moments'):
    np.testing.assert_allclose(
      stats[name], halves[0][name] + halves[1][name], atol=1e-5
    )


@pytest.mark.parametrize('tokens', (40, 200))
def test_data_init_gives_distinct_codes_at_real_tokens(tokens):
  quantizer = made(8, num_codes=100)
  z = jax.random.normal(jax.random.key(0), (tokens, 8)) + 3
  start = jax.jit(quantizer.init_codebook)({}, z, jax.random.key(1))
  codes = np.asarray(start['codes'])
  assert len(np.unique(codes, axis=0)) == 100
  distance = np.linalg.norm(codes[:, None] - np.asarray(z)[None], axis=-1)
  assert (distance.min(1) < 0.1).all()
  counts = np.asarray(start['counts'])[:, None]
  np.testing.assert_allclose(start['sums'], counts * codes, rtol=1e-6)


def simvq_usage(basis_init):
  """[usage at the start, and after 40 steps of Adam on the codebook's loss]."""
  quantizer = made(
    D, 'simvq', num_codes=512, code_dim=64, basis_init=basis_init
  )
  batch = clustered()
  variables = jax.jit(quantizer.init)(jax.random.key(0), batch()[:8])
  z = quantizer.apply(variables, batch(), method='to_code_space')
  codebook = quantizer.init_codebook(
    variables['codebook'], z, jax.random.key(1)
  )
  optimizer = optax.adam(1e-3)

  def loss(params, z):
    variables = {'params': params, 'codebook': codebook}
    return quantizer.apply(variables, z, train=True).losses['codebook']

  @jax.jit
  def step(params, moments, z):
    updates, moments = optimizer.update(jax.grad(loss)(params, z), moments)
    return optax.apply_updates(params, updates), moments

  params, found = variables['params'], []
  moments = optimizer.init(params)
  for steps in (0, 40):
    for _ in range(steps):
      params, moments = step(params, moments, batch())
    trained = {'params': params, 'codebook': codebook}
    found.append(usage(quantizer, trained, batch))
  return found


@pytest.mark.slow
def test_simvq_codebook_stays_in_use():
  """All codes at once follow the tokens they started at. (The commitment is
  left out: alone, it would draw all tokens to one point.)"""
  assert min(simvq_usage('tokens')) >= 0.90
  assert simvq_usage('normal')[1] < 0.2


@pytest.mark.parametrize('distance', ('l2', 'cosine'))
@pytest.mark.parametrize('mapped', (False, True))
def test_simvq_starts_at_tokens(distance, mapped):
  """Each token, as it is compared, is its own code, whatever its size."""
  fields = dict(num_codes=6, code_dim=4, distance=distance, token_map=mapped)
  quantizer = made(4, 'simvq', **fields)
  z = jax.random.normal(jax.random.key(0), (6, 4)) * 3
  variables = quantizer.init(jax.random.key(2), z)
  tokens = quantizer.apply(variables, z, method='to_code_space')
  codebook = quantizer.init_codebook({}, tokens, jax.random.key(1))
  out = quantizer.apply(variables | {'codebook': codebook}, z, train=True)
  assert len(np.unique(out.indices)) == 6
  assert float(out.losses['commit']) < 1e-12
  np.testing.assert_allclose((codebook['basis'] ** 2).mean(-1), 1, rtol=1e-5)


def test_gradient_table_and_a_random_basis_leave_the_collection_alone():
  for name, fields in (
    ('vq', dict(update='gradient')),
    ('simvq', dict(basis_init='normal')),
  ):
    quantizer = made(4, name, num_codes=7, code_dim=4, **fields)
    codebook = {'basis': jnp.ones(3)}
    assert quantizer.update_codebook(codebook, {}) is codebook
    z, rng = jnp.zeros((5, 4)), jax.random.key(0)
    assert quantizer.init_codebook(codebook, z, rng) is codebook


def test_simvq_reads_the_baked_table_and_never_multiplies():
  quantizer = made(8, 'simvq', num_codes=32, code_dim=16)
  z = jax.random.normal(jax.random.key(0), (9, 8))
  variables = quantizer.init(jax.random.key(1), z)
  baked = quantizer.apply(variables, method='baked_codebook')
  inference = variables | {'codebook': dict(baked)}  # no basis here
  np.testing.assert_array_equal(
    quantizer.apply(variables, z).indices, quantizer.apply(inference, z).indices
  )


def test_affine_codes_are_baked():
  """What inference reads is what training computes, bit for bit."""
  quantizer = made(8, num_codes=32, update='gradient', affine=True)
  z = 3 * jax.random.normal(jax.random.key(0), (99, 8)) + 1
  variables = quantizer.init(jax.random.key(1), z)
  codebook = quantizer.init_codebook({}, z, jax.random.key(2))
  np.testing.assert_allclose(codebook['token_mean'], z.mean(0), rtol=1e-6)
  np.testing.assert_allclose(codebook['token_var'], z.var(0), rtol=1e-6)
  variables = variables | {'codebook': codebook}
  baked = jax.jit(lambda v: quantizer.apply(v, method='baked_codebook'))(
    variables
  )
  inference = variables | {'codebook': codebook | baked}
  run = jax.jit(quantizer.apply)
  live, read = (run(v, z) for v in (variables, inference))
  np.testing.assert_array_equal(read.indices, live.indices)
  np.testing.assert_array_equal(read.codes, live.codes)
  assert len(np.unique(live.indices)) > 8
  assert quantizer.training_codebook(inference['codebook']).keys() == (
    codebook.keys()
  )


def test_idle_codes_become_tokens_of_the_batch():
  """As many as there are tokens, in order; no other code is touched."""
  quantizer = made(4, num_codes=32)
  rng = np.random.default_rng(0)
  codes, tokens = (rng.normal(size=(n, 4)).astype('f4') for n in (32, 8))
  counts = np.where(np.arange(32) % 2, 1e-3, 5.0).astype('f4')
  codebook = dict(codes=codes, counts=counts, sums=codes * counts[:, None])
  stats = dict(
    counts=jnp.asarray(4 * (counts > 1), jnp.int32)[None],
    sums=4.0 * jnp.asarray(codes)[None] * (counts > 1)[:, None],
  )
  given = stats | dict(tokens=tokens[:, None])
  found = quantizer.update_codebook(codebook, given)
  want = quantizer.update_codebook(codebook, stats)
  idle = np.arange(1, 17, 2)
  np.testing.assert_array_equal(found['codes'][idle], tokens)
  # A tenth of the mean, two tokens a code, and one token's part.
  np.testing.assert_allclose(found['counts'][idle], 0.21, rtol=1e-5)
  for name in want:
    kept = (np.delete(x[name], idle, 0) for x in (found, want))
    np.testing.assert_array_equal(*kept)


@pytest.mark.parametrize('tokens', (32, 64))  # a step's, before
def test_a_loaded_codebook_stays(tokens):
  """However many tokens a step has here, no code that wins some is replaced,
  and none moves by more than 1 - decay says."""
  quantizer = made(4, num_codes=32)
  rng = np.random.default_rng(0)
  codes = rng.normal(size=(32, 4)).astype('f4')
  loaded = quantizer.training_codebook({'codes': codes})
  for name in ('counts', 'sums'):
    loaded[name] = tokens / 32 * loaded[name]
  codebook = quantizer.rescale_average(loaded, 4096)
  noise = 0.01 * rng.normal(size=(4096, 4))
  z = jnp.asarray(codes[rng.integers(32, size=4096)] + noise, jnp.float32)
  random = {'samples': jax.random.split(jax.random.key(1), 64)}
  out = quantizer.apply(
    {'codebook': codebook}, z.reshape(64, 64, 4), train=True, random=random
  )
  given = out.stats | {'tokens': out.tokens}
  moved = quantizer.update_codebook(codebook, given)['codes'] - codes
  assert np.abs(moved).max() < 1e-3


def test_a_new_code_is_idle_unless_it_soon_wins_a_token():
  """At a tenth of the mean, .2 tokens a step, one is won within 5 steps."""
  quantizer = made(4, num_codes=32)
  z, tokens = (jax.random.normal(jax.random.key(i), (64, 4)) for i in (0, 1))
  codebook = quantizer.init_codebook({}, z, jax.random.key(2))
  first, update = codebook['codes'], jax.jit(quantizer.update_codebook)
  for step in range(1, 6):
    # Code 0 wins all tokens but one of code 1, once, where that lies.
    one = jnp.zeros(32, jnp.int32).at[1].set(int(step == 4))
    counts = one.at[0].set(64 - one[1])
    stats = dict(counts=counts[None], sums=(counts[:, None] * first)[None])
    codebook = update(codebook, stats | dict(tokens=tokens[:, None]))
    moved = np.abs(codebook['codes'] - first).max(1) > 1e-3
    assert not moved[:2].any() and (moved[2:] == (step == 5)).all(), step


@pytest.mark.parametrize('distance', ('l2', 'cosine'))
def test_what_revives_lies_halfway_from_a_token_to_its_code(distance):
  """There it takes a share of that code's tokens; of many channels, at the
  token next to none (measured: .91 and .95 in use; .14 and .75)."""
  quantizer = made(64, num_codes=128, distance=distance)

  def batch(i):
    return jax.random.normal(jax.random.key(i), (16, 64, 64)) + 1

  idle = jnp.arange(128) >= 16
  z = batch(0)[0]
  start = quantizer.init_codebook({}, z, jax.random.key(0))['codes']
  start = quantizer.training_codebook(
    {'codes': jnp.where(idle[:, None], -start, start)}
  )
  start['counts'] = jnp.where(idle, 0, start['counts'])

  @functools.partial(jax.jit, static_argnums=2)
  def step(codebook, i, at_tokens):
    variables = {'codebook': codebook}
    random = {'samples': jax.random.split(jax.random.key(i), 16)}
    out = quantizer.apply(variables, batch(i), train=True, random=random)
    tokens = out.tokens
    if at_tokens:
      own = quantizer.apply(variables, tokens, method='latents_to_indices')
      tokens = 2 * tokens - codebook['codes'][own]
    stats = out.stats | {'tokens': tokens}
    return quantizer.update_codebook(codebook, stats)

  used = {}
  for at_tokens in (False, True):
    codebook = start
    for i in range(1, 21):
      codebook = step(codebook, i, at_tokens)
    used[at_tokens] = usage(quantizer, {'codebook': codebook}, lambda: batch(0))
  assert used[False] > max(0.85, used[True] + 0.1), used


@pytest.mark.parametrize(
  'revive_below, least, most', [(0, 0, 0.3), (0.1, 0.9, 1)]
)
def test_a_codebook_follows_an_encoder_that_moves(revive_below, least, most):
  """Tokens that leave all codes behind win a few of them, for good unless idle
  ones are revived (measured: .22 and 1)."""
  quantizer = made(D, num_codes=256, decay=0.9, revive_below=revive_below)
  batch, keys = clustered(), jax.random.split(jax.random.key(2), 32)
  codebook = quantizer.init(jax.random.key(0), batch()[:8])['codebook']
  codebook = quantizer.init_codebook(codebook, batch(), jax.random.key(1))

  @jax.jit
  def step(codebook, z, keys):
    variables = {'codebook': codebook}
    z = z.reshape(32, -1, D)
    random = {'samples': keys}
    out = quantizer.apply(variables, z, train=True, random=random)
    stats = out.stats
    if out.tokens is not None:
      stats = stats | {'tokens': out.tokens}
    return quantizer.update_codebook(codebook, stats)

  fold = jax.jit(jax.vmap(jax.random.fold_in, (0, None)))
  for i in range(100):
    codebook = step(codebook, 3 * batch() + 5, fold(keys, i))
  used = usage(quantizer, {'codebook': codebook}, lambda: 3 * batch() + 5)
  assert least <= used <= most, used


def moved(batch, scale, offset):
  return scale * batch() + offset


def test_affine_codes_lie_where_the_tokens_are():
  """Random ones too, and idle ones follow: their place in units of the tokens'
  mean and std stays (measured: 5 % in use without the map, 31 % with it)."""
  used = {}
  for affine in (False, True):
    quantizer = made(
      D, num_codes=256, decay=0.9, data_init=False, revive_below=0.0,
      affine=affine,
    )  # fmt: skip
    batch = clustered()
    codebook = quantizer.init(jax.random.key(0), batch()[:8])['codebook']
    signals, won = codebook['codes'], 0
    first = moved(batch, 3.0, 5.0)
    codebook = quantizer.init_codebook(codebook, first, jax.random.key(1))

    @jax.jit
    def step(codebook, z, quantizer=quantizer):
      stats = quantizer.apply({'codebook': codebook}, z, train=True).stats
      return quantizer.update_codebook(codebook, stats), stats['counts'][0]

    for i in range(20):
      codebook, count = step(codebook, moved(batch, 3 - i / 20, 5 + i / 10))
      won += count
    last = functools.partial(moved, batch, 2.0, 7.0)
    used[affine] = usage(quantizer, {'codebook': codebook}, last)
  idle = np.asarray(won) == 0
  assert idle.sum() > 20
  place = codebook['codes'] - codebook['token_mean']
  place = place / np.sqrt(codebook['token_var'])
  np.testing.assert_allclose(place[idle], signals[idle], atol=1e-4)
  assert used[False] < 0.1 and used[True] > 0.25, used


def test_kmeans_plus_plus_finds_what_a_random_start_misses():
  """64 clusters apart, as many codes: nearly each has one."""
  rng = np.random.default_rng(0)
  centers = 20 * rng.normal(size=(64, 8))
  label = rng.integers(64, size=4096)
  z = jnp.asarray(centers[label] + rng.normal(size=(4096, 8)), jnp.float32)
  hit = {}
  for name, start in (
    ('tokens', made(8, num_codes=64)),
    ('kmeans++', made(8, num_codes=64, data_init='kmeans++')),
  ):
    codebook = jax.jit(start.init_codebook)({}, z, jax.random.key(1))
    distances = ((codebook['codes'][:, None] - centers) ** 2).sum(-1)
    hit[name] = len(np.unique(distances.argmin(1)))
    assert len(np.unique(np.asarray(codebook['codes']), axis=0)) == 64
  assert hit['tokens'] < 50 and hit['kmeans++'] >= 56, hit
  # Fewer tokens than codes: they repeat, and no two are the same.
  few = made(8, num_codes=64, data_init='kmeans++')
  codes = few.init_codebook({}, z[:5], jax.random.key(1))['codes']
  assert len(np.unique(np.asarray(codes), axis=0)) == 64
  basis = made(8, 'simvq', num_codes=64, code_dim=8, basis_init='kmeans++')
  assert basis.init_codebook({}, z, jax.random.key(1))['basis'].shape == (64, 8)


@pytest.mark.slow
@pytest.mark.parametrize('method', ('vq', 'simvq', 'fsq-mlp'))
def test_4096_codes_are_used(method):
  """As in docs/quantizers.md: 95 % of the codes, a perplexity of half their
  number."""
  batch = codebooks.synthetic(256)
  row = codebooks.measure(method, batch, steps=500, tokens=200_000)
  assert row['usage'] >= 0.95 and row['perplexity'] >= 0.5, row
