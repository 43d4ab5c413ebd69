"""A linen network against a torch one whose arrays it takes by a table."""

import copy

import jax
import numpy as np
import pytest

from vqrae_jax.ops import trees
from vqrae_jax.weights.files import arrays
from vqrae_jax.weights.load import Pretrained

torch = pytest.importorskip('torch')


def close(have, want, tolerance=1e-5):
  """Equal to `tolerance` of the largest value."""
  have, want = np.asarray(have), np.asarray(want)
  assert have.shape == want.shape
  off = np.abs(have - want).max() / np.abs(want).max()
  assert off <= tolerance, f'{off:.2e}'


def ported(model, table, x, theirs):
  """The parameters of `model` that are the torch module's arrays."""
  target = jax.eval_shape(model.init, jax.random.key(0), x)['params']
  state = {k: v.numpy() for k, v in theirs.state_dict().items()}
  leaves = Pretrained(arrays('torch', state), table, target).load()
  return trees.unflatten(leaves)


def compare(model, table, theirs, side, tolerance=1e-5):
  """Every output, and the images' gradient of random sums of them.

  torch computes in f64: its own f32 would be a good part of the difference.
  """
  rng = np.random.default_rng(0)

  def draw(shape):
    return rng.normal(size=shape).astype(np.float32)

  x = draw((2, side, side + 8, 3))
  params = ported(model, table, x, theirs)
  image = torch.from_numpy(x).double().movedim(-1, 1).requires_grad_()
  want = copy.deepcopy(theirs).double()(image)
  want = want if isinstance(want, list) else [want]
  want = [w.movedim(1, -1) for w in want]
  sums = [draw(w.shape) for w in want]
  torch.autograd.backward(want, [torch.from_numpy(s).double() for s in sums])

  @jax.jit
  def both(params, x):
    have, pullback = jax.vjp(lambda x: model.apply({'params': params}, x), x)
    given = jax.tree.unflatten(jax.tree.structure(have), sums)
    return jax.tree.leaves(have), pullback(given)[0]

  have, gradient = both(params, x)
  for ours, torchs in zip(have, want, strict=True):
    close(ours, torchs.detach(), tolerance)
  close(gradient, image.grad.movedim(1, -1), tolerance)
