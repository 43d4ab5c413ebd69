"""The second player: a discriminator, what it says of a step, how it moves.

The decoder's side is a cotangent at the reconstruction, balanced against the
other losses where the two meet the head's kernel (`losses/adversarial.py`).
The discriminator learns on the same reconstruction, rounded to 8 bits, after
the tokenizer's gradient is taken. Its power iteration moves once an update and
LeCam's averages once a step, however many parts the batch is computed in; the
updates of one step see the same images, augmented alike.

What starts with the run, in one part, is in no `cond` or `scan`: in those
gradients of convolutions are twelve times as slow on CPUs (51 and 650 ms for a
small PatchGAN, jax 0.10.2).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vqrae_jax import optim
from vqrae_jax.losses import adversarial
from vqrae_jax.nn import discriminators
from vqrae_jax.nn.spectral import advance
from vqrae_jax.ops import augment, trees
from vqrae_jax.ops import images as image_ops
from vqrae_jax.specs import DecoderSpec
from vqrae_jax.train.config import DiscriminatorSpec, GanTerm
from vqrae_jax.types import Frozen, NetworkState, TrainState

Metrics = dict[str, jax.Array]

# Apart from each other and from the quantizer's draws of the same step.
_GENERATOR, _FAKE, _REAL = 101, 102, 103


@dataclasses.dataclass(frozen=True)
class Adversary:
  """What is static about the second player.

  Attributes:
    module: the discriminator.
    spec: its section of the config.
    weight: step -> weight of the decoder's loss, zero before its start.
    adaptive: whether the weight is scaled by the balance.
    gan_start: the first step at which the decoder hears of it.
    start: the first step at which it learns.
    optimizer: over {leaf name: leaf}.
    rate: step -> its learning rate, counted over those that moved it.
    decoder: the spec of the head that both gradients are compared at.
  """

  module: Any
  spec: DiscriminatorSpec
  weight: Callable[[Any], Any]
  adaptive: bool
  gan_start: int
  start: int
  optimizer: optax.GradientTransformation
  rate: Callable[[Any], Any]
  decoder: DecoderSpec

  def fresh(self, key: jax.Array, image: Any) -> tuple[NetworkState, dict]:
    """(the player at its start, its frozen backbone, random); pure."""
    variables = self.module.init(key, image)
    params = trees.flatten(variables['params'])
    stats = {
      'spectral': trees.flatten(variables.get('spectral', {})),
      'lecam': adversarial.lecam_init(),
    }
    player = NetworkState(params, self.optimizer.init(params), stats)
    return player, variables.get('backbone', {})

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

  def _seen(self, state: TrainState, images: Any, rows: Any, use: int) -> Any:
    """Images as the discriminator sees them, each with its own draws."""
    if not self.spec.augment:
      return images
    key = jax.random.fold_in(jax.random.fold_in(state.rng, state.step), use)
    draws = augment.draw(key, rows)
    return augment.apply(images, draws, self.spec.cutout)

  def generator(
    self, state: TrainState, frozen: Frozen, recon: jax.Array, rows: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """(the decoder's adversarial loss, its cotangent at `recon`).

    Both are zero, and cost nothing, before the term's start.
    """
    player = state.discriminator

    def loss(recon):
      seen = self._seen(state, recon, rows, _GENERATOR)
      said = self.logits(player.params, player.stats['spectral'], frozen, seen)
      return adversarial.G_LOSSES[self.spec.loss](said)

    if not self.gan_start:
      return jax.value_and_grad(loss)(recon)
    return jax.lax.cond(
      state.step >= self.gan_start,
      jax.value_and_grad(loss),
      lambda recon: (jnp.zeros([]), jnp.zeros_like(recon)),
      recon,
    )

  def head_grad(self, cotangent: jax.Array, features: jax.Array) -> jax.Array:
    """The gradient at the head's kernel of a loss with this cotangent."""
    s = self.decoder.vit
    return adversarial.head_gradient(
      cotangent,
      features,
      self.decoder.pixel_norm.std,
      s.patch_size,
      s.num_prefix_tokens,
    )

  def balance(self, rec: jax.Array, gan: jax.Array) -> jax.Array:
    """f32[], what the adversarial cotangent is scaled by.

    Args:
      rec, gan: `head_grad` of the weighted reconstruction losses and of the
        adversarial one, over the whole batch.
    """
    if not self.adaptive:
      return jnp.ones([])
    norms = jnp.linalg.norm(rec), jnp.linalg.norm(gan)
    return jax.lax.stop_gradient(adversarial.adaptive_weight(*norms))

  def step(
    self,
    state: TrainState,
    frozen: Frozen,
    reals: jax.Array,
    fakes: jax.Array,
    rows: jax.Array,
  ) -> tuple[NetworkState, Metrics]:
    """The player after its updates of one step, and what it said.

    Args:
      state: the step's state, the discriminator as it was.
      frozen: its backbone.
      reals: [p b h w 3], the batch in p parts.
      fakes: uint8[p b h w 3], their reconstructions.
      rows: i32[p b], each sample's row in the batch.
    """
    player = state.discriminator

    def learn(player):
      done = optim.updates_of(player.opt_state) // self.spec.updates
      for _ in range(self.spec.updates):
        player, metrics = self._update(
          state, player, frozen, reals, fakes, rows
        )
      lecam = adversarial.lecam_update(
        player.stats['lecam'], metrics['logits/real'], metrics['logits/fake']
      )
      player = player.replace(stats=player.stats | {'lecam': lecam})
      return player, metrics | {'lr/discriminator': self.rate(done)}

    def wait(player):
      shapes = jax.eval_shape(learn, player)[1]
      return player, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    if not self.start:
      return learn(player)
    return jax.lax.cond(state.step >= self.start, learn, wait, player)

  def _update(self, state, player, frozen, reals, fakes, rows):
    stats = player.stats | {
      'spectral': advance(player.params, player.stats['spectral'])
    }

    of_part = jax.grad(
      functools.partial(self._loss, state, stats, frozen), has_aux=True
    )
    batch = (reals, fakes, rows)
    first = jax.tree.map(lambda x: x[0], batch)
    if len(reals) == 1:
      grads, metrics = of_part(player.params, *first)
    else:
      shapes = jax.eval_shape(of_part, player.params, *first)
      zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

      def add(total, batch):
        found = of_part(player.params, *batch)
        return jax.tree.map(jnp.add, total, found), None

      total, _ = jax.lax.scan(add, zero, batch)
      grads, metrics = jax.tree.map(lambda x: x / len(reals), total)
    updates, opt_state = self.optimizer.update(
      grads, player.opt_state, player.params
    )
    params = optim.apply_updates(player.params, updates)
    metrics['discriminator/grad_norm'] = optax.global_norm(grads)
    metrics['discriminator/update_norm'] = optax.global_norm(updates)
    return NetworkState(params, opt_state, stats), metrics

  def _loss(self, state, stats, frozen, params, reals, fakes, rows):
    """(f32[], its metrics), means over one part."""
    spec = self.spec

    def said(images, use):
      images = self._seen(state, image_ops.to_unit(images), rows, use)
      return self.logits(params, stats['spectral'], frozen, images)

    real, fake = said(reals, _REAL), said(fakes, _FAKE)
    loss = adversarial.D_LOSSES[spec.loss](real, fake)
    metrics = {
      'loss/discriminator': loss,
      'logits/real': real.mean(),
      'logits/fake': fake.mean(),
    }
    if spec.lecam:
      metrics['loss/lecam'] = adversarial.lecam(real, fake, stats['lecam'])
      loss += spec.lecam * metrics['loss/lecam']
    if spec.r1:
      metrics['loss/r1'] = adversarial.r1_penalty(
        lambda x: said(x, _REAL), image_ops.to_unit(reals)
      )
      loss += spec.r1 / 2 * metrics['loss/r1']
    return loss, metrics


def make_adversary(
  spec: DiscriminatorSpec,
  term: GanTerm,
  decoder: DecoderSpec,
  total_steps: int,
  steps_per_epoch: float | None,
) -> Adversary:
  """The second player as the config has it; no arrays yet.

  Raises:
    UserError: an unknown discriminator, or one of its fields.
  """
  module = discriminators.build({'name': spec.name, **spec.fields})
  start = optim.steps_of(spec.start, steps_per_epoch, 'discriminator.start')
  image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), image)
  leaves = trees.flatten(shapes['params'])
  optimizer, rates = optim.make_optimizer(
    spec.optim,
    dict.fromkeys(leaves, spec.schedule),
    leaves,
    max(total_steps - start, 1),
    steps_per_epoch,
    spec.updates,
  )
  return Adversary(
    module=module,
    spec=spec,
    weight=term.weight_at(steps_per_epoch),
    adaptive=term.adaptive,
    gan_start=term.start_step(steps_per_epoch),
    start=start,
    optimizer=optimizer,
    rate=next(iter(rates.values())),
    decoder=decoder,
  )
