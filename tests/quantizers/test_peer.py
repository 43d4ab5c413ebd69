"""Quantizers against vector-quantize-pytorch, given the same parameters.

Outputs, indices, losses and gradients agree to 1e-5 of the largest value.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax import quantizers

torch = pytest.importorskip('torch')
peer = pytest.importorskip('vector_quantize_pytorch')

B, N, K = 3, 14, 12


def close(found, want, what=''):
  want = want.detach().numpy() if hasattr(want, 'detach') else want
  scale = np.abs(want).max() + 1e-12
  np.testing.assert_allclose(
    found, want, rtol=0, atol=1e-5 * scale, err_msg=what
  )


def random(*shape, std=1.0):
  rng = np.random.default_rng(len(shape) + shape[-1])
  return rng.normal(0, std, shape).astype('f4')


def dense(layer):
  """A torch Linear as a linen Dense."""
  found = dict(kernel=jnp.asarray(layer.weight.detach().numpy().T))
  return found | dict(bias=jnp.asarray(layer.bias.detach().numpy()))


def run(quantizer, variables, z, weights, losses):
  """(z_q, indices, losses, stats, gradients to (parameters, z)) of
  sum(weights * z_q) and the weighted losses."""

  def total(params, z):
    given = variables | {'params': params}
    out = quantizer.apply(given, z, train=True, losses=tuple(losses))
    value = jnp.sum(weights * out.z_q)
    value += sum(w * out.losses[name] for name, w in losses.items())
    return value, (out.z_q, out.indices, out.losses, out.stats)

  variables = jax.tree.map(jnp.asarray, variables)
  step = jax.jit(jax.grad(total, (0, 1), has_aux=True))
  gradients, out = step(variables.get('params', {}), jnp.asarray(z))
  return *out, gradients


@pytest.mark.parametrize(
  'distance, rotation',
  [
    pytest.param('l2', False, marks=pytest.mark.slow),
    ('l2', True),
    ('cosine', True),
  ],
)
def test_vq_with_an_average(distance, rotation):
  """With a projection, and cosine's diversity, where the peer has distances
  squared as we do."""
  cosine = distance == 'cosine'
  theirs = peer.VectorQuantize(
    dim=8, codebook_size=K, codebook_dim=5, decay=0.9, use_cosine_sim=cosine,
    rotation_trick=rotation, threshold_ema_dead_code=0,
    codebook_diversity_loss_weight=0.5 * cosine,
    codebook_diversity_temperature=5.0,
  )  # fmt: skip
  codes = random(K, 5)
  if cosine:
    codes /= np.linalg.norm(codes, axis=-1, keepdims=True)
  for table in (theirs._codebook.embed, theirs._codebook.embed_avg):
    table.data.copy_(torch.from_numpy(codes)[None])
  projections = dict(
    project_in=dense(theirs.project_in), project_out=dense(theirs.project_out)
  )
  z, weights = random(B * N, 8), random(B * N, 8, std=0.01)
  x = torch.from_numpy(z).requires_grad_()
  # Its update overwrites the codes that its backward reads: apart, then.
  z_q, indices, loss, parts = theirs(
    x, freeze_codebook=True, return_loss_breakdown=True
  )
  (loss.sum() + (z_q * torch.from_numpy(weights)).sum()).backward()
  with torch.no_grad():
    theirs(x)

  ours = quantizers.build(
    dict(
      name='vq', num_codes=K, code_dim=5, decay=0.9, projection=True,
      distance=distance, rotation=rotation, entropy_temperature=2 / 5,
    ),
    8, 'float32',
  )  # fmt: skip
  codebook = dict(codes=codes, counts=np.ones(K, 'f4'), sums=codes)
  losses = dict(commit=1.0) | (dict(diversity=0.5) if cosine else {})
  found = run(
    ours, dict(params=projections, codebook=codebook), z, weights, losses
  )
  close(found[0], z_q, 'z_q')
  np.testing.assert_array_equal(found[1], indices)
  close(found[2]['commit'], parts.commitment)
  if cosine:
    close(found[2]['diversity'], parts.codebook_diversity)
  by_params, by_z = found[-1]
  close(by_z, x.grad, 'gradient to latents')
  close(by_params['project_in']['kernel'].T, theirs.project_in.weight.grad)
  moved = ours.update_codebook(codebook, found[3])
  won = np.unique(indices)
  assert len(won) > 4
  close(moved['codes'][won], theirs._codebook.embed[0].detach()[won])
  close(moved['counts'], theirs._codebook.cluster_size[0])


@pytest.mark.parametrize('update', ('ema', 'gradient'))
def test_affine_codes(update):
  """With the peer's statistics of codes held at 0 and 1: see
  docs/quantizers.md."""
  ema = update == 'ema'
  theirs = peer.VectorQuantize(
    dim=8, codebook_size=K, decay=0.9, affine_param=True,
    affine_param_batch_decay=1.0, affine_param_codebook_decay=1.0,
    learnable_codebook=not ema, ema_update=ema, rotation_trick=False,
    threshold_ema_dead_code=0,
  )  # fmt: skip
  book, signals = theirs._codebook, random(K, 8)
  mean, var = random(8, std=2.0), 0.2 + random(1, 8)[0] ** 2
  for table in (book.embed, book.embed_avg):
    table.data.copy_(torch.from_numpy(signals)[None])
  for side, at in (
    ('codebook', (0 * mean, 0 * var + 1)),
    ('batch', (mean, var)),
  ):
    for name, value in zip(('mean', 'variance'), at, strict=True):
      value = torch.from_numpy(value)[None, None]
      book.register_buffer(f'{side}_{name}', value)
      book.register_buffer(f'{side}_{name}_needs_init', torch.tensor(False))
  z, weights = 1.5 * random(B, N, 8) - 1, random(B, N, 8, std=0.01)
  x = torch.from_numpy(z).requires_grad_()
  z_q, indices, loss = theirs(x)
  (loss.sum() + (z_q * torch.from_numpy(weights)).sum()).backward()

  ours = quantizers.build(
    dict(name='vq', num_codes=K, update=update, affine=True, decay=0.9),
    8, 'float32',
  )  # fmt: skip
  codebook = dict(token_mean=mean, token_var=var)
  if ema:
    codes = signals * np.sqrt(var) + mean
    codebook |= dict(codes=codes, counts=np.ones(K, 'f4'), sums=signals)
  params = {} if ema else dict(codes=signals)
  losses = dict(commit=1.0) | ({} if ema else dict(codebook=1.0))
  found = run(ours, dict(params=params, codebook=codebook), z, weights, losses)
  close(found[0], z_q)
  np.testing.assert_array_equal(found[1], indices)
  won = np.unique(indices)
  assert len(won) > 4
  close(found[2]['commit'], loss.sum())
  by_params, by_z = found[-1]
  close(by_z, x.grad)
  moved = jax.jit(ours.update_codebook)(codebook, found[3])
  book.affine_param_batch_decay = 0.9
  book.update_affine(x.reshape(1, -1, 8), book.embed)
  mean, var = book.batch_mean[0, 0], book.batch_variance[0, 0]
  close(moved['token_mean'], mean)
  close(moved['token_var'], var)
  if ema:
    close(moved['sums'], book.embed_avg[0])
    codes = book.embed[0] * var.sqrt() + mean
    close(moved['codes'][won], codes[won])
  else:
    close(by_params['codes'], book.embed.grad[0])


def test_vq_with_a_gradient():
  theirs = peer.VectorQuantize(
    dim=8, codebook_size=K, learnable_codebook=True, ema_update=False,
    rotation_trick=True, orthogonal_reg_weight=2.0,
  )  # fmt: skip
  codes = random(K, 8)
  theirs._codebook.embed.data.copy_(torch.from_numpy(codes)[None])
  z, weights = random(B, N, 8), random(B, N, 8, std=0.01)
  x = torch.from_numpy(z).requires_grad_()
  z_q, indices, loss, parts = theirs(x, return_loss_breakdown=True)
  (loss.sum() + (z_q * torch.from_numpy(weights)).sum()).backward()

  ours = quantizers.build(
    dict(name='vq', num_codes=K, update='gradient', rotation=True), 8, 'float32'
  )
  losses = dict(commit=1.0, codebook=1.0, orthogonal=2.0)
  found = run(ours, dict(params=dict(codes=codes)), z, weights, losses)
  close(found[0], z_q)
  np.testing.assert_array_equal(found[1], indices)
  close(found[2]['commit'], parts.commitment)
  close(found[2]['orthogonal'], parts.orthogonal_reg)
  by_params, by_z = found[-1]
  close(by_z, x.grad)
  close(by_params['codes'], theirs._codebook.embed.grad[0])


@pytest.mark.parametrize(
  'rotation', (pytest.param(False, marks=pytest.mark.slow), True)
)
def test_simvq(rotation):
  theirs = peer.SimVQ(dim=8, codebook_size=K, rotation_trick=rotation)
  z, weights = random(B, N, 8), random(B, N, 8, std=0.01)
  x = torch.from_numpy(z).requires_grad_()
  z_q, indices, loss = theirs(x)
  (loss + (z_q * torch.from_numpy(weights)).sum()).backward()

  ours = quantizers.build(
    dict(
      name='simvq', num_codes=K, code_dim=8, projection=False,
      normalize=False, rotation=rotation,
    ),
    8, 'float32',
  )  # fmt: skip
  kernel = theirs.code_transform.weight
  variables = dict(
    params=dict(kernel=kernel.detach().numpy().T, bias=np.zeros(8, 'f4')),
    codebook=dict(basis=theirs.frozen_codebook.numpy()),
  )
  found = run(ours, variables, z, weights, dict(commit=0.25, codebook=1.0))
  close(found[0], z_q)
  np.testing.assert_array_equal(found[1], indices)
  close(0.25 * found[2]['commit'] + found[2]['codebook'], loss)
  by_params, by_z = found[-1]
  close(by_z, x.grad)
  close(by_params['kernel'].T, kernel.grad)


@pytest.mark.parametrize(
  'name, groups',
  [('lfq', 1), ('bsq', 1), ('bsq', 2),
   pytest.param('lfq', 2, marks=pytest.mark.slow)],
)  # fmt: skip
def test_signs(name, groups):
  """The peer's entropies clip probabilities below 1e-5: there are none here."""
  theirs = peer.LFQ(
    dim=8, codebook_size=64, num_codebooks=groups, spherical=name == 'bsq',
    diversity_gamma=0.7, entropy_loss_weight=1.0, commitment_loss_weight=0.5,
  )  # fmt: skip
  z, weights = random(B, N, 8, std=0.5), random(B, N, 8, std=0.01)
  x = torch.from_numpy(z).requires_grad_()
  (z_q, indices, loss), parts = theirs(
    x, inv_temperature=0.5, return_loss_breakdown=True
  )
  (loss + (z_q * torch.from_numpy(weights)).sum()).backward()

  section = dict(
    name=name, bits=6, entropy_bits=6, entropy_gamma=0.7,
    entropy_temperature=2.0,
  )  # fmt: skip
  if groups > 1:
    section = dict(name='grouped', groups=groups, quantizer=section)
  ours = quantizers.build(section | dict(projection=True), 8, 'float32')
  params = dict(
    project_in=dense(theirs.project_in), project_out=dense(theirs.project_out)
  )
  losses = dict(commit=0.5, entropy=1.0)
  found = run(ours, dict(params=params), z, weights, losses)
  close(found[0], z_q)
  np.testing.assert_array_equal(found[1], indices)
  close(found[2]['commit'], parts.commitment)
  close(
    found[2]['entropy'], parts.per_sample_entropy - 0.7 * parts.batch_entropy
  )
  by_params, by_z = found[-1]
  close(by_z, x.grad)
  close(by_params['project_in']['kernel'].T, theirs.project_in.weight.grad)


def test_residual_signs():
  """Their entropies' temperature is in units of distances, ours in units of a
  stage's step."""
  theirs = peer.ResidualLFQ(
    dim=6, codebook_size=64, num_quantizers=3, diversity_gamma=0.7,
    entropy_loss_weight=1.0, commitment_loss_weight=0.5,
  )  # fmt: skip
  for stage, layer in enumerate(theirs.layers):
    layer.forward = functools.partial(
      layer.forward, inv_temperature=0.2 * 4**stage
    )
  z, weights = random(B, N, 6, std=0.7), random(B, N, 6, std=0.01)
  x = torch.from_numpy(z).requires_grad_()
  z_q, indices, loss = theirs(x)
  (loss.sum() / 3 + (z_q * torch.from_numpy(weights)).sum() / 3).backward()

  lfq = dict(name='lfq', bits=6, entropy_gamma=0.7, entropy_temperature=5.0)
  ours = quantizers.build(
    dict(name='residual', stages=3, projection=False, quantizer=lfq),
    6, 'float32',
  )  # fmt: skip
  found = run(ours, {}, z, weights, dict(commit=0.5, entropy=1.0))
  close(found[0], z_q)
  np.testing.assert_array_equal(found[1], indices)
  total = 0.5 * found[2]['commit'] + found[2]['entropy']
  close(3 * total, loss.sum())
  close(found[-1][1], x.grad)


def test_fsq_that_preserves_symmetry():
  levels = [8, 5, 2, 4]
  theirs = peer.FSQ(levels, preserve_symmetry=True)
  z, weights = random(B, N, 4, std=1.5), random(B, N, 4)
  z[0, 0] = 0  # a tie where the number of levels is even
  x = torch.from_numpy(z).requires_grad_()
  z_q, indices = theirs(x)
  (z_q * torch.from_numpy(weights)).sum().backward()

  ours = quantizers.build(
    dict(
      name='fsq', levels=levels, convention='cosmos', projection=False,
      preserve_symmetry=True,
    ),
    4, 'float32',
  )  # fmt: skip
  found = run(ours, {}, z, weights, {})
  close(found[0], z_q)
  np.testing.assert_array_equal(found[1], indices)
  close(found[-1][1], x.grad)
  every = np.arange(320)
  codes = ours.apply({}, jnp.asarray(every), method='indices_to_codes')
  close(codes, theirs.indices_to_codes(torch.from_numpy(every)))


@pytest.mark.slow
def test_training_beside_it_is_the_same(monkeypatch):
  """The two sides of `benchmarks/cifar.py`: FSQ draws nothing, so that what
  they train differs by rounding alone."""
  from benchmarks import cifar

  small = dict(width=32, depth=2, num_heads=2, mlp_dim=48)
  monkeypatch.setattr(cifar, 'VIT', cifar.VIT | small)
  images = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), np.uint8)
  options = argparse.Namespace(steps=12, batch=8, lr=1e-2)
  sides = [cls('fsq', images, options) for cls in (cifar.Ours, cifar.Theirs)]
  for side in sides:
    side.start(3)
  before = sides[0].reconstruct(images)[0]
  for side in sides:
    side.train(6)
  (a, i), (b, j) = (side.reconstruct(images) for side in sides)
  np.testing.assert_array_equal(i, j)
  np.testing.assert_allclose(a, b, atol=1e-4)
  assert np.abs(a - before).mean() > 0.02
