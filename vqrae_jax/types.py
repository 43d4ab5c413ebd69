"""Traced values: pytrees of arrays that cross a jit boundary.

They hold arrays, dicts of arrays and None; never functions, modules or specs.
Shapes: b images, h w pixels, gh gw the grid of tokens, d latent channels,
c code channels, q codes per token, k entries of a codebook.
"""

from collections.abc import Hashable
from typing import Any

from flax import struct
from jaxtyping import Array, Float, Int

Tree = Any  # nested dicts of arrays


@struct.dataclass
class QuantizerOutput:
  """What a quantizer returns for latents f[... d].

  Attributes:
    z_q: f[... d], what the decoder reads: `codes_to_latents(codes)`.
    codes: f32[... c], exactly the looked-up values.
    indices: i32[...], i32[... q] with several codes a token, i32[b n] with
      several scales; None if the quantizer is continuous.
    losses: {name: f32[]}, unweighted.
    stats: {"counts": i32[q k], ...}, what `update_codebook` and the usage
      window need; {} if the quantizer is continuous.
    tokens: f32[b q c]: in training, if `update_codebook` needs them, points
      halfway between a token and its code, one drawn at random for each image
      and code; else None. With several scales q is 1.
    quantized: in training z_q again, with a gradient that stops at the codes
      instead of passing straight through to the latents; else None.
  """

  z_q: Array
  codes: Array
  indices: Array | None
  losses: dict[str, Array]
  stats: dict[str, Array]
  quantized: Array | None = None
  tokens: Array | None = None


@struct.dataclass
class TokenizerOutput:
  """One pass through a tokenizer.

  Attributes:
    images: f32[b h w 3], the reconstruction, not clipped.
    latents: f[b gh gw d], the encoder's continuous features, before they are
      normalized.
    quantizer: the quantizer's output; its `z_q` is in the space of `latents`,
      its `codes` belong to the normalized ones.
    features: f[b n d], the decoder's tokens before its head, cls included.
    losses: {name: f32[]} unweighted, if requested; else None.
    layers: f[b gh gw t d], the outputs of the blocks `encoder.layers`, from
      which the latents are computed; None if only the last block is read.
    predictions: the feature decoder's, of the last and the first of `layers`:
      {"deep", "shallow": f[b gh gw d]}; None without a feature decoder.
  """

  images: Float[Array, 'b h w 3']
  latents: Float[Array, 'b gh gw d']
  quantizer: QuantizerOutput
  features: Float[Array, 'b n e']
  losses: dict[str, Array] | None = None
  layers: Float[Array, 'b gh gw t d'] | None = None
  predictions: dict[str, Array] | None = None

  @property
  def encoded(self) -> Array:
    """The encoder's own output, `layers` or the latents."""
    return self.latents if self.layers is None else self.layers


@struct.dataclass
class LossInputs:
  """The inputs of an image loss.

  Attributes:
    reconstruction: f32[b h w 3], not clipped.
    targets: f32[b h w 3] in [0, 1].
    weights: {term: frozen arrays} of the terms that have any, or None.
    run: how the terms' networks are run, a `specs.RunOptions`; static. None:
      f32 without remat.
  """

  reconstruction: Float[Array, 'b h w 3']
  targets: Float[Array, 'b h w 3']
  weights: Tree = None
  run: Hashable = struct.field(pytree_node=False, default=None)


@struct.dataclass
class LatentInputs:
  """The inputs of a latent loss.

  Attributes:
    out: one forward pass.
    teacher: the teacher's counterpart of `out.encoded`, or None.
  """

  out: TokenizerOutput
  teacher: Array | None = None


@struct.dataclass
class NetworkState:
  """One optimised network: its trainable leaves, optimizer state and stats."""

  params: Tree
  opt_state: Tree
  stats: Tree


@struct.dataclass
class TrainState:
  """Everything that a train step updates.

  Attributes:
    step: i32[], completed steps.
    tokenizer: the tokenizer's trainable leaves, keyed by full leaf name.
    codebook: the linen `codebook` collection ({} if there is none).
    discriminator: its state, or None.
    ema: moving average of `tokenizer.params`, or None.
    usage: i32[w q k], code counts of the last w steps (a ring by step).
    rng: the run's key, never split; each step folds in its number.
  """

  step: Int[Array, '']
  tokenizer: NetworkState
  codebook: Tree
  discriminator: NetworkState | None
  ema: Tree
  usage: Tree
  rng: Array


@struct.dataclass
class AtImage:
  """What the image losses of a forward give: all that its pullback needs.

  Attributes:
    metrics: {"loss/NAME", "mse": f32[]}, means; "mse" is the clipped
      reconstruction's.
    image: f32[b h w 3], the weighted image losses' cotangent at the
      reconstruction, or None.
    gan: the adversarial one's, neither weighted nor balanced, or None.
    fakes: f32[b h w 3], the reconstruction rounded to 8 bits, if a
      discriminator learns on it.
    encoded: what an encoder gives that is frozen, else None.
  """

  metrics: Tree
  image: Array | None
  gan: Array | None
  fakes: Array | None
  encoded: Array | None


@struct.dataclass
class MicrobatchResult:
  """Gradients, losses and statistics of one microbatch, before any update.

  Attributes:
    gradients: {leaf: gradient}, a mean over the microbatch.
    metrics: {"loss/NAME", "mse": f32[]}, means too; "mse" is the clipped
      reconstruction's.
    stats: the quantizer's, sums.
    tokens: the quantizer's sample of them, or None.
    fakes: f32[b h w 3], the reconstruction rounded to 8 bits, if a
      discriminator learns on it.
  """

  gradients: Tree
  metrics: Tree
  stats: Tree
  tokens: Array | None
  fakes: Array | None


@struct.dataclass
class Frozen:
  """Arrays that no step updates: an argument, never donated, never saved.

  Attributes:
    params: the tokenizer's frozen leaves, by full name.
    losses: {term: its network}, None without such terms.
    teacher: {"encoder": parameters} of a frozen encoder, or None.
    discriminator: the discriminator's backbone, or None.
  """

  params: Tree
  losses: Tree = None
  teacher: Tree = None
  discriminator: Tree = None
