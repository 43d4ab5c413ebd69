"""One train step: one forward, cotangents at the image, one pullback.

The forward gives the reconstruction and the latent losses. Image losses are
differentiated where they act, at the reconstruction; their weighted sum and
the latent terms' weights go back through the tokenizer once. Leaves that are
frozen are no argument of the pullback, so they cost no backward.

The codebook moves once, from the step's sums, after the parameters.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vqrae_jax import optim
from vqrae_jax.errors import UserError
from vqrae_jax.losses import (
  FROZEN_TERMS,
  IMAGE_TERMS,
  LATENT_TERMS,
  adversarial,
)
from vqrae_jax.ops import augment, trees
from vqrae_jax.ops import codes as code_ops
from vqrae_jax.ops import images as image_ops
from vqrae_jax.train.state import Plan
from vqrae_jax.types import (
  Frozen,
  LatentInputs,
  LossInputs,
  MicrobatchResult,
  TrainState,
)

# ----------------------------------------------------------------------------
# Steps whose losses or gradients are no number: left out, then a stop.
#
# In the step, `skip_if_nonfinite` keeps the state as it was, to the last bit: what
# one bad batch or one overflow in bf16 would spoil is not only the weights but
# averages, codebooks and both optimizers. On the host such steps are counted; so
# many in a row are no accident, and the run stops with the step and its losses.

# What a step is judged by: losses and the norms of every player.
_NORMS = ('grad_norm', 'update_norm')
_COUNTS = ('skipped', 'nonfinite')


class NonFinite(UserError):
  """Losses or gradients that are no number; the run stops."""


def _judged(name: str) -> bool:
  return name.startswith('loss/') or name.rsplit('/', 1)[-1] in _NORMS


def skip_if_nonfinite(
  before: Any, after: Any, metrics: Mapping[str, jax.Array]
) -> tuple[Any, jax.Array]:
  """(`after` if every judged metric is finite, else `before`; f32[] 1 if it
  was `before`, else 0).

  Args:
    before, after: states of equal structure.
    metrics: f32[] by name, of the step between the two.
  """
  judged = [x for name, x in metrics.items() if _judged(name)]
  sound = jnp.isfinite(jnp.stack(judged)).all()

  def chosen(old, new):
    return new if new is old else jnp.where(sound, new, old)

  spoilt = 1.0 - sound.astype(jnp.float32)
  return jax.tree.map(chosen, before, after), spoilt


def problem(step: int, metrics: Mapping[str, float]) -> str:
  """What of a step's figures is no number, in words; '' if all are."""
  bad = sorted(
    k for k, v in metrics.items() if _judged(k) and not np.isfinite(v)
  )
  if not bad:
    return ''
  values = ', '.join(
    f'{k}={v:.4g}' for k, v in sorted(metrics.items()) if k not in _COUNTS
  )
  return f'{", ".join(bad)} not finite at step {step} ({values})'


def check_finite(step: int, metrics: Mapping[str, float]) -> None:
  """Raises `NonFinite` that names the step and the losses."""
  if words := problem(step, metrics):
    raise NonFinite(f'{words}; {REMEDY}')


REMEDY = 'lower the learning rate, lengthen the warm-up, or compute in float32'


Metrics = dict[str, jax.Array]
_IMAGE = IMAGE_TERMS | FROZEN_TERMS
_NOISE = 104  # apart from the adversary's draws of the same step


def _cotangents(
  plan: Plan,
  state: TrainState,
  frozen: Frozen,
  targets: jax.Array,
  recon: jax.Array,
  rows: jax.Array,
) -> tuple[Metrics, jax.Array | None, jax.Array | None]:
  """({loss: value}, the weighted image losses' cotangent at the
  reconstruction, the adversarial one's, neither weighted nor balanced)."""
  values, image, gan = {}, None, None
  for name in plan.image_terms:
    values[name], g = jax.value_and_grad(
      lambda x, term=_IMAGE[name]: term(LossInputs(x, targets, frozen.losses))
    )(recon)
    g = plan.weights[name](state.step) * g
    image = g if image is None else image + g
  if plan.adversary is not None:
    values['gan'], gan = plan.adversary.generator(state, frozen, recon, rows)
  return values, image, gan


def _noise(plan: Plan, state: TrainState, targets: jax.Array, rows: jax.Array):
  """f32[b gh gw d] that training adds to the latents of these rows, or None."""
  if not plan.noise_tau:
    return None
  key = jax.random.fold_in(jax.random.fold_in(state.rng, state.step), _NOISE)
  tokenizer = plan.tokenizer
  shape = (*tokenizer.grid(*targets.shape[1:3]), tokenizer.latent_dim)
  return plan.noise_tau * augment.draw_noise(key, rows, shape)


def _forward(
  plan: Plan,
  state: TrainState,
  frozen: Frozen,
  targets: jax.Array,
  rows: jax.Array,
):
  """params -> ((image or None, latent losses), (image, stats, features))."""
  rngs = {'quantizer': jax.random.fold_in(state.rng, state.step)}
  added = _noise(plan, state, targets, rows)
  teacher = None
  if plan.teacher:
    variables = {'params': frozen.teacher}
    teacher = plan.tokenizer.apply(variables, targets, method='encode')
  painted = plan.image_terms or plan.adversary is not None

  def forward(params):
    variables = {'params': trees.merge(params, frozen.params)}
    if state.codebook:
      variables['codebook'] = state.codebook
    out = plan.tokenizer.apply(
      variables, targets, train=True, rngs=rngs, noise=added
    )
    seen = LatentInputs(out, teacher)
    latent = {name: LATENT_TERMS[name](seen) for name in plan.latent_terms}
    # Without an image loss nothing may pretend to reach the decoder.
    image = out.images if painted else None
    return (image, latent), (out.images, out.quantizer.stats, out.features)

  return forward


def loss_gradients(
  plan: Plan,
  state: TrainState,
  frozen: Frozen,
  images: jax.Array,
  rows: jax.Array | None = None,
  balance: jax.Array | None = None,
) -> MicrobatchResult:
  """One forward, the losses at the image, one pullback.

  Args:
    plan, state, frozen: the step's.
    images: as in `train_step`, or a part of them.
    rows: i32[b], each image's row in the step's batch; all of it if None.
    balance: the adversarial loss's, over the whole batch; that of `images` if
      None.
  """
  targets = image_ops.to_unit(images)
  rows = jnp.arange(len(images)) if rows is None else rows
  forward = _forward(plan, state, frozen, targets, rows)
  (_, latent), pullback, (recon, stats, features) = jax.vjp(
    forward, state.tokenizer.params, has_aux=True
  )
  values, cotangent, gan = _cotangents(
    plan, state, frozen, targets, recon, rows
  )
  metrics = {f'loss/{name}': x for name, x in (latent | values).items()}
  fakes = None
  if gan is not None:
    adversary = plan.adversary
    if balance is None:
      balance = _balance(plan, cotangent, gan, features)
    metrics['gan_balance'] = balance
    gan = adversary.weight(state.step) * balance * gan
    cotangent = gan if cotangent is None else cotangent + gan
    fakes = adversarial.to_8_bits(recon)
  sent = {
    n: jnp.asarray(plan.weights[n](state.step), x.dtype)
    for n, x in latent.items()
  }
  (gradients,) = pullback((cotangent, sent))
  clipped = jnp.clip(recon, 0.0, 1.0)
  metrics['mse'] = jnp.mean((clipped - targets) ** 2)
  return MicrobatchResult(gradients, metrics, stats, fakes)


def _balance(plan, image, gan, features):
  adversary = plan.adversary
  if not adversary.adaptive:
    return jnp.ones([])
  return adversary.balance(
    adversary.head_grad(image, features), adversary.head_grad(gan, features)
  )


def _whole_balance(plan, state, frozen, images, rows):
  """The balance over all parts, by a sweep of forwards before the gradients.

  Args:
    images: [parts b h w 3].
    rows: i32[parts b].
  """
  adversary = plan.adversary

  def one(part):
    images, rows = part
    targets = image_ops.to_unit(images)
    forward = _forward(plan, state, frozen, targets, rows)
    _, (recon, _, features) = forward(state.tokenizer.params)
    _, image, gan = _cotangents(plan, state, frozen, targets, recon, rows)
    return adversary.head_grad(image, features), adversary.head_grad(
      gan, features
    )

  def add(total, part):
    return jax.tree.map(jnp.add, total, one(part)), None

  first = jax.tree.map(lambda x: x[0], (images, rows))
  zero = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, first)
  )
  # Of equal parts' means the factor 1 / parts cancels in the ratio but for
  # the eps beside it.
  sums, _ = jax.lax.scan(add, zero, (images, rows))
  return adversary.balance(*jax.tree.map(lambda x: x / len(images), sums))


def accumulated(
  plan: Plan, state: TrainState, frozen: Frozen, images: jax.Array
) -> tuple[MicrobatchResult, tuple[jax.Array, ...] | None]:
  """`loss_gradients` of a batch, computed in `plan.accumulate` parts.

  Part m holds rows m, m + A, …: each device keeps the rows it has. Parts are
  equally large, so that means of gradients and losses are those of the whole
  batch; stats are sums. With an adaptive adversarial loss a sweep of forwards
  comes first: its balance is that of the whole batch.

  Returns:
    The whole, and what the discriminator learns on if there is one: images
    [parts b h w 3], reconstructions of the same shape, rows i32[parts b].
  """
  parts = plan.accumulate

  def split(x):
    return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)

  rows = jnp.arange(len(images))
  if parts == 1:
    part = loss_gradients(plan, state, frozen, images, rows)
    if part.fakes is None:
      return part, None
    lot = (images[None], part.fakes[None], rows[None])
    return part.replace(fakes=None), lot
  images, rows = split(images), split(rows)
  balance = None
  if plan.adversary is not None and plan.adversary.adaptive:
    balance = _whole_balance(plan, state, frozen, images, rows)

  def one(part):
    return loss_gradients(plan, state, frozen, *part, balance)

  def add(total, part):
    found = one(part)
    whole = found.replace(fakes=None)
    return jax.tree.map(jnp.add, total, whole), found.fakes

  first = jax.tree.map(lambda x: x[0], (images, rows))
  shapes = jax.eval_shape(one, first).replace(fakes=None)
  zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  whole, fakes = jax.lax.scan(add, zero, (images, rows))
  gradients, metrics = jax.tree.map(
    lambda x: x / parts, (whole.gradients, whole.metrics)
  )
  whole = whole.replace(gradients=gradients, metrics=metrics)
  return whole, None if fakes is None else (images, fakes, rows)


def train_step(
  plan: Plan, state: TrainState, frozen: Frozen, images: jax.Array
) -> tuple[TrainState, Metrics]:
  """One optimizer step of every player.

  Args:
    plan: static.
    state: donated when jitted.
    frozen: the leaves that do not move.
    images: uint8 or f32 in [0, 1], [b h w 3], b over the mesh.

  Returns:
    The next state, and f32[] metrics: "loss/NAME" unweighted, "psnr" of the
    clipped batch, "grad_norm" of what moves, before clipping, and
    "update_norm", "usage" and "perplexity" over the window; with a
    discriminator "gan_balance", "logits/real", "logits/fake", its own norms and
    rate. "nonfinite" is 1 where a
    loss or a norm is no number: then all of the state but `step` is as it was.
  """
  whole, lot = accumulated(plan, state, frozen, images)
  gradients, metrics, stats = whole.gradients, dict(whole.metrics), whole.stats
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
    # Where both are equal every bit stays, that of -0.0 too.
    ema = jax.tree.map(
      lambda e, p: jnp.where(e == p, e, e + (1 - decay) * (p - e)), ema, params
    )
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
  moving = optim.mask_frozen_layers(gradients, plan.schedules)
  metrics['grad_norm'] = optax.global_norm(moving)
  metrics['update_norm'] = optax.global_norm(updates)
  discriminator = state.discriminator
  if lot is not None:
    discriminator, said = plan.adversary.step(state, frozen, *lot)
    metrics |= said
  moved = state.replace(
    tokenizer=player.replace(params=params, opt_state=opt_state),
    codebook=codebook,
    discriminator=discriminator,
    ema=ema,
    usage=usage,
  )
  moved, metrics['nonfinite'] = skip_if_nonfinite(state, moved, metrics)
  return moved.replace(step=state.step + 1), metrics


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
    found = loss_gradients(plan, state, frozen, images).gradients
    return [found[name] for name in plan.trainable]

  reached = _reached(gradients, state, frozen, images)
  lost = [n for n, r in zip(plan.trainable, reached, strict=True) if not r]
  if lost:
    raise UserError(
      f'no loss moves {len(lost)} trainable leaves: {", ".join(lost[:4])}'
      f'{" …" if len(lost) > 4 else ""}; freeze them with a schedule of None, '
      'or add the loss that trains them'
    )
