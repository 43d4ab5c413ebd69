"""One train step: one forward pass, cotangents at the image, one pullback.

The forward pass returns the reconstruction and the latent losses. Image losses
are differentiated at the reconstruction, where they act; the cotangent of their
weighted sum and the latent losses' weights are pulled back through the
tokenizer once. Frozen leaves are not an argument of the pullback, so they cost
no backward pass.

The codebook is updated once, from the step's sums, after the parameters. A step
with a non-finite loss or gradient norm is skipped: the state stays bitwise
unchanged except for the step counter.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vqrae_jax.errors import UserError
from vqrae_jax.losses import adversarial
from vqrae_jax.ops import augment, trees
from vqrae_jax.ops import codes as code_ops
from vqrae_jax.ops import images as image_ops
from vqrae_jax.optim import Numbers, learning_rate, loss_weight
from vqrae_jax.train.gan import over_microbatches
from vqrae_jax.train.state import StepSpec
from vqrae_jax.types import (
  AtImage,
  Frozen,
  LatentInputs,
  LossInputs,
  MicrobatchResult,
  TokenizerOutput,
  TrainState,
)

Metrics = dict[str, jax.Array]
# Apart from each other and from the discriminator's draws of the same step.
_NOISE, _QUANTIZER = 104, 105


def _reconstruct(
  spec: StepSpec,
  state: TrainState,
  frozen: Frozen,
  hparams: Numbers,
  params: Any,
  images: jax.Array,
  sample_ids: jax.Array,
  encoded: jax.Array | None = None,
) -> TokenizerOutput:
  """The tokenizer's forward with the trainable leaves `params`."""
  noise = random = None
  key = jax.random.fold_in(state.rng, state.step)
  if spec.noise:
    grid = spec.tokenizer.grid(*images.shape[1:3])
    noise = hparams['noise_tau'] * augment.draw_noise(
      jax.random.fold_in(key, _NOISE),
      sample_ids,
      (*grid, spec.tokenizer.latent_dim),
    )
  if spec.tokenizer.quantizer.draws:
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    random = {'samples': fold(jax.random.fold_in(key, _QUANTIZER), sample_ids)}
    if spec.temperature is not None:
      random['temperature'] = learning_rate(
        spec.temperature, hparams['temperature'], state.step
      )
  variables = {'params': trees.merge(params, frozen.params)}
  if state.codebook:
    variables['codebook'] = state.codebook
  return spec.tokenizer.apply(
    variables,
    images,
    train=True,
    random=random,
    losses=[*spec.latent_losses],
    noise=noise,
    encoded=encoded,
  )


def _scalar(name: str, value: Any) -> jax.Array:
  """The value of a loss, checked: one of another package may give anything."""
  what = type(value).__name__
  if isinstance(value, (jax.Array, np.ndarray, np.generic, float)):
    value = jnp.asarray(value)
    what = f'{value.dtype}{list(value.shape)}'
  if what != 'float32[]':
    raise UserError(
      f'losses.{name} returns {what}; it must return a scalar, float32[]'
    )
  return value


def _at_image(
  spec: StepSpec,
  state: TrainState,
  frozen: Frozen,
  hparams: Numbers,
  images: jax.Array,
  sample_ids: jax.Array,
  out: TokenizerOutput,
) -> AtImage:
  """The image losses of one forward and their cotangents."""
  recon = out.images
  values, image, gan, fakes = {}, None, None, None
  for name, term in spec.image_losses.items():

    def value_of(x, name=name, term=term):
      inputs = LossInputs(x, images, frozen.losses, spec.networks_run)
      return _scalar(name, term(inputs))

    values[name], g = jax.value_and_grad(value_of)(recon)
    g = loss_weight(hparams['losses'][name], state.step) * g
    image = g if image is None else image + g
  if spec.gan is not None:
    values['gan'], gan = spec.gan.generator_loss(
      state, frozen, hparams, recon, sample_ids
    )
    fakes = adversarial.to_8_bits(recon)
  metrics = {f'loss/{name}': x for name, x in values.items()}
  metrics['mse'] = jnp.mean((jnp.clip(recon, 0.0, 1.0) - images) ** 2)
  encoded = None if spec.trains_encoder else out.encoded
  return AtImage(metrics, image, gan, fakes, encoded)


def loss_gradients(
  spec: StepSpec,
  state: TrainState,
  frozen: Frozen,
  hparams: Numbers,
  images: jax.Array,
  sample_ids: jax.Array,
  at: AtImage | None = None,
  adaptive_weight: jax.Array | None = None,
) -> MicrobatchResult:
  """One forward, the losses at the image, one pullback.

  Args:
    spec, state, frozen, hparams: the step's.
    images: f32 [b h w 3] in [0, 1], a batch or a microbatch.
    sample_ids: i32[b], each image's place in the step's batch.
    at: the image losses of an earlier forward of these images.
    adaptive_weight: of the adversarial loss, over the whole batch; that of
      `images` if None.
  """
  step = spec, state, frozen, hparams
  encoded, teacher = at and at.encoded, None
  if spec.teacher:
    variables = {'params': frozen.teacher}
    teacher = spec.tokenizer.apply(variables, images, method='read')

  def forward(params):
    out = _reconstruct(*step, params, images, sample_ids, encoded)
    inputs = LatentInputs(out, teacher)
    losses = {
      name: _scalar(name, term(inputs))
      for name, term in spec.latent_losses.items()
    }
    # Without an image loss nothing may pretend to reach the decoder.
    image = out.images if spec.image_losses or spec.gan is not None else None
    return (image, losses), out

  (_, losses), pullback, out = jax.vjp(
    forward, state.tokenizer.params, has_aux=True
  )
  if at is None:
    at = _at_image(*step, images, sample_ids, out)
  metrics = {f'loss/{name}': x for name, x in losses.items()} | at.metrics
  cotangent = at.image
  if spec.gan is not None:
    if adaptive_weight is None:
      adaptive_weight = spec.gan.adaptive_weight(
        *spec.gan.head_grads(at.image, at.gan, out.features)
      )
    metrics['adaptive_weight'] = adaptive_weight
    weight = loss_weight(hparams['losses']['gan'], state.step)
    gan = weight * adaptive_weight * at.gan
    cotangent = gan if cotangent is None else cotangent + gan
  weights = {
    name: loss_weight(hparams['losses'][name], state.step) for name in losses
  }
  (gradients,) = pullback((cotangent, weights))
  q = out.quantizer
  return MicrobatchResult(gradients, metrics, q.stats, q.tokens, at.fakes)


def accumulated(
  spec: StepSpec,
  state: TrainState,
  frozen: Frozen,
  hparams: Numbers,
  images: jax.Array,
) -> tuple[MicrobatchResult, tuple[jax.Array, jax.Array]]:
  """`loss_gradients` of a batch, computed in `spec.accumulate` microbatches.

  Microbatch m holds samples m, m + A, …: each device keeps the rows it has.
  All have the same size, so that the means of gradients and losses equal those
  of the full batch (but for entropies of the tokens' mean, which are of a
  microbatch); stats are sums. With an adaptive adversarial loss, forward
  passes over all microbatches come first, to compute the full batch's adaptive
  weight. They keep each image's cotangents and the output of a frozen encoder,
  so that the second pass repeats neither the losses nor that encoder.

  Returns:
    The result of the batch, `fakes` [A b h w 3] if there is a discriminator;
    and its images [A b h w 3] and sample ids i32[A b].
  """
  step = spec, state, frozen, hparams

  def split(x):
    return jnp.moveaxis(x.reshape(-1, spec.accumulate, *x.shape[1:]), 1, 0)

  microbatches = split(images), split(jnp.arange(len(images)))
  kept = adaptive_weight = None
  if spec.gan is not None and spec.gan.adaptive and spec.accumulate > 1:

    def sweep(images, sample_ids):
      out = _reconstruct(*step, state.tokenizer.params, images, sample_ids)
      at = _at_image(*step, images, sample_ids, out)
      return spec.gan.head_grads(at.image, at.gan, out.features), (), at

    means, _, kept = over_microbatches(sweep, microbatches)
    adaptive_weight = spec.gan.adaptive_weight(*means)

  def gradients(images, sample_ids, at):
    part = loss_gradients(*step, images, sample_ids, at, adaptive_weight)
    kept = part.tokens, part.fakes
    return (part.gradients, part.metrics), part.stats, kept

  (means, metrics), stats, (tokens, fakes) = over_microbatches(
    gradients, (*microbatches, kept)
  )
  if tokens is not None:  # in the order of samples again
    tokens = jnp.moveaxis(tokens, 0, 1)
    tokens = tokens.reshape(len(images), *tokens.shape[2:])
  return MicrobatchResult(means, metrics, stats, tokens, fakes), microbatches


def train_step(
  spec: StepSpec,
  state: TrainState,
  frozen: Frozen,
  hparams: Numbers,
  images: jax.Array,
) -> tuple[TrainState, Metrics]:
  """One optimizer step of the tokenizer and of its discriminator.

  Args:
    spec: static.
    state: donated when jitted.
    frozen: the leaves that do not move.
    hparams: f32[] each: rates, loss weights, starts (`setup.f32`).
    images: uint8 or f32 in [0, 1], [b h w 3], b over the mesh.

  Returns:
    The next state, and f32[] metrics: "loss/NAME" unweighted, "psnr" of the
    clipped batch, "grad_norm" of what moves, before clipping, "usage" and
    "perplexity" over the window; with a discriminator "adaptive_weight",
    "logits/real", "logits/fake", its own norm and rate. "nonfinite" is 1
    where a loss or a norm is not finite: then all of the state but `step` is
    as it was.
  """
  images = image_ops.to_unit(images)
  batch, microbatches = accumulated(spec, state, frozen, hparams, images)
  metrics = dict(batch.metrics)
  metrics['psnr'] = -10 * jnp.log10(jnp.maximum(metrics.pop('mse'), 1e-10))
  metrics['grad_norm'] = spec.optimizer.norm(batch.gradients)
  codebook, usage, stats = state.codebook, state.usage, batch.stats
  if codebook and spec.updates_codebook:
    given = stats if batch.tokens is None else stats | {'tokens': batch.tokens}
    updated = spec.tokenizer.quantizer.update_codebook(
      codebook['quantizer'], given
    )
    codebook = codebook | {'quantizer': updated}
  discriminator = state.discriminator
  if spec.gan is not None:
    reals, sample_ids = microbatches
    discriminator, disc_metrics = spec.gan.discriminator_step(
      state, frozen, hparams, reals, batch.fakes, sample_ids
    )
    metrics |= disc_metrics
  finite = jnp.isfinite(
    jnp.stack([x for name, x in metrics.items() if judged(name)])
  ).all()
  metrics['nonfinite'] = 1.0 - finite.astype(jnp.float32)
  if 'counts' in stats:
    row = state.step % spec.usage_window
    # Updates one row of the window in place, without a copy.
    usage = usage.at[row].set(jnp.where(finite, stats['counts'], usage[row]))
    window = usage.sum(0)
    metrics['usage'] = code_ops.usage(window).mean()
    metrics['perplexity'] = code_ops.perplexity(window).mean()

  def update(moved):
    network, ema = moved
    params = network.params
    updates, opt_state = spec.optimizer.update(
      hparams['optimizer'], batch.gradients, network.opt_state, params,
      metrics['grad_norm'],
    )  # fmt: skip
    params = optax.apply_updates(params, updates)
    if spec.ema:
      # A short run's EMA weights must not remember the first random ones.
      t = state.step.astype(jnp.float32)
      decay = jnp.minimum(hparams['ema'], (1 + t) / (10 + t))

      def average(e, p):
        # Where both are equal every bit stays, that of -0.0 too.
        return jnp.where(e == p, e, e + (1 - decay) * (p - e))

      ema = jax.tree.map(average, ema, params)
    return network.replace(params=params, opt_state=opt_state), ema

  tokenizer, ema = updated_if(finite, update, (state.tokenizer, state.ema))
  codebook, discriminator = selected(
    finite, (codebook, discriminator), (state.codebook, state.discriminator)
  )
  return TrainState(
    step=state.step + 1,
    tokenizer=tokenizer,
    codebook=codebook,
    discriminator=discriminator,
    ema=ema,
    usage=usage,
    rng=state.rng,
  ), metrics


def judged(name: str) -> bool:
  """Whether a metric must be finite: losses and norms of both networks."""
  last = name.rsplit('/', 1)[-1]
  return name.startswith('loss/') or last == 'grad_norm'


def update_norms(
  spec: StepSpec, state: TrainState, hparams: Numbers
) -> Metrics:
  """{"update_norm", "discriminator/update_norm": f32[]} of the update that
  `state` is the result of; in the step itself they would cost a copy of the
  parameters."""

  def norm(optimizer, hparams, network):
    numbers = hparams['optimizer']
    return optimizer.last_update_norm(
      numbers, network.params, network.opt_state
    )

  norms = {'update_norm': norm(spec.optimizer, hparams, state.tokenizer)}
  if spec.gan is not None:
    norms['discriminator/update_norm'] = norm(
      spec.gan.optimizer, hparams['discriminator'], state.discriminator
    )
  return norms


def selected(finite: jax.Array, new: Any, old: Any) -> Any:
  """Every leaf of `new` if `finite`, else of `old`, bit for bit."""

  def chosen(new, old):
    return old if new is old else jnp.where(finite, new, old)

  return jax.tree.map(chosen, new, old)


def updated_if(finite: jax.Array, update: Callable, state: Any) -> Any:
  """`update(state)` if `finite`, else `state`, bit for bit.

  What is cheapest differs. A TPU reads and writes each leaf once with the
  select in the same loop, and copies all of it into a conditional; a CPU
  makes a loop of its own for each select (80M parameters: v5e .005 copies of
  temporaries against 3.1, CPU 2.0 against 0).
  """
  return jax.lax.platform_dependent(
    state,
    cpu=lambda state: jax.lax.cond(finite, update, lambda old: old, state),
    default=lambda state: selected(finite, update(state), state),
  )


@functools.partial(jax.jit, static_argnums=0)  # traced once
def _gradients(spec, state, frozen, hparams, images):
  images = image_ops.to_unit(images)
  ids = jnp.arange(len(images))
  found = loss_gradients(spec, state, frozen, hparams, images, ids).gradients
  return [found[name] for name in spec.trainable]


def _reached(program: Any) -> list[bool]:
  """Which outputs of a jaxpr depend on any input."""
  live = set(program.invars)
  for eqn in program.eqns:
    if any(v in live for v in eqn.invars if not hasattr(v, 'val')):
      live.update(eqn.outvars)
  return [not hasattr(v, 'val') and v in live for v in program.outvars]


def check_reach(
  spec: StepSpec, state: Any, frozen: Any, hparams: Any, images: Any
) -> None:
  """Checks that every trainable leaf gets a gradient from some loss.

  Args:
    spec: the run's.
    state, frozen, hparams, images: arrays or ShapeDtypeStructs; only shapes
      are read.

  Raises:
    UserError: with the names of the leaves that no loss reaches.
  """
  traced = _gradients.trace(spec, state, frozen, hparams, images)
  reached = _reached(traced.jaxpr.jaxpr)
  lost = [n for n, r in zip(spec.trainable, reached, strict=True) if not r]
  if lost:
    raise UserError(
      f'no loss reaches {len(lost)} trainable leaves: {", ".join(lost[:4])}'
      f'{" …" if len(lost) > 4 else ""}; freeze them with a schedule of None, '
      'or add the loss that trains them'
    )
