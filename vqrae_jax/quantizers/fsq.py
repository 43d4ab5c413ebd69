"""Finite scalar quantization (arXiv 2309.15505): each channel is rounded alone.

Two published conventions, which differ in bound, values and index order:

"cosmos" (the paper, NVIDIA Cosmos): half = (L-1)(1+eps)/2, off = 1/2 for even
L, bounded = tanh(z + atanh(off/half)) half - off, code = round(bounded) /
(L//2); the first digit is least significant.

"centered": h = (L-1)/2, bounded = tanh(z) h, digit = clip(round(bounded + h)),
code = digit - h; the last digit is least significant.

`preserve_symmetry` (arXiv 2411.19842), with "cosmos", uses the bound of
"centered", which has as many steps above 0 as below, with
code = (digit - h) / h in [-1, 1]; the first digit stays least significant.
`noise_dropout` requires it: in training each value is, with that probability,
shifted by a uniform number in [-1/2, 1/2) and clipped to [-1, 1] before the
decoder reads it, so that the decoder does not depend on the codes' exact
values.

No codebook is learned, so it cannot collapse and there is no codebook loss;
only "centered" has a commitment loss. Codes stay unused where channels depend
on each other: for that there is the loss "entropy", LFQ's (arXiv 2310.05737).
A token's softmax over codes is the product of its channels' over their levels,
of -distance^2 / temperature with levels 1 apart.

bound="clip", with "centered", rounds the projected latents without a tanh, in
units of levels, and clips, as the PyTorch project does. That project trained
FSQ between a three-layer MLP and a Fourier unprojection; both are here so that
its checkpoints load. They are not defaults: sin and cos of codes times large
frequencies turn faster than the codes' steps, so a straight-through gradient
through them is useless (its correlation with the true one was -.05, against
.995 of a plain MLP).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array

from vqrae_jax.errors import UserError
from vqrae_jax.ops import codes as code_ops
from vqrae_jax.quantizers import base
from vqrae_jax.specs import at_least

MLP_WIDTH = 512
FREQUENCIES = 128
FREQUENCY_STD = 10.0
NORM_EPS = 1e-5
START_RMS = 0.25  # of latents of evenly used codes, with projection='mlp'
TOGETHER = 2**16  # codes of the channels whose entropy is joint, at most


def _norm(dtype: str, name: str) -> nn.Module:
  return nn.LayerNorm(NORM_EPS, dtype=dtype, use_fast_variance=False, name=name)


class MLPProjection(nn.Module):
  """f32[... d] -> f32[... c]: norm, three layers, tanh, a per-channel gain."""

  features: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = _norm('float32', 'norm')(x)
    for i, width in enumerate((MLP_WIDTH, MLP_WIDTH, self.features)):
      x = jax.nn.gelu(x, approximate=False) if i else x
      x = nn.Dense(width, precision='highest', name=f'dense{i}')(x)
    gain = nn.initializers.constant(3.0)
    return jnp.tanh(x) * self.param('gain', gain, (self.features,))


class FourierOut(nn.Module):
  """Codes [... c] -> [... d]: sin and cos of 2 pi codes @ frequencies, then
  three layers with norms between."""

  features: int
  dtype: str

  @nn.compact
  def __call__(self, x: Array, frequencies: Array) -> Array:
    turns = jnp.matmul(
      2 * math.pi * x.astype(jnp.float32), frequencies, precision='highest'
    )
    x = jnp.concatenate([jnp.sin(turns), jnp.cos(turns)], -1)
    x = x.astype(self.dtype)
    for i in range(3):
      if i:
        x = _norm(self.dtype, f'norm{i - 1}')(x)
        x = jax.nn.gelu(x, approximate=False)
      x = nn.Dense(
        self.features, dtype=self.dtype, precision='highest', name=f'dense{i}'
      )(x)
    return x


class FSQ(base.Quantizer):
  """Rounds len(levels) bounded channels; K is the product of the levels.

  Attributes:
    levels: values per channel: [8, 8, 8, 5, 5, 5] gives 64,000 codes; there
      must be fewer than 2^31. Each at least 2.
    convention: bound, values and order of the codes; publications differ in
      these. One of "centered", "cosmos".
    epsilon: by how much "cosmos" widens the bound, so that the outer values
      can be reached; below 1 / (the largest level - 1). Above 0.
    bound: a tanh, or "clip" for latents that are bounded elsewhere or not at
      all. One of "tanh", "clip".
    adapter_in: the projection in; "mlp" bounds and so needs "clip". One of
      "linear", "mlp".
    adapter_out: the projection out; "fourier" passes no useful gradient. One
      of "linear", "fourier".
    preserve_symmetry: whether codes are symmetric around 0, with "cosmos".
    noise_dropout: with `preserve_symmetry`, the share of values that are
      shifted in training. In [0, 1].
    entropy_gamma: in the loss "entropy", the weight of the entropy of the
      tokens' mean: of all channels together up to 65,536 codes, beyond that a
      sum over groups of consecutive channels, each of so many or of one
      channel. At least 0.
    entropy_temperature: of the softmax over a channel's levels, in units of
      the squared distance of two. Above 0.
  """

  training_fields = ('noise_dropout', 'entropy_gamma', 'entropy_temperature')

  choices = (
    ('convention', ('centered', 'cosmos')),
    ('bound', ('tanh', 'clip')),
    ('adapter_in', ('linear', 'mlp')),
    ('adapter_out', ('linear', 'fourier')),
  )

  positive = ('epsilon', 'entropy_temperature')

  levels: tuple[int, ...] = (8, 8, 8)
  convention: str = 'centered'
  epsilon: float = 1e-3
  bound: str = 'tanh'
  adapter_in: str = 'linear'
  adapter_out: str = 'linear'
  preserve_symmetry: bool = False
  noise_dropout: float = 0.0
  entropy_gamma: float = 1.0
  entropy_temperature: float = 0.1

  def __post_init__(self):
    super().__post_init__()
    at_least(0, 'quantizer.', self, 'entropy_gamma')
    levels, cosmos = tuple(self.levels), self.convention == 'cosmos'
    if not levels or min(levels) < 2:
      raise UserError(
        f'quantizer.levels={levels} must be whole numbers of at least 2'
      )
    given = f'{levels}' if len(levels) < 32 else f'{len(levels)} numbers'
    base.check_size(f'quantizer.levels={given}', math.prod(levels))
    if max(levels) > base.EXACT:
      raise UserError(
        f'quantizer.levels={given} must be {base.EXACT} or less each, what f32 '
        'tells apart'
      )
    widest = 1 / (max(levels) - 1)
    if cosmos and self.epsilon >= widest:
      raise UserError(
        f'quantizer.epsilon={self.epsilon} must be below 1/(L-1), here '
        f'{widest:.3g}, or a bound would pass its levels'
      )
    if cosmos and self.bound != 'tanh':
      raise UserError(
        'quantizer.bound="clip" needs quantizer.convention="centered"; '
        '"cosmos" has a bound of its own'
      )
    linear = self.adapter_in == self.adapter_out == 'linear'
    if not (linear or self.projection):
      raise UserError(
        'quantizer.adapter_in and quantizer.adapter_out are projections: set '
        'quantizer.projection=True'
      )
    if self.adapter_in == 'mlp' and self.bound != 'clip':
      raise UserError(
        'quantizer.adapter_in="mlp" ends in a tanh: set quantizer.bound="clip"'
      )
    if self.adapter_in == self.projection == 'mlp':
      raise UserError(
        'quantizer.adapter_in="mlp" and quantizer.projection="mlp" both map '
        'into code space; set quantizer.projection=True'
      )
    if self.preserve_symmetry and not cosmos:
      raise UserError(
        'quantizer.preserve_symmetry=True needs quantizer.convention="cosmos"; '
        '"centered" is symmetric as it is'
      )
    if not 0 <= self.noise_dropout <= 1:
      raise UserError(
        f'quantizer.noise_dropout={self.noise_dropout} must lie in [0, 1]'
      )
    if self.noise_dropout and not self.preserve_symmetry:
      raise UserError(
        f'quantizer.noise_dropout={self.noise_dropout} is in units of codes in '
        '[-1, 1]: set quantizer.preserve_symmetry=True'
      )

  def make_project_in(self):
    if self.adapter_in == 'mlp':
      return MLPProjection(self.code_width)
    return super().make_project_in()

  def make_project_out(self):
    if self.adapter_out == 'fourier':
      return FourierOut(self.latent_dim, self.dtype)
    if self.projection == 'mlp':
      # If latents start large, the input projection first learns to make the
      # codes of all tokens equal, and needs thousands of steps to spread them.
      square = np.mean((np.square(self.levels) - 1) / 12 / self._grid[1] ** 2)
      init = nn.initializers.variance_scaling(
        START_RMS**2 / square, 'fan_in', 'truncated_normal'
      )
      return nn.Dense(
        self.latent_dim, dtype=self.dtype, precision='highest', kernel_init=init
      )
    return super().make_project_out()

  def setup_codes(self):
    if self.adapter_out == 'fourier':
      shape = (self.code_width, FREQUENCIES)
      made = self.table('frequencies', FREQUENCY_STD, shape)
      self.frequencies = made.value

  def to_code_space(self, latents):
    z = super().to_code_space(latents)
    if self.adapter_in == 'mlp':
      z = z * np.asarray([(n - 1) / 2 for n in self.levels], np.float32)
    return z

  def from_code_space(self, z):
    if self.adapter_out == 'fourier':
      return self.project_out(z, self.frequencies)
    return super().from_code_space(z)

  @property
  def codebook_size(self):
    return math.prod(self.levels)

  @property
  def code_width(self):
    return len(self.levels)

  @property
  def loss_names(self):
    centered = self.convention == 'centered'
    return ('commit', 'entropy') if centered else ('entropy',)

  @property
  def draws(self):
    return self.noise_dropout > 0

  @property
  def _strides(self):
    return code_ops.radix_strides(
      self.levels, last_is_least=self.convention == 'centered'
    )

  @property
  def _grid(self):
    """(offset, scale), f32[c] each: a code is (digit - offset) / scale."""
    radix = np.asarray(self.levels, np.float32)
    if self.preserve_symmetry:
      return (radix - 1) / 2, (radix - 1) / 2
    if self.convention == 'centered':
      return (radix - 1) / 2, np.ones_like(radix)
    return radix // 2, radix // 2

  def bounded(self, z):
    """f32[... c] -> (surrogate in code units, digits i32[... c])."""
    radix, (offset, scale) = np.asarray(self.levels, np.float64), self._grid
    if self.convention == 'centered':
      x = jnp.tanh(z) * offset if self.bound == 'tanh' else z
      digits = jnp.round(x + offset)
    elif self.preserve_symmetry:
      x = jnp.tanh(z) * offset
      digits = jnp.floor(x + offset + 0.5)
    else:
      half = (radix - 1) * (1 + self.epsilon) / 2
      off = np.where(radix % 2 == 0, 0.5, 0.0)
      shift = np.arctanh(off / half).astype(np.float32)
      x = jnp.tanh(z + shift) * half.astype('f4') - off.astype('f4')
      digits = jnp.round(x) + offset
    digits = jnp.clip(digits, 0, (radix - 1).astype('f4'))
    return x / scale, digits.astype(jnp.int32)

  def _assign(self, z, train, random):
    surrogate, digits = self.bounded(z)
    return surrogate, code_ops.digits_to_index(digits, self._strides)

  def _perturbed(self, codes, random):
    if not (self.noise_dropout and random):
      return codes

    def moved(key, codes):
      which, how = jax.random.split(key)
      drawn = jax.random.bernoulli(which, self.noise_dropout, codes.shape)
      noise = jax.random.uniform(how, codes.shape, minval=-0.5, maxval=0.5)
      return jnp.where(drawn, jnp.clip(codes + noise, -1, 1), codes)

    return jax.vmap(moved)(random['samples'], codes)

  def _regulariser(self, name, z, surrogate):
    offset, scale = self._grid
    z = (surrogate * scale + offset).reshape(-1, len(self.levels))
    total, first = jnp.zeros(()), 0
    while first < len(self.levels):
      sizes = np.cumprod(self.levels[first:], dtype=np.float64)
      count = max(int((sizes <= TOGETHER).sum()), 1)
      levels = self.levels[first : first + count]
      tokens, spread = code_ops.entropies(
        functools.partial(self._scores, levels),
        math.prod(levels),
        z[:, first : first + count],
      )
      total += tokens - self.entropy_gamma * spread
      first += count
    return total

  def _scores(self, levels, z):
    """f32[n c] in digits -> f32[n k], of every code of channels of `levels`."""
    scores = jnp.zeros((len(z), 1))
    for size, x in zip(levels, z.T, strict=True):
      own = -((x[:, None] - jnp.arange(size)) ** 2) / self.entropy_temperature
      scores = (scores[:, :, None] + own[:, None]).reshape(len(z), -1)
    return scores

  def digits(self, indices: Array) -> Array:
    """i32[...] -> i32[... c], each channel's level, in [0, levels)."""
    return code_ops.index_to_digits(indices, self._strides, self.levels)

  def _lookup(self, indices):
    digits = self.digits(indices)
    offset, scale = self._grid
    return (digits.astype(jnp.float32) - offset) / scale

  def codes_to_indices(self, codes):
    offset, scale = self._grid
    digits = jnp.round(codes.astype(jnp.float32) * scale + offset)
    return code_ops.digits_to_index(digits.astype(jnp.int32), self._strides)
