"""Latents of several blocks, and the feature decoder that predicts them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vqrae_jax
from tests import tiny
from tests.encoders import references
from tests.train import pieces
from vqrae_jax.losses import LATENT_TERMS
from vqrae_jax.models.tokenizer import (
  build_tokenizer,
  describe,
  variable_shapes,
)
from vqrae_jax.ops import trees
from vqrae_jax.pretrained import encoders
from vqrae_jax.train import step as step_lib
from vqrae_jax.train.initialize import encoder_from
from vqrae_jax.types import LatentInputs

torch = pytest.importorskip('torch')
F = torch.nn.functional

SIZES = references.TINY | dict(depth=4)
# What IDEAL (arXiv 2606.11096) has: two depths, each with a norm of its own,
# cross-attention between them, both predicted from the codes.
IDEAL = dict(
  encoder=dict(
    vit=tiny.VIT | dict(depth=3),
    layers=(0, 2),
    fuse='attention',
    output_norm=('plain', 'affine'),
  ),
  feature_decoder=dict(vit=dict(depth=1), shallow=True),
)


@pytest.fixture(scope='module')
def published(tmp_path_factory):
  """kind -> (torch's model of four blocks, its folder)."""

  @functools.cache
  def make(kind):
    model, folder = (
      references.make(kind, **SIZES),
      tmp_path_factory.mktemp(kind),
    )
    model.save_pretrained(folder)
    return model, str(folder)

  return make


def blocks_of_torch(kind, model, images, norms):
  """{block: f32[b gh gw d]}: each block's patch tokens through its norm."""
  pixels = references.KINDS[kind].pixels
  mean, std = (torch.tensor(pixels[name]) for name in ('mean', 'std'))
  x = ((torch.tensor(images) / 255 - mean) / std).permute(0, 3, 1, 2)
  with torch.no_grad():
    hidden = model(x, output_hidden_states=True).hidden_states
    last = getattr(model, references.KINDS[kind].norm)
    applied = {
      'affine': last,
      'none': lambda x: x,
      'plain': lambda x: F.layer_norm(x, x.shape[-1:], eps=last.eps),
    }
    return [
      applied[norm](hidden[i + 1])[:, -16:].reshape(-1, 4, 4, 32)
      for i, norm in norms.items()
    ]


def attended(params, layers):
  """IDEAL's fusion by torch's own attention, from our leaves."""
  p = jax.tree.map(lambda x: torch.tensor(np.asarray(x)), params)
  *others, deep = (x.reshape(len(x), 16, 32) for x in layers)
  mha = torch.nn.MultiheadAttention(32, 8, batch_first=True)

  def norm(x, name):
    return F.layer_norm(x, (32,), p[name]['scale'], p[name]['bias'], eps=1e-6)

  def dense(x, leaves):
    return F.linear(x, leaves['kernel'].T, leaves['bias'])

  a = p['attention']
  names = ('query', 'key', 'value')
  mha.in_proj_weight.data = torch.cat([a[n]['kernel'].T for n in names])
  mha.in_proj_bias.data = torch.cat([a[n]['bias'] for n in names])
  mha.out_proj.weight.data = a['out']['kernel'].T.contiguous()
  mha.out_proj.bias.data = a['out']['bias']
  with torch.no_grad():
    keys = norm(torch.cat(others, 1), 'norm_keys')
    x = deep + mha(norm(deep, 'norm_queries'), keys, keys)[0]
    hidden = F.gelu(dense(norm(x, 'norm_mlp'), p['mlp']['fc1']))
    return (x + dense(hidden, p['mlp']['fc2'])).reshape(layers[0].shape)


FUSED = {
  'mean': lambda params, layers: torch.stack(layers).mean(0),
  'raev2': lambda params, layers: (
    torch.stack(layers).mean(0) + layers[-1].mean((1, 2), keepdim=True)
  ),
  'concat': lambda params, layers: torch.cat(layers, -1),
  'attention': attended,
}


@pytest.mark.parametrize(
  'kind, fused, layers, norms, fields',
  [
    ('siglip', 'mean', (0, 1, 2), 'plain', {}),
    ('dinov2-registers', 'raev2', (1, 3), 'affine', dict(add_final_mean=True)),
    ('siglip', 'concat', (0, 2), 'none', dict(fuse='concat')),
    (
      'dinov2-registers',
      'attention',
      (0, 1, 2),
      ('plain', 'none', 'affine'),
      dict(fuse='attention'),
    ),
  ],
)
def test_fusions_are_those_of_torch(
  kind, fused, layers, norms, fields, published
):
  """From the published file; blocks above the last one are not there."""
  model, folder = published(kind)
  section = encoders.find_encoder(folder).fields | fields
  section |= dict(layers=layers, output_norm=norms)
  tokenizer = build_tokenizer(tiny.model() | dict(encoder=section))
  rng, leaves = np.random.default_rng(0), encoder_from(tokenizer, folder).leaves
  read = leaves | {
    name: rng.normal(0.1, 0.2, leaf.shape).astype('f4')
    for name, leaf in variable_shapes(tokenizer).items()
    if name.startswith('params/fusion/')
  }
  variables = trees.unflatten({n: np.asarray(x) for n, x in read.items()})
  scale = variables['params']['encoder']['transformer']['blocks']['norm1']
  assert scale['scale'].shape == (layers[-1] + 1, 32)
  images = tiny.images(2)
  norms = norms if isinstance(norms, tuple) else (norms,) * len(layers)
  theirs = blocks_of_torch(
    kind, model, images, dict(zip(layers, norms, strict=True))
  )
  want = FUSED[fused](variables['params'].get('fusion'), theirs)
  with jax.default_matmul_precision('highest'):
    have = jax.jit(vqrae_jax.encode, static_argnums=0)(
      tokenizer, variables, images
    )
  assert have.shape[-1] == tokenizer.latent_dim == want.shape[-1]
  assert references.error(have, want.numpy()) <= 1e-5


def test_features_are_predicted_and_lose_what_they_should():
  """IDEAL's form: pixels come from the prediction of the deep block, and each
  prediction's loss is 1 - cosine and the squared distance."""
  tokenizer, variables = tiny.built(tiny.model('vq-ema') | IDEAL)
  assert build_tokenizer(describe(tokenizer)) == tokenizer
  images = tiny.images(2)

  @jax.jit
  def run(variables):
    args = tokenizer, variables
    indices = vqrae_jax.encode_to_indices(*args, images)
    return (
      vqrae_jax.reconstruct(*args, images, losses=True),
      vqrae_jax.decode_from_indices(*args, indices),
    )

  out, decoded = run(variables)
  np.testing.assert_array_equal(jnp.clip(out.images, 0, 1), decoded)
  assert out.layers.shape == (2, 4, 4, 2, 32) and out.latents.ndim == 4
  for name, layer in (('deep', -1), ('shallow', 0)):
    a = torch.tensor(np.asarray(out.predictions[name]))
    b = torch.tensor(np.asarray(out.layers[..., layer, :]))
    want = 1 - F.cosine_similarity(a, b, -1).mean() + F.mse_loss(a, b)
    have = LATENT_TERMS[f'features/{name}'](LatentInputs(out))
    np.testing.assert_allclose(have, want, rtol=1e-5)


def test_accumulation_keeps_what_the_frozen_encoder_gave():
  """The fusion moves, so that the sweep keeps blocks' outputs, not latents."""
  ends = []
  for count in (1, 2):
    plan = pieces.planned(
      'vq-ema',
      model=tiny.model('vq-ema') | IDEAL,
      accumulate=count,
      schedules=(('encoder/.*', None), ('.*', dict(lr=1e-3))),
      losses=dict(
        l2=1.0,
        commit=0.25,
        gan=dict(weight=0.5),
        features=dict(deep=1.0, shallow=dict(weight=0.5)),
      ),
      discriminator=pieces.PATCH,
    )
    state, frozen = pieces.started(plan, larger=pieces.CONTRAST)
    images = np.asarray(tiny.images(8), np.float32) / np.float32(255)
    accumulated = functools.partial(step_lib.accumulated, plan.spec)
    batch, _ = jax.jit(accumulated)(state, frozen, plan.hparams, images)
    ends.append((batch.gradients, batch.metrics))
  (one, want), (two, found) = ends
  assert any(name.startswith('fusion/') for name in one)
  assert want['loss/features/shallow'] > 0
  pieces.assert_close(two, one, 5e-5)
  pieces.assert_close(found, want, 5e-5)
