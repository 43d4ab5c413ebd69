"""The discriminator: its losses, its update, its metrics, and its alarms.

The decoder's side is a cotangent at the reconstruction, scaled by the adaptive
weight, which compares the two gradients at the head's kernel
(`losses/adversarial.py`). The discriminator is trained on the same
reconstruction, rounded to 8 bits, after the tokenizer's gradient is taken. Its
power iteration advances once per update and LeCam's averages once per step,
however many microbatches there are; all updates of one step see the same images
with the same augmentation.

With one microbatch, losses that start at step 0 are in no `cond` or `scan`,
inside which the gradients of convolutions are twelve times slower on CPUs (51
against 650 ms for a small PatchGAN, jax 0.10.2).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vqrae_jax import optim
from vqrae_jax.losses import adversarial
from vqrae_jax.nn.discriminators import Discriminator
from vqrae_jax.nn.spectral import advance
from vqrae_jax.ops import augment, trees
from vqrae_jax.specs import DecoderSpec
from vqrae_jax.types import Frozen, NetworkState, TrainState

Metrics = dict[str, jax.Array]

# Apart from each other and from the quantizer's draws of the same step.
_GENERATOR, _FAKE, _REAL = 101, 102, 103


def over_microbatches(fn: Callable, batch: tuple) -> tuple[Any, Any, Any]:
  """`fn` over the microbatches of a batch, one after another.

  Args:
    fn: (*microbatch) -> (means, sums, others): trees of arrays.
    batch: arrays [microbatches …], or trees of them; the first is an array.

  Returns:
    (means over microbatches, sums over them, others stacked [microbatches …]).
  """
  count = len(batch[0])

  def first():
    return jax.tree.map(lambda x: x[0], batch)

  if count == 1:
    means, sums, others = fn(*first())
    return means, sums, jax.tree.map(lambda x: x[None], others)

  def add(total, microbatch):
    means, sums, others = fn(*microbatch)
    return jax.tree.map(jnp.add, total, (means, sums)), others

  shapes = jax.eval_shape(lambda: fn(*first())[:2])
  zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  (means, sums), others = jax.lax.scan(add, zero, batch)
  return jax.tree.map(lambda x: x / count, means), sums, others


@dataclasses.dataclass(frozen=True)
class Gan:
  """The static part of adversarial training; hashable.

  Its numbers are in the step's hparams: losses.gan (weight, start, ramp) and
  discriminator (start, lecam, r1, optimizer).

  Attributes:
    module: the discriminator.
    optimizer: its own.
    decoder: the spec of the head at which both gradients are compared.
    loss: "hinge", "non_saturating" or "vanilla".
    adaptive: whether the generator's loss has the adaptive weight.
    generator_waits: whether the generator's loss starts after step 0.
    waits: whether the discriminator's training starts after step 0.
    augment: whether its images are randomly augmented (DiffAug).
    cutout: with `augment`, the share of each side that is cut out; 0 for none.
    lecam, r1: whether it has these regularisers.
  """

  module: Discriminator
  optimizer: optim.Optimizer
  decoder: DecoderSpec
  loss: str
  adaptive: bool
  generator_waits: bool
  waits: bool
  augment: bool
  cutout: float
  lecam: bool
  r1: bool

  def init(self, key: jax.Array, image: Any) -> tuple[NetworkState, dict]:
    """(its state at step 0, its frozen backbone, random); pure."""
    variables = self.module.init(key, image)
    params = trees.flatten(variables['params'])
    stats = {
      'spectral': trees.flatten(variables.get('spectral', {})),
      'lecam': adversarial.lecam_init(),
    }
    network = NetworkState(params, self.optimizer.init(params), stats)
    return network, variables.get('backbone', {})

  def logits(
    self, params: Any, spectral: Any, frozen: Frozen, images: Any
  ) -> jax.Array:
    """f32[b n] of images that are augmented already."""
    variables = {'params': trees.unflatten(params)}
    if spectral:
      variables['spectral'] = trees.unflatten(spectral)
    if frozen.discriminator:
      variables['backbone'] = frozen.discriminator
    return self.module.apply(variables, images)

  def _augmented(
    self, state: TrainState, images: Any, sample_ids: Any, use: int
  ) -> Any:
    """Images as the discriminator sees them, each with its own draws."""
    if not self.augment:
      return images
    key = jax.random.fold_in(jax.random.fold_in(state.rng, state.step), use)
    return augment.apply(images, augment.draw(key, sample_ids), self.cutout)

  def generator_loss(
    self,
    state: TrainState,
    frozen: Frozen,
    hparams: optim.Numbers,
    recon: jax.Array,
    sample_ids: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    """(the decoder's adversarial loss, its cotangent at `recon`).

    Both are zero, and cost nothing, before the loss's start.
    """
    network = state.discriminator

    def loss(recon):
      images = self._augmented(state, recon, sample_ids, _GENERATOR)
      logits = self.logits(
        network.params, network.stats['spectral'], frozen, images
      )
      return adversarial.G_LOSSES[self.loss](logits)

    if not self.generator_waits:
      return jax.value_and_grad(loss)(recon)
    return jax.lax.cond(
      state.step >= hparams['losses']['gan']['start'],
      jax.value_and_grad(loss),
      lambda recon: (jnp.zeros([]), jnp.zeros_like(recon)),
      recon,
    )

  def head_grads(
    self, image: jax.Array | None, gan: jax.Array, features: jax.Array
  ) -> tuple[jax.Array, ...]:
    """The gradients at the head's kernel of the weighted image losses and of
    the adversarial one, from their cotangents; () where the weight is not
    adaptive."""
    if not self.adaptive:
      return ()
    vit, std = self.decoder.vit, self.decoder.pixel_norm.std
    layout = vit.patch_size, vit.num_prefix_tokens
    return tuple(
      adversarial.head_gradient(x, features, std, *layout) for x in (image, gan)
    )

  def adaptive_weight(self, *head_grads: jax.Array) -> jax.Array:
    """f32[], the scale of the adversarial cotangent.

    Args:
      head_grads: `head_grads` of the whole batch.
    """
    if not self.adaptive:
      return jnp.ones([])
    return jax.lax.stop_gradient(
      adversarial.adaptive_weight(*map(jnp.linalg.norm, head_grads))
    )

  def discriminator_step(
    self,
    state: TrainState,
    frozen: Frozen,
    hparams: optim.Numbers,
    reals: jax.Array,
    fakes: jax.Array,
    sample_ids: jax.Array,
  ) -> tuple[NetworkState, Metrics]:
    """The discriminator after its updates of one step, and its metrics.

    Args:
      state: the step's, the discriminator as it was.
      frozen: its backbone.
      hparams: the step's.
      reals: f32[p b h w 3] in [0, 1], the batch in p microbatches.
      fakes: f32[p b h w 3], their reconstructions, rounded to 8 bits.
      sample_ids: i32[p b], each sample's place in the batch.
    """
    numbers = hparams['discriminator']

    def update(network):
      updates = network.opt_state[-1]['schedule_count']
      rates = self.optimizer.rates(
        numbers['optimizer'], updates // self.optimizer.updates
      )
      for _ in range(self.optimizer.updates):
        network, metrics = self._update(
          state, network, frozen, numbers, (reals, fakes, sample_ids)
        )
      lecam = adversarial.lecam_update(
        network.stats['lecam'], metrics['logits/real'], metrics['logits/fake']
      )
      network = network.replace(stats=network.stats | {'lecam': lecam})
      return network, metrics | {'lr/discriminator': rates[0]}

    def skip(network):
      shapes = jax.eval_shape(update, network)[1]
      metrics = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
      return network, metrics

    if not self.waits:
      return update(state.discriminator)
    return jax.lax.cond(
      state.step >= numbers['start'], update, skip, state.discriminator
    )

  def _update(self, state, network, frozen, numbers, batch):
    """(the network after one update, its metrics of the whole batch)."""
    spectral = advance(network.params, network.stats['spectral'])
    stats = network.stats | {'spectral': spectral}

    def gradients(reals, fakes, sample_ids):
      """Means over a microbatch."""

      def augmented(images, use):
        return self._augmented(state, images, sample_ids, use)

      # One call, each real image beside its fake: both lie on one device.
      both = augmented(reals, _REAL), augmented(fakes, _FAKE)
      both = jnp.stack(both, 1).reshape(-1, *reals.shape[1:])

      def loss(params):
        logits = self.logits(params, spectral, frozen, both)
        real, fake = jnp.moveaxis(logits.reshape(len(reals), 2, -1), 1, 0)
        loss = adversarial.D_LOSSES[self.loss](real, fake)
        metrics = {
          'loss/discriminator': loss,
          'logits/real': real.mean(),
          'logits/fake': fake.mean(),
        }
        if self.lecam:
          metrics['loss/lecam'] = adversarial.lecam(real, fake, stats['lecam'])
          loss += numbers['lecam'] * metrics['loss/lecam']
        if self.r1:
          metrics['loss/r1'] = adversarial.r1_penalty(
            lambda x: self.logits(
              params, spectral, frozen, augmented(x, _REAL)
            ),
            reals,
          )
          loss += numbers['r1'] / 2 * metrics['loss/r1']
        return loss, metrics

      return jax.grad(loss, has_aux=True)(network.params), (), ()

    (grads, metrics), _, _ = over_microbatches(gradients, batch)
    norm = metrics['discriminator/grad_norm'] = self.optimizer.norm(grads)
    updates, opt_state = self.optimizer.update(
      numbers['optimizer'], grads, network.opt_state, network.params, norm
    )
    params = optax.apply_updates(network.params, updates)
    return NetworkState(params, opt_state, stats), metrics


def active_metrics(
  step: int, metrics: Mapping[str, float], hparams: optim.Numbers
) -> dict[str, float]:
  """A step's metrics without those of losses that have not started.

  Args:
    step: completed steps, including this one.
    metrics: of the step.
    hparams: numbers on the host.
  """
  waiting: set[str] = set()
  if 'discriminator' in hparams:
    if step <= hparams['losses']['gan']['start']:
      waiting |= {'loss/gan', 'adaptive_weight'}
    if step <= hparams['discriminator']['start']:
      waiting |= {'loss/discriminator', 'loss/lecam', 'loss/r1'}
      waiting |= {'logits', 'discriminator'}
  return {
    k: v for k, v in metrics.items() if not {k, k.partition('/')[0]} & waiting
  }


# A discriminator whose loss is below this share of what guessing gives.
WON = 0.02
DIVERGED = 100.0
IDLE = 0.1  # of the codes that the window can reach


class Alarms:
  """Warns while training is going wrong.

  It detects a discriminator that separates everything and so teaches nothing
  more; diverging logits; an adversarial gradient of the decoder so small that
  the adaptive weight is at its bound; and a codebook that is mostly unused.
  Each is judged by means over the steps between two log rows, and is reported
  once until it has ended.

  Args:
    gan: the step's; None without a discriminator.
    hparams: numbers on the host.
    warmup: steps that fill the usage window: usage is judged after them.
    reachable: the highest usage possible with that many tokens, in (0, 1].
  """

  def __init__(
    self, gan: Gan | None, hparams: optim.Numbers, warmup: int, reachable=1.0
  ):
    self._gan, self._hparams, self._warmup = gan, hparams, warmup
    self._idle = IDLE * reachable
    self._rows: list[Mapping[str, float]] = []
    self._active: set[str] = set()

  def add(self, step: int, metrics: Mapping[str, float]) -> None:
    """The metrics of a completed step; skipped steps do not count."""
    if metrics['nonfinite']:
      return
    row = active_metrics(step, metrics, self._hparams)
    if step <= self._warmup:
      row.pop('usage', None)
    self._rows.append(row)

  def warnings(self) -> list[str]:
    """A line for each alarm that begins, judged by the steps since the last
    call."""
    rows, self._rows = self._rows, []
    found = self._judge(rows)
    new = [line for name, line in found.items() if name not in self._active]
    self._active = set(found)
    return new

  def _judge(self, rows: list[Mapping[str, float]]) -> dict[str, str]:
    def mean(name):
      values = [row[name] for row in rows if name in row]
      return float(np.mean(values)) if values else None

    found = {}
    loss = mean('loss/discriminator')
    if self._gan is not None and loss is not None:
      zero = jnp.zeros(1)
      guessing = float(adversarial.D_LOSSES[self._gan.loss](zero, zero))
      real, fake = mean('logits/real'), mean('logits/fake')
      if loss < WON * guessing:
        found['won'] = (
          f'the discriminator separates every reconstruction (its loss is '
          f'{loss:.2g}, guessing gives {guessing:.2g}); lower '
          'discriminator.schedule.lr, or add discriminator.lecam or r1'
        )
      if max(abs(real), abs(fake)) > DIVERGED:
        found['logits'] = (
          f"the discriminator's logits diverge (real {real:.3g}, fake "
          f'{fake:.3g}); add discriminator.lecam or r1, or lower '
          'discriminator.schedule.lr'
        )
    weights = [r['adaptive_weight'] for r in rows if 'adaptive_weight' in r]
    if weights and np.median(weights) >= 0.99 * adversarial.MAX_WEIGHT:
      found['weight'] = (
        'the adversarial gradient has all but vanished: adaptive_weight is at '
        f'its bound {adversarial.MAX_WEIGHT:.0e}; start losses.gan later, or '
        'lower discriminator.schedule.lr'
      )
    if (usage := mean('usage')) is not None and usage < self._idle:
      found['usage'] = (
        f'most codes are idle: usage {usage:.2g}, perplexity '
        f'{mean("perplexity"):.3g} over log.usage_window; lower the learning '
        'rate, or choose fewer codes or another quantizer'
      )
    return found
