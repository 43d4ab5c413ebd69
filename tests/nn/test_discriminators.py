"""Discriminators against torch: values, gradients, spectral norm over steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.nn import torch_discriminators as references
from vqrae_jax.errors import UserError
from vqrae_jax.nn import discriminators, patchgan, spectral
from vqrae_jax.nn.dino import DINO_S8, DinoDiscriminator
from vqrae_jax.nn.patchgan import PatchGAN
from vqrae_jax.ops import trees
from vqrae_jax.pretrained import networks

torch = pytest.importorskip('torch')

PATCH = dict(hidden=8, halvings=2, groups=4, pool=3)
VIT = dataclasses.replace(
  DINO_S8, width=32, depth=3, mlp_dim=48, num_heads=4, patch_size=4, grid=(4, 4)
)
TAPS, KERNEL = (2, 0, 1, 2), 5


def images(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.random(shape), jnp.float32)


def off(found, want):
  want = np.asarray(want)
  return np.linalg.norm(np.asarray(found) - want) / np.linalg.norm(want)


def theirs(x):
  return torch.tensor(np.asarray(x)).double().permute(0, 3, 1, 2)


def torch_gradients(model, x, seed, scale=lambda x: x):
  """(logits, the seed's pullback at the images); parameters keep theirs."""
  x = theirs(x).requires_grad_()
  model.zero_grad()
  logits = model(scale(x))
  (logits * torch.tensor(seed).double()).sum().backward()
  return logits.detach(), x.grad.permute(0, 2, 3, 1)


def our_gradients(model):
  """jit of (params, other variables, images, seed) -> the same, and params'."""

  @jax.jit
  def found(params, rest, x, seed):
    with jax.default_matmul_precision('highest'):
      logits, pull = jax.vjp(
        lambda p, x: model.apply({'params': p} | rest, x), params, x
      )
      return logits, pull(seed)

  return found


def test_patchgan_equals_torch():
  torch.manual_seed(0)
  reference = references.PatchGAN(**PATCH)
  x = images(2, 18, 20, 3)
  seed = np.random.default_rng(1).normal(size=(2, 9)).astype(np.float32)
  want, dx = torch_gradients(reference, x, seed, lambda x: 2 * x - 1)
  params = trees.unflatten(reference.leaves())
  model = PatchGAN(**PATCH)
  logits, (dp, found) = our_gradients(model)(params, {}, x, seed)
  assert off(logits, want) < 1e-5
  assert off(found, dx) < 1e-5
  grads = {n: p.grad for n, p in reference.named_parameters()}
  kernel = grads['conv_in.weight'].permute(2, 3, 1, 0)
  assert off(dp['conv_in']['kernel'], kernel) < 1e-5
  assert off(dp['norm1']['scale'], grads['norms.1.weight']) < 1e-5
  # It can fail: pixels in [0, 1] are not what it wants.
  assert off(model.apply({'params': params}, x / 2 + 0.5), want) > 0.01
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  trees.check_same(shapes['params'], params, 'the reference')


@pytest.mark.parametrize(
  'name, logits, sizes',
  [
    ('patch', 256, dict(params=1_909_889)),
    # DINO ViT-S/8 without its final norm.
    (
      'dino',
      3920,
      dict(params=7_386_245, backbone=21_670_272 - 768, spectral=24_965),
    ),
  ],
)
def test_the_defaults(name, logits, sizes):
  model = discriminators.build(dict(name=name))
  init = functools.partial(model.init_with_output, jax.random.key(0))
  x = jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.float32)
  found, variables = jax.eval_shape(init, x)
  assert found.shape == (2, logits)
  have = {
    k: sum(x.size for x in jax.tree.leaves(v)) for k, v in variables.items()
  }
  assert have == sizes
  # 255 * 2 - 1 has no place in eight bits.
  with pytest.raises(UserError, match='type uint8; give floats'):
    jax.eval_shape(init, x.update(dtype=jnp.uint8))


def test_blurred_halving_keeps_a_constant_inside_and_any_size():
  for n in (7, 8):
    y = patchgan.halved(jnp.ones((1, n)), 1)
    assert y.shape == (1, 4)
    np.testing.assert_allclose(y[0, 1:3], 1, rtol=1e-6)


def dino(tmp_path, spec, taps, kernel):
  """(torch's, ours, its backbone out of a file, the file)."""
  torch.manual_seed(0)
  s = spec
  file = references.dino_file(
    s.width, s.depth, s.mlp_dim, s.patch_size, s.grid[0]
  )
  torch.save(file, tmp_path / 'dino.pth')
  model = DinoDiscriminator(spec, taps, kernel)
  reference = references.DinoDiscriminator(file, s.num_heads, taps, kernel)
  backbone = networks.load_backbone(model.backbone, tmp_path / 'dino.pth')
  return reference, model, backbone, file


def hold(reference, model, backbone, x, steps, values=1e-5, slopes=1e-5):
  """Ours equals torch's in training, step by step, and then in evaluation."""
  params, vectors = map(trees.unflatten, reference.leaves())
  n = len(model.taps) * model.vit.grid[0] * model.vit.grid[1]
  rng = np.random.default_rng(1)
  seed = rng.normal(size=(len(x), n)).astype(np.float32)
  run = our_gradients(model)
  advance = jax.jit(spectral.advance)
  for training in (*[True] * steps, False):
    reference.train(training)
    want, dx = torch_gradients(reference, x, seed)
    if training:
      vectors = advance(params, vectors)
    for name, leaf in reference.leaves()[1].items():
      assert off(trees.flatten(vectors)[name], leaf) < 1e-5, name
    rest = {'backbone': backbone, 'spectral': vectors}
    logits, (dp, found) = run(params, rest, x, seed)
    assert logits.shape == (len(x), n)
    assert off(logits, want) < values
    assert off(found, dx) < slopes
    for i, head in enumerate(reference.heads):
      for name in ('enter', 'mix', 'out'):
        kernel = getattr(head, name).weight_orig.grad.permute(2, 1, 0)
        assert off(dp[f'head{i}'][name]['kernel'], kernel) < slopes, name
  return params, vectors


def test_dino_equals_torch_over_three_steps(tmp_path):
  reference, model, backbone, file = dino(tmp_path, VIT, TAPS, KERNEL)
  x = images(2, 20, 18, 3)
  params, vectors = hold(reference, model, backbone, x, 3)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  have = dict(params=params, backbone=backbone, spectral=vectors)
  trees.check_same(dict(shapes), have, 'the reference')
  # Keys' biases of the file are not taken, the other two thirds are.
  attention = backbone['transformer']['blocks']['attention']
  bias = file['blocks.1.attn.qkv.bias'].numpy()
  assert not attention['key']['bias'].any()
  np.testing.assert_array_equal(attention['query']['bias'][1], bias[:32])
  np.testing.assert_array_equal(attention['value']['bias'][1], bias[64:])


@pytest.mark.slow
def test_dino_equals_torch_at_its_real_size(tmp_path):
  defaults = DinoDiscriminator()
  reference, model, backbone, file = dino(
    tmp_path, defaults.vit, defaults.taps, defaults.kernel
  )
  assert file['pos_embed'].shape == (1, 785, 384)
  # Of three million LeakyReLUs a few lie so near their kink that f32 and f64
  # fall to either side: torch's own f32 gradient at the images is 4.3e-3 off
  # its f64 one (values 1.6e-5), ours 4.9e-4 or, on another CPU, 3.2e-3, and
  # one of a kernel 7.3e-3.
  x = images(1, 256, 256, 3)
  hold(reference, model, backbone, x, 1, values=1e-4, slopes=1e-2)


def test_a_fresh_sigma_is_positive_and_advancing_finds_the_largest_gain():
  model = DinoDiscriminator(VIT, TAPS, KERNEL)
  made = jax.jit(model.init)(jax.random.key(3), images(1, 16, 16, 3))
  kernel = made['params']['head1']['mix']['kernel']
  vectors, gains = made['spectral'], []
  advance, sigma = jax.jit(spectral.advance), jax.jit(spectral.sigma)
  for _ in range(40):
    gains.append(float(sigma(kernel, **vectors['head1']['mix'])))
    vectors = advance(made['params'], vectors)
  top = np.linalg.norm(np.asarray(kernel).reshape(-1, VIT.width), 2)
  assert 0 < gains[0] <= gains[1] <= top * 1.00001
  assert abs(gains[-1] - top) < 1e-2 * top
  assert spectral.advance(made['params'], {}) == {}


def test_a_section_builds_or_says_what_is_wrong():
  made = discriminators.build(dict(name='dino', vit=dict(dtype='bfloat16')))
  assert made.vit == dataclasses.replace(DINO_S8, dtype='bfloat16')
  assert hash(made) == hash(DinoDiscriminator(made.vit))
  for section, words in (
    (dict(name='dion'), 'did you mean "dino"'),
    (dict(), 'there are: dino'),
    (dict(name='patch', halvings=0), 'halvings=0'),
    (dict(name='patch', dtype='half'), 'bfloat16'),
    (dict(name='dino', kernel=8), 'must be odd'),
    (dict(name='dino', vit=dict(widht=3)), 'did you mean "width"'),
    (dict(name='dino', vit=3), 'section of fields'),
  ):
    with pytest.raises(UserError, match=words):
      discriminators.build(section)


def test_a_file_that_is_not_dino_says_so(tmp_path):
  file = references.dino_file(32, 2, 48, 4, 4)
  torch.save(file, tmp_path / 'short.pth')
  backbone = DinoDiscriminator(VIT, TAPS, KERNEL).backbone
  with pytest.raises(UserError, match=r'missing in it: blocks\.2\..*S/8'):
    networks.load_backbone(backbone, tmp_path / 'short.pth')


@pytest.mark.parametrize('name', ('patch', 'dino'))
def test_bf16_and_remat_are_near_and_their_gradients_finite(name):
  if name == 'patch':
    model, half = PatchGAN(**PATCH), PatchGAN(**PATCH, dtype='bfloat16')
  else:
    spec = dataclasses.replace(VIT, dtype='bfloat16', remat=True)
    model, half = (DinoDiscriminator(s, TAPS, KERNEL) for s in (VIT, spec))
  x = images(2, 16, 16, 3)
  variables = jax.jit(model.init)(jax.random.key(0), x)

  @jax.jit
  def run(variables, x):
    found, pull = jax.vjp(lambda x: half.apply(variables, x), x)
    return model.apply(variables, x), found, pull(jnp.ones_like(found))[0]

  want, found, gradient = run(variables, x)
  assert found.dtype == jnp.float32
  assert off(found, want) < 5e-2
  assert np.isfinite(gradient).all() and np.any(gradient)
