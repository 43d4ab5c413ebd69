"""Several codes a token: residual, grouped and multi-scale quantizers.

Held against vector-quantize-pytorch (ResidualVQ, ResidualFSQ, ResidualSimVQ,
GroupedResidualVQ) and, for the multi-scale one, against the paper's formulas in
plain torch, with the same parameters, in f32 to 1e-5.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from tests import tiny
from vqrae_jax import quantizers, sharding
from vqrae_jax.errors import UserError

C, K, N = 6, 24, 40
VQ = dict(name='vq', num_codes=K)


def made(name, width=C, quantizer=VQ, projection=False, **fields):
  section = dict(name=name, quantizer=quantizer, projection=projection)
  return quantizers.build(section | fields, width, 'float32')


def tokens(*shape, seed=0):
  return np.random.default_rng(seed).normal(0, 1, shape).astype('f4')


def tables(*shape):
  """Codes of stages, each finer than the one before."""
  finer = 0.5 ** np.arange(shape[0])[:, None, None]
  return (tokens(*shape, seed=1) * finer).astype('f4')


def ema(codes):
  return {'codes': codes, 'counts': np.ones(codes.shape[:-1], 'f4'),
          'sums': codes}  # fmt: skip


def close(found, want):
  want = np.asarray(want)
  scale = np.abs(want).max() + 1e-12
  np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * scale)


def forward(quantizer, variables, z, w):
  """(output, d(sum w z_q)/dz, d(sum losses)/d(variables, z)), jitted."""

  def value(z, variables):
    out = quantizer.apply(variables, z, train=True)
    return jnp.sum(w * out.z_q), out

  def losses(variables, z):
    return sum(quantizer.apply(variables, z, train=True).losses.values())

  @jax.jit
  def run(variables, z):
    (_, out), by_z = jax.value_and_grad(value, has_aux=True)(z, variables)
    return out, by_z, jax.grad(losses, (0, 1), allow_int=True)(variables, z)

  return run(variables, z)


def lookup(quantizer, variables, indices):
  method = functools.partial(quantizer.apply, method='indices_to_codes')
  return jax.jit(method)(variables, np.asarray(indices, np.int32))


def theirs_forward(module, z, w):
  """(z_q, indices, losses, d(sum w z_q)/dz, d(sum losses)/dz)."""
  import torch

  z = torch.tensor(z, requires_grad=True)
  z_q, indices, *losses = module(z)
  (by_value,) = torch.autograd.grad(
    (torch.tensor(w) * z_q).sum(), z, retain_graph=True
  )
  by_loss = None
  if losses:
    (by_loss,) = torch.autograd.grad(losses[0].sum(), z, retain_graph=True)
  return z_q.detach().numpy(), indices.numpy(), losses, by_value, by_loss


def residual_vq(codes, width, **options):
  """vector-quantize-pytorch's, training, with these codes [q k c]."""
  peer = pytest.importorskip('vector_quantize_pytorch')
  torch = pytest.importorskip('torch')
  module = peer.ResidualVQ(
    dim=width, num_quantizers=len(codes), codebook_size=codes.shape[1],
    decay=0.9, eps=1e-5, rotation_trick=False, **options,
  )  # fmt: skip
  load(torch, module, codes)
  return module.train()


def load(torch, module, codes):
  for layer, table in zip(module.layers, codes, strict=True):
    book, table = layer._codebook, torch.tensor(table)[None]
    book.embed.data.copy_(table)
    book.embed_avg.data.copy_(table)
    book.cluster_size.data.fill_(1.0)


@pytest.mark.parametrize('shared', (False, True))
def test_residual_vq_is_the_peers(shared):
  q = 3
  codes = tables(q, K, C)
  codes = codes[:1].repeat(q, 0) if shared else codes
  z, w = tokens(2, N, C), tokens(2, N, C, seed=2)
  theirs = residual_vq(codes, C, shared_codebook=shared)
  quantizer = made(
    'residual', stages=q, shared=shared, quantizer=VQ | dict(decay=0.9)
  )
  codebook = {'parts': ema(codes[:1] if shared else codes)}
  out, by_z, (_, by_loss) = forward(quantizer, {'codebook': codebook}, z, w)
  z_q, indices, losses, by_value, their_loss = theirs_forward(theirs, z, w)
  np.testing.assert_array_equal(out.indices, indices)
  close(out.z_q, z_q)
  # Theirs are one loss a stage; ours is their mean.
  close(out.losses['commit'] * q, losses[0].sum().item())
  close(by_loss * q, their_loss)
  # Their straight-through is one a stage, so that gradients add up.
  close(by_z * q, by_value)
  if shared:
    return
  # Fewer stages decode too.
  import torch

  some = np.where(np.arange(q) < 2, indices, -1)
  fresh = residual_vq(codes, C, quantize_dropout=True).eval()
  want = fresh.get_output_from_indices(torch.tensor(some))
  close(lookup(quantizer, {'codebook': codebook}, some), want.detach())
  # Each table follows its own stage.
  new = quantizer.update_codebook(codebook, out.stats)['parts']
  for i, layer in enumerate(theirs.layers):
    won = np.asarray(out.stats['counts'][i]) > 0
    moved = layer._codebook.embed[0].numpy()
    assert won.sum() > 5
    close(new['codes'][i][won], moved[won])
    np.testing.assert_array_equal(new['codes'][i][~won], codes[i][~won])


def test_a_gradient_table_is_the_peers():
  torch = pytest.importorskip('torch')
  codes, z, w = tables(2, K, C), tokens(2, N, C), tokens(2, N, C, seed=2)
  theirs = residual_vq(codes, C, ema_update=False, learnable_codebook=True)
  quantizer = made('residual', stages=2, quantizer=VQ | dict(update='gradient'))
  variables = {'params': {'parts': {'codes': codes}}}
  out, _, (moved, by_loss) = forward(quantizer, variables, z, w)
  x = torch.tensor(z, requires_grad=True)
  _, indices, losses = theirs(x)
  losses.sum().backward()
  np.testing.assert_array_equal(out.indices, indices)
  for name in ('commit', 'codebook'):
    close(out.losses[name] * 2, losses.sum().item())
  close(by_loss * 2, x.grad)
  for i, layer in enumerate(theirs.layers):
    found = moved['params']['parts']['codes'][i]
    close(found * 2, layer._codebook.embed.grad[0])


def test_residual_fsq_is_the_peers():
  """Theirs is in [-1, 1], with the first digit least significant."""
  peer = pytest.importorskip('vector_quantize_pytorch')
  import torch

  levels, q = (8, 5, 4), 3
  x = tokens(2, 500, 3)
  theirs = peer.ResidualFSQ(levels=list(levels), num_quantizers=q).eval()
  want, indices = theirs(torch.tensor(x))
  half = (np.array(levels[::-1], 'f4') - 1) / 2
  fsq = dict(name='fsq', levels=levels[::-1], bound='clip')
  quantizer = made('residual', 3, fsq, stages=q)
  z = x[..., ::-1] * half
  w = tokens(*z.shape, seed=2)
  out, by_z, _ = forward(quantizer, {}, z, w)
  np.testing.assert_array_equal(out.indices, indices)
  close(out.codes / half, want.numpy()[..., ::-1])
  bound = np.array(levels[::-1]) / 2
  close(by_z, w * (1 - np.tanh(z / bound) ** 2))
  assert np.abs(out.codes - bound * np.tanh(z / bound)).max() < 0.51 / 4**2


def test_residual_simvq_is_the_peers():
  peer = pytest.importorskip('vector_quantize_pytorch')
  q, z, w = 2, tokens(2, N, C), tokens(2, N, C, seed=2)
  theirs = peer.ResidualSimVQ(
    dim=C, num_quantizers=q, codebook_size=K, rotation_trick=False
  )
  basis = [layer.frozen_codebook.numpy() for layer in theirs.layers]
  kernel = [x.code_transform.weight.detach().numpy().T for x in theirs.layers]
  simvq = dict(name='simvq', num_codes=K, code_dim=C, normalize=False)
  quantizer = made('residual', quantizer=simvq, stages=q)
  params = {'kernel': np.stack(kernel), 'bias': np.zeros((q, C), 'f4')}
  variables = {
    'params': {'parts': params},
    'codebook': {'parts': {'basis': np.stack(basis)}},
  }
  out, by_z, _ = forward(quantizer, variables, z, w)
  z_q, indices, losses, by_value, _ = theirs_forward(theirs, z, w)
  np.testing.assert_array_equal(out.indices, indices)
  close(out.z_q, z_q)
  weighted = out.losses['codebook'] + 0.25 * out.losses['commit']
  close(weighted * q, losses[0].sum().item())
  close(by_z * q, by_value)

  def moved(params):
    both = variables | {'params': {'parts': params}}
    out = quantizer.apply(both, jnp.asarray(z), train=True)
    return out.losses['codebook'] * q

  found = jax.jit(jax.grad(moved))(params)['kernel']
  losses[0].sum().backward()
  for i, layer in enumerate(theirs.layers):
    close(found[i], layer.code_transform.weight.grad.T)


def test_grouped_residual_vq_is_the_peers():
  peer = pytest.importorskip('vector_quantize_pytorch')
  import torch

  g, q, c = 2, 2, C // 2
  codes = tables(g * q, K, c)
  z, w = tokens(2, N, C), tokens(2, N, C, seed=2)
  theirs = peer.GroupedResidualVQ(
    dim=C, groups=g, num_quantizers=q, codebook_size=K, rotation_trick=False
  ).train()
  codes = codes.reshape(g, q, K, c)
  for module, of_group in zip(theirs.rvqs, codes, strict=True):
    load(torch, module, of_group)
  inner = dict(name='residual', stages=q, quantizer=VQ)
  quantizer = made('grouped', groups=g, quantizer=inner)
  codebook = {'parts': {'parts': ema(codes)}}
  out, by_z, (_, by_loss) = forward(quantizer, {'codebook': codebook}, z, w)
  z_q, indices, losses, by_value, their_loss = theirs_forward(theirs, z, w)
  assert out.indices.shape == (2, N, g * q)
  np.testing.assert_array_equal(out.indices, np.concatenate(list(indices), -1))
  close(out.z_q, z_q)
  close(out.losses['commit'] * g * q, losses[0].sum().item())
  close(by_loss * g * q, their_loss)
  close(by_z * q, by_value)
  found = lookup(quantizer, {'codebook': codebook}, out.indices)
  np.testing.assert_array_equal(found, out.codes)
  assert jax.tree.map(
    jnp.shape, quantizer.update_codebook(codebook, out.stats)
  ) == jax.tree.map(jnp.shape, codebook)


@pytest.mark.parametrize('phis, scales', [(4, (1, 2, 3, 5)), (2, (2, 5))])
def test_multiscale_is_the_papers(phis, scales):
  """Areas of 5 / 2 and 5 / 3, a table that a gradient moves."""
  torch = pytest.importorskip('torch')
  F = torch.nn.functional
  side, z = scales[-1], tokens(2, scales[-1], scales[-1], C)
  w = tokens(*z.shape, seed=2)
  codes = tables(1, K, C)
  kernels = 0.2 * tokens(phis, 3, 3, C, C, seed=3)
  biases = 0.1 * tokens(phis, C, seed=4)
  params = {'parts': {'codes': codes}} | {
    f'phi_{i}': dict(kernel=kernels[i], bias=biases[i]) for i in range(phis)
  }
  quantizer = made(
    'multiscale', scales=scales, phis=phis,
    quantizer=VQ | dict(update='gradient'),
  )  # fmt: skip
  out, by_z, (moved, by_loss) = forward(quantizer, {'params': params}, z, w)

  table = torch.tensor(codes[0], requires_grad=True)
  weights = torch.tensor(kernels.transpose(0, 4, 3, 1, 2), requires_grad=True)
  x = torch.tensor(z.transpose(0, 3, 1, 2), requires_grad=True)
  margin = 1 / 3 / phis if phis == 4 else 1 / 2 / phis
  ticks = np.linspace(margin, 1 - margin, phis)
  rest, total = x.detach().clone(), torch.zeros_like(x)
  commit, codebook, found = 0, 0, []
  for s, n in enumerate(scales):
    small = F.interpolate(rest, (n, n), mode='area') if n != side else rest
    flat = small.permute(0, 2, 3, 1).reshape(-1, C)
    index = torch.cdist(flat, table.detach()).argmin(1).reshape(2, n, n)
    found.append(index.reshape(2, -1))
    h = table[index].permute(0, 3, 1, 2)
    if n != side:
      h = F.interpolate(h, (side, side), mode='bicubic')
    phi = int(np.argmin(np.abs(ticks - s / (len(scales) - 1))))
    smooth = F.conv2d(h, weights[phi], torch.tensor(biases[phi]), padding=1)
    h = 0.5 * h + 0.5 * smooth
    total, rest = total + h, rest - h.detach()
    prefix = total if s == 0 else prefix
    commit = commit + F.mse_loss(total.detach(), x)
    codebook = codebook + F.mse_loss(total, x.detach())
  (commit + codebook).backward()
  np.testing.assert_array_equal(out.indices, torch.cat(found, 1))
  close(out.codes, total.detach().permute(0, 2, 3, 1))
  n = len(scales)
  close(out.losses['commit'] * n, commit.item())
  close(out.losses['codebook'] * n, codebook.item())
  close(by_z, w)
  close(by_loss * n, x.grad.permute(0, 2, 3, 1))
  moved = moved['params']
  close(moved['parts']['codes'][0] * n, table.grad)
  for i in range(phis):
    want = weights.grad[i].permute(2, 3, 1, 0)
    close(moved[f'phi_{i}']['kernel'] * n, want)
  # A prefix of the scales: what they add alone, without the others' biases.
  first = np.where(np.arange(sum(s * s for s in scales)) < 1, out.indices, -1)
  if scales[0] == 1:
    found = lookup(quantizer, {'params': params}, first)
    close(found, prefix.detach().permute(0, 2, 3, 1))


def keys(count):
  return jax.vmap(jax.random.key)(jnp.arange(count))


def test_dropout_drops_the_last_stages_of_a_sample():
  """By its key alone; what is dropped counts for nothing."""
  quantizer = made('residual', stages=4, dropout=0.6)
  z = tokens(64, 3, C)
  codebook = {'parts': jax.tree.map(jnp.asarray, ema(tables(4, K, C)))}

  @jax.jit
  def run(z, keys):
    variables = {'codebook': codebook}
    out = quantizer.apply(variables, z, train=True, random={'samples': keys})
    codes = quantizer.apply(variables, out.indices, method='indices_to_codes')
    whole = quantizer.apply(variables, z, train=True)
    return out, codes, whole

  out, codes, whole = run(z, keys(64))
  kept = (np.asarray(out.indices) >= 0).sum(-1)
  assert (kept == kept[:, :1]).all() and {*kept[:, 0]} == {1, 2, 3, 4}
  # A quarter of the draws keeps all stages.
  assert 0.3 < (kept < 4).mean() < 0.6
  same = np.arange(4) < kept[..., None]
  np.testing.assert_array_equal(out.indices, np.where(same, whole.indices, -1))
  np.testing.assert_array_equal(codes, out.codes)
  stages = np.asarray(codebook['parts']['codes'])[np.arange(4), whole.indices]
  want = np.where(same[..., None], stages, 0).sum(-2)
  np.testing.assert_allclose(codes, want, atol=1e-5)
  np.testing.assert_array_equal(out.stats['counts'].sum(1), same.sum((0, 1)))
  assert out.losses['commit'] < whole.losses['commit']
  again, _, _ = run(z[::-1], keys(64)[::-1])
  np.testing.assert_array_equal(again.indices[::-1], out.indices)
  assert whole.indices.min() >= 0  # without keys nothing is drawn


def test_a_sum_does_not_say_its_codes():
  """Quantized again, stage by stage, it gives others: what is inverted are
  the codes one by one."""
  quantizer = made('residual', stages=2)
  codes = tokens(2, K, C)
  variables = {'codebook': {'parts': jax.tree.map(jnp.asarray, ema(codes))}}

  @jax.jit
  def run(indices):
    summed = quantizer.apply(variables, indices, method='indices_to_codes')
    again = quantizer.apply(variables, summed, method='latents_to_indices')
    each = quantizer.apply(variables, indices, method='indices_to_stage_codes')
    back = quantizer.apply(variables, each, method='codes_to_indices')
    return summed, again, each, back

  grid = np.stack(np.meshgrid(np.arange(K), np.arange(K)), -1)
  summed, again, each, back = run(jnp.asarray(grid, jnp.int32))
  assert (np.asarray(again) != grid).any(-1).mean() > 0.1
  np.testing.assert_array_equal(back, grid)
  np.testing.assert_array_equal(each.sum(-2), summed)


@pytest.mark.parametrize('shared', (False, True))
def test_stages_start_at_what_is_left(shared):
  """Each stage halves the error at least, and no table starts idle."""
  z = jnp.asarray(tokens(8 * K, C))
  quantizer = made('residual', stages=3, shared=shared)

  @jax.jit
  def run(z):
    variables = quantizer.init(jax.random.key(0), z[:2])
    codebook = quantizer.init_codebook(
      variables['codebook'], z, jax.random.key(1)
    )
    return codebook, quantizer.apply({'codebook': codebook}, z)

  codebook, out = run(z)
  assert codebook['parts']['codes'].shape == (1 if shared else 3, K, C)
  parts = codebook['parts']
  # A tenth of the mean, and a token's part: that of all stages if they share.
  mean = len(z) * (3 if shared else 1) / K
  np.testing.assert_allclose(parts['counts'], 0.1 * mean + 0.01, rtol=1e-5)
  average = parts['sums'] / parts['counts'][..., None]
  np.testing.assert_allclose(average, parts['codes'], rtol=1e-5)
  error = float(jnp.mean((out.codes - z) ** 2))
  assert error < (0.45 if shared else 0.3), error
  used = (out.stats['counts'] > 0).mean(1)
  assert (used > (0.3 if shared else 0.8)).all()


def test_shared_stages_teach_one_table():
  quantizer = made('residual', stages=2, shared=True)
  codebook = {'parts': ema(tables(1, K, C))}
  stats = {
    'counts': jnp.asarray(np.arange(2 * K).reshape(2, K)),
    'sums': jnp.asarray(tokens(2, K, C)),
  }
  found = quantizer.update_codebook(codebook, stats)['parts']
  alone = quantizers.build(VQ, C, 'float32')
  want = alone.update_codebook(
    {n: x[0] for n, x in codebook['parts'].items()},
    {n: x.sum(0, keepdims=True) for n, x in stats.items()},
  )
  for name, leaf in want.items():
    np.testing.assert_array_equal(found[name][0], leaf)


REVIVED = {
  'residual': dict(stages=3, dropout=0.5),
  'grouped': dict(groups=2),
  'multiscale': dict(scales=(1, 2), phis=0),
}


@pytest.mark.parametrize('name', REVIVED)
def test_idle_codes_become_what_their_stage_quantizes(name):
  """Halfway to its code, one token of each sample, by its key alone, dropped
  or not."""
  quantizer = made(name, **REVIVED[name])
  z = tokens(16, 2, 2, C)
  codes = tables(quantizer.tables, K, C // 2 if name == 'grouped' else C)
  counts = np.ones(codes.shape[:-1], 'f4')
  counts[:, 1::2] = 1e-3
  codebook = {'parts': ema(codes) | {'counts': counts}}
  codebook = jax.tree.map(jnp.asarray, codebook)

  @jax.jit
  def run(z, keys):
    variables = {'codebook': codebook}
    out = quantizer.apply(variables, z, train=True, random={'samples': keys})
    stats = out.stats | {'tokens': out.tokens}
    new = [quantizer.update_codebook(codebook, s) for s in (stats, out.stats)]
    whole = quantizer.apply(variables, z, train=True).indices
    return out, whole, *new

  out, whole, new, without = run(z, keys(16))
  if name == 'multiscale':  # one table, for tokens of both scales
    coarse = z.mean((1, 2))[:, None]
    fine = z.reshape(16, 4, C) - codes[0][whole[:, :1]]
    quantized = [np.concatenate([coarse, fine], 1)]
    chosen = [codes[0][whole]]
  else:
    chosen = [table[whole[..., i]] for i, table in enumerate(codes)]
    quantized = np.split(z, 2, -1)
  if name == 'residual':
    assert (out.indices < 0).any() and out.tokens.shape == (16, 3, C)
    quantized = [z - sum(chosen[:i]) for i in range(3)]
  for i, pair in enumerate(zip(quantized, chosen, strict=True)):
    offered = (sum(pair) / 2).reshape(16, -1, codes.shape[-1])
    distances = np.abs(offered - out.tokens[:, i, None]).max(-1)
    assert distances.min(1).max() < 1e-6
    assert len(np.unique(distances.argmin(1))) == offered.shape[1]
    found, want = (np.asarray(x['parts']['codes'][i]) for x in (new, without))
    won = new['parts']['counts'][i] > without['parts']['counts'][i]
    assert (
      np.flatnonzero(won)
      == np.flatnonzero(
        without['parts']['counts'][i] < 0.1 * out.stats['counts'][i].sum() / K
      )
    ).all()
    np.testing.assert_array_equal(found[won], out.tokens[: won.sum(), i])
    np.testing.assert_array_equal(found[~won], want[~won])
    assert won.sum() > 3
  again = run(z[::-1], keys(16)[::-1])[0]
  np.testing.assert_array_equal(again.tokens[::-1], out.tokens)


def test_a_shared_table_is_offered_tokens_of_all_stages():
  quantizer = made('residual', stages=2, shared=True)
  codebook = {'parts': ema(tables(1, K, C))}
  codebook['parts']['counts'][:] = 1e-3
  stats = {
    'counts': jnp.zeros((2, K), jnp.int32).at[:, 0].set(K),
    'sums': jnp.zeros((2, K, C)),
    'tokens': jnp.asarray(tokens(5, 2, C)),
  }
  new = quantizer.update_codebook(codebook, stats)['parts']
  want = stats['tokens'].reshape(10, C)  # sample after sample
  np.testing.assert_array_equal(new['codes'][0, 1:11], want)
  np.testing.assert_array_equal(
    new['codes'][0, 11:], codebook['parts']['codes'][0, 11:]
  )


@pytest.mark.parametrize(
  'name, fields', [('grouped', dict(groups=2)), ('residual', dict(stages=2))]
)
def test_regularisers_are_means_over_parts(name, fields):
  """In value and gradient those of each part alone, at what it quantizes."""
  section = VQ | dict(update='gradient', entropy_temperature=0.7)
  quantizer = made(name, quantizer=section, **fields)
  weights = dict(entropy=1.0, diversity=0.7, orthogonal=0.4)
  assert set(quantizer.loss_names) == {'commit', 'codebook', *weights}
  c = C // 2 if name == 'grouped' else C
  alone = quantizers.build(section, c, 'float32')
  codes, z = jnp.asarray(tables(2, K, c)), jnp.asarray(tokens(3, N, C))

  def weighed(module, params, z):
    out = module.apply({'params': params}, z, train=True, losses=(*weights,))
    return sum(w * out.losses[n] for n, w in weights.items()), out.indices

  def together(codes, z):
    return weighed(quantizer, {'parts': {'codes': codes}}, z)[0]

  def apart(codes, z):
    total = 0.0
    for i in range(2):
      x = z[..., i * c : (i + 1) * c] if name == 'grouped' else z
      value, indices = weighed(alone, {'codes': codes[i]}, x)
      total += value / 2
      if name == 'residual':
        z = z - jax.lax.stop_gradient(codes[i][indices])
    return total

  found, want = (
    jax.jit(jax.value_and_grad(fn, (0, 1)))(codes, z)
    for fn in (together, apart)
  )
  jax.tree.map(close, found, want)
  assert all(np.abs(g).max() > 0 for g in found[1])


def test_multiscale_starts_at_tokens_of_all_scales():
  quantizer = made('multiscale', scales=(1, 2, 4), phis=0)
  z = jnp.asarray(tokens(16, 4, 4, C))
  variables = quantizer.init(jax.random.key(0), z)

  @jax.jit
  def run(z):
    codebook = quantizer.init_codebook(
      variables['codebook'], z.reshape(-1, C), jax.random.key(1)
    )
    return quantizer.apply({'codebook': codebook}, z)

  out = run(z)
  assert out.indices.shape == (16, 21) and quantizer.index_shape((4, 4)) == (
    21,
  )
  assert quantizer.only_grid == (4, 4)
  assert float(out.losses['commit']) < 0.9
  assert (out.stats['counts'] > 0).mean() > 0.5


@pytest.mark.parametrize(
  'groups, inner',
  [
    (3, dict(name='fsq', levels=(8, 8, 8, 8))),
    (2, dict(name='lfq', bits=18)),
    (2, dict(name='bsq', bits=18)),
  ],
)
def test_more_values_than_an_index_counts(groups, inner):
  """36 bits a token, as several indices; one alone is refused."""
  width = 12 if inner['name'] == 'fsq' else 36
  quantizer = made('grouped', width, inner, groups=groups)
  out = quantizer.apply({}, jnp.asarray(tokens(50, width)))
  assert quantizer.codebook_size**groups == 2**36
  assert out.indices.shape == (50, groups)
  back = quantizer.apply({}, out.codes, method='codes_to_indices')
  np.testing.assert_array_equal(back, out.indices)
  again = quantizer.apply({}, back, method='indices_to_codes')
  np.testing.assert_array_equal(again, out.codes)
  if 'bits' in inner:
    with pytest.raises(UserError, match='bits=36 .*grouped'):
      quantizers.build(inner | dict(bits=36), 36, 'float32')


FSQ = dict(name='fsq', levels=(8, 5), bound='clip')
RESIDUAL = dict(name='residual', stages=2, quantizer=VQ)


@pytest.mark.parametrize(
  'section, key',
  [
    (dict(name='residual'), 'model.quantizer.quantizer=None'),
    (dict(name='residual', quantizer='vq'), "model.quantizer.quantizer='vq'"),
    (RESIDUAL | dict(quantizer=dict(name='vqq')), 'quantizer.quantizer.name'),
    (RESIDUAL | dict(quantizer=dict(name='none')), '"none"'),
    (RESIDUAL | dict(quantizer=RESIDUAL), '"residual"'),
    (RESIDUAL | dict(quantizer=dict(name='bsq')), '"bsq"'),
    (RESIDUAL | dict(quantizer=dict(name=['vq'])), 'quantizer.name'),
    (RESIDUAL | dict(quantizer=dict(name='lfq', bits=C), stages=25),
     'quantizer.stages=25'),
    (RESIDUAL | dict(quantizer=VQ | dict(num_codes=0)),
     'model.quantizer.quantizer.num_codes=0'),
    (RESIDUAL | dict(quantizer=VQ | dict(num_code=8)),
     'model.quantizer.quantizer.num_code"'),
    (RESIDUAL | dict(quantizer=VQ | dict(projection=True)),
     'model.quantizer.quantizer.projection'),
    (RESIDUAL | dict(stages=0), 'quantizer.stages=0'),
    (RESIDUAL | dict(dropout=1.5), 'quantizer.dropout=1.5'),
    (RESIDUAL | dict(quantizer=dict(name='simvq', code_dim=C)),
     'quantizer.quantizer.normalize=True'),
    (RESIDUAL | dict(quantizer=FSQ | dict(bound='tanh')),
     "quantizer.quantizer.bound='tanh'"),
    (RESIDUAL | dict(quantizer=FSQ, stages=9), 'quantizer.stages=9'),
    (dict(name='grouped', groups=2, quantizer=dict(
       name='simvq', code_dim=C // 2, token_map=True)),
     'quantizer.quantizer.token_map'),
    (dict(name='grouped', groups=4, quantizer=VQ), 'quantizer.groups=4'),
    (dict(name='grouped', groups=4, quantizer=RESIDUAL), 'quantizer.groups=4'),
    (dict(name='multiscale', quantizer=FSQ), '"fsq"'),
    (dict(name='grouped', groups=2, quantizer=FSQ | dict(adapter_in='mlp')),
     'leave it out, and set model.quantizer.projection'),
    (dict(name='multiscale', scales=(), quantizer=VQ), 'quantizer.scales=()'),
    (dict(name='multiscale', scales=(4, 2), quantizer=VQ), 'quantizer.scales'),
    (dict(name='multiscale', scales=(4.0,), quantizer=VQ), 'quantizer.scales'),
    (dict(name='multiscale', phis=-1, quantizer=VQ), 'quantizer.phis=-1'),
    (dict(name='multiscale', scales=(1, 2, 4), quantizer=VQ), 'set it to 3'),
    (dict(name='multiscale', quantizer=VQ | dict(data_init='kmeans++')),
     'quantizer.data_init="kmeans++"'),
    (RESIDUAL | dict(shared=True, quantizer=VQ | dict(data_init='kmeans++')),
     'quantizer.data_init="kmeans++"'),
    (RESIDUAL | dict(quantizer=VQ | dict(dtype='bfloat16')), 'in f32'),
    (dict(name='grouped', groups=4, quantizer=RESIDUAL),
     'quantizer.quantizer.quantizer.code_dim'),
  ],
)  # fmt: skip
def test_errors_name_the_key(section, key):
  with pytest.raises(UserError) as error:
    quantizers.build(dict(projection=False) | section, C, 'float32')
  assert key in str(error.value) and '\n' not in str(error.value)


def test_wrong_shapes_say_what_is_right():
  residual = made('residual')
  scales = made('multiscale', scales=(1, 2), phis=0)
  variables = jax.eval_shape(residual.init, jax.random.key(0), tokens(2, C))
  fsq = dict(name='fsq', levels=(8, 8, 8), bound='clip')
  inner = dict(name='residual', stages=2, quantizer=fsq)
  groups = made('grouped', groups=2, quantizer=inner)
  for quantizer, method, x, key in (
    (groups, 'codes_to_indices', tokens(2, C), 'residual groups'),
    (residual, 'indices_to_codes', np.zeros((2, 3), int), 'stages=8'),
    (residual, 'codes_to_indices', tokens(2, C), 'indices_to_stage_codes'),
    (scales, 'latents_to_indices', tokens(1, 4, 4, C), 'quantizer.scales'),
    (scales, 'indices_to_codes', np.zeros((2, 4), int), 'quantizer.scales'),
  ):
    apply = functools.partial(quantizer.apply, method=method)
    with pytest.raises(UserError, match=key):
      jax.eval_shape(apply, variables, x)
  with pytest.raises(UserError, match='quantizer.scales'):
    scales.index_shape((4, 4))


def test_on_two_devices_and_exported():
  """Stacked tables are split by their rows; a batch may be a symbol."""
  quantizer = made('residual', stages=2)
  z = jnp.asarray(tokens(8, 5, C))
  idle = {'counts': np.where(np.arange(2 * K) % 3, 1.0, 1e-3).reshape(2, K)}
  variables = {'codebook': {'parts': ema(tables(2, K, C)) | idle}}

  def run(variables, z):
    draws = {'samples': keys(8)}
    out = quantizer.apply(variables, z, train=True, random=draws)
    stats = out.stats | {'tokens': out.tokens}
    return out.indices, quantizer.update_codebook(variables['codebook'], stats)

  indices, new = jax.jit(run)(variables, z)
  mesh = sharding.make_mesh('fsdp', jax.devices()[:2])
  tree = {'codebook': {'quantizer': variables['codebook']}}
  places = sharding.shardings_for(tree, mesh)['codebook']['quantizer']
  assert places['parts']['codes'].spec[1] == 'fsdp'
  with jax.set_mesh(mesh):
    split = {'codebook': jax.device_put(variables['codebook'], places)}
    batch = sharding.place_batch({'z': np.asarray(z)}, mesh)['z']
    found, moved = jax.jit(run)(split, batch)
  np.testing.assert_array_equal(found, indices)
  jax.tree.map(close, moved, new)

  symbolic = jax.ShapeDtypeStruct((*export.symbolic_shape('b'), 5, C), z.dtype)
  encode = functools.partial(quantizer.apply, method='latents_to_indices')
  variables = jax.tree.map(jnp.asarray, variables)
  stored = export.export(jax.jit(encode))(variables, symbolic).serialize()
  found = export.deserialize(stored).call(variables, z)
  np.testing.assert_array_equal(found, indices)


@pytest.mark.parametrize(
  'section, shape',
  [
    (RESIDUAL | dict(stages=1), (1,)),
    (dict(name='grouped', groups=1, quantizer=VQ), (1,)),
    (dict(name='grouped', groups=2, quantizer=RESIDUAL | dict(stages=1)), (2,)),
  ],
)
def test_one_code_keeps_its_axis(section, shape):
  """Indices have the shape that `index_shape` says and decode again."""
  quantizer = made(**section)
  z = tokens(2, 3, 3, C)
  variables = jax.jit(quantizer.init)(jax.random.key(0), z)

  @jax.jit
  def run(variables, z):
    out = quantizer.apply(variables, z)
    return out, quantizer.apply(
      variables, out.indices, method='indices_to_codes'
    )

  out, codes = run(variables, z)
  assert out.indices.shape == (2, *quantizer.index_shape((3, 3)))
  assert out.indices.shape == (2, 3, 3, *shape)
  assert len(quantizer.index_axes) == 3
  np.testing.assert_array_equal(codes, out.codes)


def test_scales_of_an_empty_batch():
  quantizer = made('multiscale', scales=(1, 2), phis=0)
  z = jnp.zeros((1, 2, 2, C))
  variables = quantizer.init(jax.random.key(0), z)
  assert quantizer.apply(variables, z[:0]).indices.shape == (0, 5)


def test_scales_export_with_a_symbolic_batch():
  quantizer = made('multiscale', scales=(1, 2, 3), phis=1)
  z = jnp.asarray(tokens(2, 3, 3, C))
  variables = jax.jit(quantizer.init)(jax.random.key(0), z)

  def run(variables, z):
    indices = quantizer.apply(variables, z, method='latents_to_indices')
    return indices, quantizer.apply(
      variables, indices, method='indices_to_codes'
    )

  want = jax.jit(run)(variables, z)
  symbolic = jax.ShapeDtypeStruct((*export.symbolic_shape('b'), 3, 3, C), 'f4')
  stored = export.export(jax.jit(run))(variables, symbolic).serialize()
  found = export.deserialize(stored).call(variables, z)
  np.testing.assert_array_equal(found[0], want[0])
  close(found[1], want[1])


def test_bits_of_a_token_add_up():
  """A run's tokenizer: its index shape, counts and entropies."""
  from vqrae_jax.evaluate import metrics

  counts = np.array([[1, 1, 1, 1], [2, 2, 0, 0]])
  results = metrics.Sums(counts=counts).results()
  assert results['usage'] == 0.75 and results['codes_used'] == 6
  assert results['perplexity'] == pytest.approx(3)
  bits = metrics.entropy(counts).sum() / math.log(2)
  assert bits == pytest.approx(3)
  assert {'residual-vq', 'grouped-vq', 'multiscale'} <= {*tiny.NESTED}
