"""Discriminators against torch: values, gradients, spectral norm over steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.encoders.references import error
from tests.nn import torch_discriminators as references
from vqrae_jax.errors import UserError
from vqrae_jax.nn import discriminators, spectral
from vqrae_jax.nn.dino import DINO_S8, Backbone, DinoDiscriminator
from vqrae_jax.nn.patchgan import PatchGAN
from vqrae_jax.nn.vgg import VGG16
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


def torch_gradients(model, x, seed, scale=lambda x: x):
  """(logits, (the seed's pullback at every leaf, and at the images))."""
  x = torch.tensor(np.asarray(x)).double().permute(0, 3, 1, 2).requires_grad_()
  model.zero_grad()
  logits = model(scale(x))
  (logits * torch.tensor(seed).double()).sum().backward()
  slopes = ((name, p.grad) for name, p in model.named_parameters())
  slopes = references.leaves(slopes)
  return logits.detach(), (slopes, x.grad.permute(0, 2, 3, 1))


def our_gradients(model):
  """jit of (params, other variables, images, seed) -> the same."""

  @jax.jit
  def found(params, rest, x, seed):
    with jax.default_matmul_precision('highest'):
      logits, pull = jax.vjp(
        lambda p, x: model.apply({'params': p} | rest, x), params, x
      )
      slopes, dx = pull(seed)
      return logits, (trees.flatten(slopes), dx)

  return found


def test_patchgan_equals_torch():
  torch.manual_seed(0)
  reference = references.PatchGAN(**PATCH)
  x = images(2, 18, 20, 3)  # odd when halved
  seed = np.random.default_rng(1).normal(size=(2, 9)).astype(np.float32)
  want, (slopes, dx) = torch_gradients(reference, x, seed, lambda x: 2 * x - 1)
  params = trees.unflatten(reference.leaves())
  model = PatchGAN(**PATCH)
  logits, (dp, found) = our_gradients(model)(params, {}, x, seed)
  assert error(logits, want) < 1e-5
  assert error(found, dx) < 1e-5
  for name, slope in slopes.items():
    assert error(dp[name], slope) < 1e-5, name
  # It can fail: pixels in [0, 1] are not what it wants.
  assert error(model.apply({'params': params}, x / 2 + 0.5), want) > 0.01


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


def hold(model, folder, x, steps, values=1e-5, slopes=1e-5):
  """Ours equals torch's in training, step by step, and then in evaluation."""
  torch.manual_seed(0)
  vit = references.dino(model.vit)
  torch.save(references.dino_file(vit), folder / 'dino.pth')
  backbone = networks.load_backbone(model.backbone, folder / 'dino.pth')
  reference = references.DinoDiscriminator(vit, model.taps, model.kernel)
  params, vectors = map(trees.unflatten, reference.leaves())
  n = len(model.taps) * model.vit.grid[0] * model.vit.grid[1]
  rng = np.random.default_rng(1)
  seed = rng.normal(size=(len(x), n)).astype(np.float32)
  run = our_gradients(model)
  advance = jax.jit(spectral.advance)
  for training in (*[True] * steps, False):
    reference.train(training)
    want, (gradients, dx) = torch_gradients(reference, x, seed)
    if training:
      vectors = trees.unflatten(advance(*map(trees.flatten, (params, vectors))))
    for name, leaf in reference.leaves()[1].items():
      assert error(trees.flatten(vectors)[name], leaf) < 1e-5, name
    rest = {'backbone': backbone, 'spectral': vectors}
    logits, (dp, found) = run(params, rest, x, seed)
    assert error(logits, want) < values
    assert error(found, dx) < slopes
    for name, gradient in gradients.items():
      if name.endswith('kernel'):
        assert error(dp[name], gradient) < slopes, name


def test_dino_knows_where_its_patches_are():
  """With "rope2d" too: columns that change places change what is read."""
  model = Backbone(dataclasses.replace(VIT, posemb='rope2d'), (2,))
  x = images(1, 16, 16, 3)
  other = jnp.concatenate([x[:, :, 8:], x[:, :, :8]], axis=2)
  run = jax.jit(model.init_with_output)
  found, moved = (run(jax.random.key(0), y)[0][0, 0] for y in (x, other))
  moved = jnp.roll(moved.reshape(4, 4, -1), 2, axis=1).reshape(found.shape)
  assert error(moved, found) > 1e-3


def test_dino_equals_torch_over_three_steps(tmp_path):
  hold(DinoDiscriminator(VIT, TAPS, KERNEL), tmp_path, images(2, 20, 18, 3), 3)


@pytest.mark.slow
def test_dino_equals_torch_at_its_real_size(tmp_path):
  # Of three million LeakyReLUs a few lie so near their kink that f32 and f64
  # fall to either side: torch's own f32 gradient at the images is 4.3e-3 off
  # its f64 one (values 1.6e-5), ours 4.9e-4 or, on another CPU, 3.2e-3, and
  # one of a kernel 7.3e-3.
  x = images(1, 256, 256, 3)
  hold(DinoDiscriminator(), tmp_path, x, 1, values=1e-4, slopes=1e-2)


def test_a_fresh_sigma_is_positive_and_no_more_than_the_largest_gain():
  model = DinoDiscriminator(VIT, TAPS, KERNEL)
  made = jax.jit(model.init)(jax.random.key(3), images(1, 16, 16, 3))
  kernel = made['params']['head1']['mix']['kernel']
  sigma = spectral.sigma(kernel, **made['spectral']['head1']['mix'])
  top = np.linalg.norm(kernel.reshape(-1, VIT.width), 2)
  assert 0 < sigma <= top * 1.00001


def test_a_section_builds_or_says_what_is_wrong():
  made = discriminators.build(dict(name='dino', vit=dict(dtype='bfloat16')))
  assert made.vit == dataclasses.replace(DINO_S8, dtype='bfloat16')
  assert hash(made) == hash(DinoDiscriminator(made.vit))
  for section, words in (
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
  short = references.dino(dataclasses.replace(VIT, depth=2))
  torch.save(references.dino_file(short), tmp_path / 'short.pth')
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
  variables = tiny.drawn(model, x)

  @jax.jit
  def run(variables, x):
    found, pull = jax.vjp(lambda x: half.apply(variables, x), x)
    return model.apply(variables, x), found, pull(jnp.ones_like(found))[0]

  want, found, gradient = run(variables, x)
  assert found.dtype == jnp.float32
  assert error(found, want) < 5e-2
  assert np.isfinite(gradient).all() and np.any(gradient)


@pytest.mark.parametrize(
  'model',
  [DinoDiscriminator(VIT, TAPS, KERNEL), VGG16((4, 4, 8, 8, 8))],
  ids=['dino', 'vgg'],
)
def test_convolutions_of_one_shape_run_together_on_a_tpu(model, monkeypatch):
  """To the outputs and the gradients of those one by one."""
  x = images(2, 48, 48, 3)
  variables = tiny.drawn(model, x)

  def found(platform):
    def dependent(*args, default, **branches):
      return branches.get(platform, default)(*args)

    monkeypatch.setattr(jax.lax, 'platform_dependent', dependent)

    @jax.jit
    def both(variables, x):
      def outputs(variables, x):
        return jax.tree.leaves(model.apply(variables, x))

      out, pull = jax.vjp(outputs, variables, x)
      return out, pull([2 * y for y in out])

    return both(variables, x)

  together, one_by_one = (jax.tree.leaves(found(p)) for p in ('tpu', 'cpu'))
  assert len(together) == len(one_by_one)
  largest = max(np.abs(b).max() for b in one_by_one)
  for a, b in zip(together, one_by_one, strict=True):
    # The bias before an instance norm has no gradient but for rounding.
    near = 1e-5 * np.abs(b).max() + 1e-6 * largest
    np.testing.assert_allclose(a, b, rtol=0, atol=near)
