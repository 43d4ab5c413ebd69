"""How well latents predict labels: k nearest neighbours and a linear probe.

Both train on every other image of each class and are measured on the rest, so
they need no second set. The results compare tokenizers on the same set; they
are not ImageNet accuracies. Latents are means over an image's tokens.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

K, TEMPERATURE = 20, 0.07  # of the vote, as DINO's (arXiv 2104.14294)
DECAY, STEPS = 1e-3, 100
_ROWS = 256  # test images at once


def halves(labels: np.ndarray) -> np.ndarray:
  """bool[n]: the images to train on, every other one of each class."""
  order = np.argsort(labels, kind='stable')
  first = np.searchsorted(labels[order], labels[order])
  chosen = np.zeros(len(labels), bool)
  chosen[order] = (np.arange(len(labels)) - first) % 2 == 0
  return chosen


@functools.partial(jax.jit, static_argnums=(3, 4))
def _votes(train, labels, rows, k, classes):
  similar, nearest = jax.lax.top_k(
    jnp.matmul(rows, train.T, precision='highest'), k
  )
  weights = jnp.exp((similar - 1) / TEMPERATURE)
  onehot = jax.nn.one_hot(labels[nearest], classes)
  return jnp.einsum('nk,nkc->nc', weights, onehot).argmax(-1)


def knn(latents: np.ndarray, labels: np.ndarray) -> float:
  """Accuracy in [0, 1] of a vote of the 20 nearest by cosine, each of weight
  exp(cosine / .07).

  Args:
    latents: f32[n d].
    labels: i32[n] in [0, classes).
  """
  train, classes = halves(labels), int(labels.max()) + 1
  unit = latents / np.maximum(
    np.linalg.norm(latents, axis=-1, keepdims=True), 1e-12
  )
  known, rest = unit[train], unit[~train]
  k = min(K, len(known))
  found = [
    _votes(known, labels[train], rest[at : at + _ROWS], k, classes)
    for at in range(0, len(rest), _ROWS)
  ]
  return float(np.mean(np.concatenate(found) == labels[~train]))


@functools.partial(jax.jit, static_argnums=2)
def _fit(x, labels, classes):
  import optax

  def loss(weights):
    logits = jnp.matmul(x, weights['w'], precision='highest') + weights['b']
    terms = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return terms.mean() + DECAY / 2 * (weights['w'] ** 2).sum()

  solver = optax.lbfgs()
  value_and_grad = optax.value_and_grad_from_state(loss)

  def step(carry, _):
    weights, state = carry
    value, grad = value_and_grad(weights, state=state)
    updates, state = solver.update(
      grad, state, weights, value=value, grad=grad, value_fn=loss
    )
    return (optax.apply_updates(weights, updates), state), None

  weights = dict(w=jnp.zeros((x.shape[1], classes)), b=jnp.zeros(classes))
  carry = weights, solver.init(weights)
  return jax.lax.scan(step, carry, length=STEPS)[0][0]


def linear(latents: np.ndarray, labels: np.ndarray) -> float:
  """Accuracy in [0, 1] of a logistic regression on standardised latents, its
  mean cross-entropy + .001 / 2 |w|^2 minimised by 100 steps of L-BFGS.

  Args:
    latents: f32[n d].
    labels: i32[n] in [0, classes).
  """
  train = halves(labels)
  mean, std = latents[train].mean(0), latents[train].std(0)
  x = (latents - mean) / np.where(std > 1e-12, std, 1)
  weights = _fit(x[train], labels[train], int(labels.max()) + 1)
  logits = x[~train] @ np.asarray(weights['w']) + np.asarray(weights['b'])
  return float((logits.argmax(-1) == labels[~train]).mean())
