"""One train step: one forward, cotangents at the image, one pullback.

The forward gives the reconstruction and the latent losses. Image losses are
differentiated where they act, at the reconstruction; their weighted sum and
the latent terms' weights go back through the tokenizer once. Leaves that are
frozen are no argument of the pullback, so they cost no backward.

The codebook moves once, from the step's sums, after the parameters.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vqrae_jax import optim
from vqrae_jax.errors import UserError
from vqrae_jax.losses import IMAGE_TERMS, LATENT_TERMS
from vqrae_jax.ops import codes as code_ops
from vqrae_jax.ops import images as image_ops
from vqrae_jax.ops import trees
from vqrae_jax.train.state import Plan
from vqrae_jax.types import Frozen, LatentInputs, LossInputs, TrainState

Metrics = dict[str, jax.Array]


def loss_gradients(
  plan: Plan, state: TrainState, frozen: Frozen, images: jax.Array
) -> tuple[dict[str, jax.Array], Metrics, dict[str, jax.Array]]:
  """({leaf: gradient}, means over the images, the quantizer's summed stats).

  The means are "loss/NAME" and "mse", the clipped reconstruction's.
  """
  targets = image_ops.to_unit(images)
  weights = {n: w(state.step) for n, w in plan.weights.items()}
  latent_names = [n for n in weights if n in LATENT_TERMS]
  image_names = [n for n in weights if n in IMAGE_TERMS]
  rngs = {'quantizer': jax.random.fold_in(state.rng, state.step)}

  teacher = None
  if plan.teacher:
    variables = {'params': trees.unflatten(frozen.teacher)}
    teacher = plan.tokenizer.apply(variables, targets, method='encode')

  def forward(params):
    variables = {'params': trees.merge(params, frozen.params)}
    if state.codebook:
      variables['codebook'] = state.codebook
    out = plan.tokenizer.apply(variables, targets, train=True, rngs=rngs)
    seen = LatentInputs(out, teacher)
    latent = {name: LATENT_TERMS[name](seen) for name in latent_names}
    # Without an image loss nothing may pretend to reach the decoder.
    image = out.images if image_names else None
    return (image, latent), (out.images, out.quantizer.stats)

  (_, latent), pullback, (images_out, stats) = jax.vjp(
    forward, state.tokenizer.params, has_aux=True
  )
  values = dict(latent)
  cotangent = None
  for name in image_names:
    values[name], g = jax.value_and_grad(
      lambda image, term=IMAGE_TERMS[name]: term(LossInputs(image, targets))
    )(images_out)
    g = weights[name] * g
    cotangent = g if cotangent is None else cotangent + g
  sent = {n: jnp.asarray(weights[n], latent[n].dtype) for n in latent_names}
  (gradients,) = pullback((cotangent, sent))
  metrics = {f'loss/{name}': value for name, value in values.items()}
  clipped = jnp.clip(images_out, 0.0, 1.0)
  metrics['mse'] = jnp.mean((clipped - targets) ** 2)
  return gradients, metrics, stats


def accumulated(
  plan: Plan, state: TrainState, frozen: Frozen, images: jax.Array
) -> tuple[dict[str, jax.Array], Metrics, dict[str, jax.Array]]:
  """`loss_gradients` of a batch, computed in `plan.accumulate` parts.

  Part m holds rows m, m + A, …: each device keeps the rows it has. Parts are
  equally large, so that means of gradients and losses are those of the whole
  batch; stats are sums.
  """
  parts = plan.accumulate
  if parts == 1:
    return loss_gradients(plan, state, frozen, images)
  rows = images.reshape(-1, parts, *images.shape[1:])
  rows = jnp.moveaxis(rows, 1, 0)
  one = functools.partial(loss_gradients, plan, state, frozen)

  def add(total, images):
    return jax.tree.map(jnp.add, total, one(images)), None

  shapes = jax.eval_shape(one, rows[0])
  zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  (gradients, metrics, stats), _ = jax.lax.scan(add, zero, rows)
  gradients, metrics = jax.tree.map(lambda x: x / parts, (gradients, metrics))
  return gradients, metrics, stats


def train_step(
  plan: Plan, state: TrainState, frozen: Frozen, images: jax.Array
) -> tuple[TrainState, Metrics]:
  """One optimizer step.

  Args:
    plan: static.
    state: donated when jitted.
    frozen: the leaves that do not move.
    images: uint8 or f32 in [0, 1], [b h w 3], b over the mesh.

  Returns:
    The next state, and f32[] metrics: "loss/NAME" unweighted, "psnr" of the
    clipped batch, "grad_norm" before clipping, "usage" and "perplexity" over
    the window.
  """
  gradients, metrics, stats = accumulated(plan, state, frozen, images)
  metrics['psnr'] = -10 * jnp.log10(jnp.maximum(metrics.pop('mse'), 1e-10))
  player = state.tokenizer
  updates, opt_state = plan.optimizer.update(
    gradients, player.opt_state, player.params
  )
  params = optim.apply_updates(player.params, updates)
  ema = state.ema
  if plan.ema:
    # A short run's average must not remember the first random weights.
    t = state.step.astype(jnp.float32)
    decay = jnp.minimum(plan.ema, (1 + t) / (10 + t))
    ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)
  codebook, usage = state.codebook, state.usage
  if codebook and plan.moves_codebook:
    moved = plan.tokenizer.quantizer.update_codebook(
      codebook['quantizer'], stats
    )
    codebook = codebook | {'quantizer': moved}
  if 'counts' in stats:
    usage = usage.at[state.step % plan.usage_window].set(stats['counts'])
    window = usage.sum(0)
    metrics['usage'] = code_ops.usage(window).mean()
    metrics['perplexity'] = code_ops.perplexity(window).mean()
  metrics['grad_norm'] = optax.global_norm(gradients)
  state = state.replace(
    step=state.step + 1,
    tokenizer=player.replace(params=params, opt_state=opt_state),
    codebook=codebook,
    ema=ema,
    usage=usage,
  )
  return state, metrics


def _reached(fn: Callable, *args: Any) -> list[bool]:
  """Which outputs of fn depend on any input, by its program."""
  program = jax.make_jaxpr(fn)(*args).jaxpr
  live = set(program.invars)
  for eqn in program.eqns:
    if any(v in live for v in eqn.invars if not hasattr(v, 'val')):
      live.update(eqn.outvars)
  return [not hasattr(v, 'val') and v in live for v in program.outvars]


def check_reach(plan: Plan, state: Any, frozen: Any, images: Any) -> None:
  """Every trainable leaf must have a gradient from some loss.

  Args:
    plan: the run's.
    state, frozen, images: arrays or ShapeDtypeStructs; only shapes are read.

  Raises:
    UserError: with the names of the leaves that no loss moves.
  """

  def gradients(state, frozen, images):
    found = loss_gradients(plan, state, frozen, images)[0]
    return [found[name] for name in plan.trainable]

  reached = _reached(gradients, state, frozen, images)
  lost = [n for n, r in zip(plan.trainable, reached, strict=True) if not r]
  if lost:
    raise UserError(
      f'no loss moves {len(lost)} trainable leaves: {", ".join(lost[:4])}'
      f'{" …" if len(lost) > 4 else ""}; freeze them with a schedule of None, '
      'or add the loss that trains them'
    )
