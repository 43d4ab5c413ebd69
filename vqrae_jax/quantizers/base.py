"""The base of every quantizer, and the continuous one, which does not quantize.

The order is: project in, to f32, assign, look up, post_quant, project out. A
subclass writes `_assign` (latents to surrogate and indices) and `_lookup`
(indices to codes); the base adds the straight-through value and
`codes_to_latents`, which training, `reconstruct` and `decode_from_indices`
share.

Round-trip property: codes inside the forward equal `indices_to_codes(indices)`
bitwise, and `codes_to_indices` is the inverse. The call never mutates anything:
a codebook moves in `update_codebook`, a pure function that runs once per
optimizer step.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from vqrae_jax.errors import UserError
from vqrae_jax.ops import codes as code_ops
from vqrae_jax.ops import trees
from vqrae_jax.ops.nearest import nearest_code
from vqrae_jax.specs import PostQuantSpec, at_least, one_of
from vqrae_jax.types import QuantizerOutput

EXACT = 2**24  # integers that f32 tells apart


class Search(NamedTuple):
  """The tokens and the table that codes are chosen from, for codebook metrics.

  Attributes:
    tokens: f32[... c], as they are compared.
    table: f32[k c], whose nearest row is chosen, or None.
    indices: i32[...], the chosen rows.
  """

  tokens: Array
  table: Array | None
  indices: Array


class Quantized(NamedTuple):
  """Tokens in code space and their codes: `QuantizerOutput` before codes are
  mapped back to latents.

  Attributes:
    surrogate: f32[... c], which receives the codes' gradient.
    indices: i32[...].
    codes: f32[... c], looked up.
    losses: {name: f32[]}.
    stats: as in `QuantizerOutput`.
    tokens: f32[b q c], as in `QuantizerOutput`, or None.
  """

  surrogate: Array
  indices: Array
  codes: Array
  losses: dict[str, Array]
  stats: dict[str, Array]
  tokens: Array | None


class Quantizer(nn.Module):
  """Latents f[... d] to codes and back.

  Attributes:
    latent_dim: d, the width of the encoder's latents, set by the encoder. At
      least 1 channel.
    projection: whether there are learned linear maps from latents to codes and
      back; with "mlp" the map to codes is an MLP, the map back linear. Without
      them codes are as wide as the latents. One of True, False, "mlp".
    post_quant: a convolution between codes and latents, or None.
    dtype: of `codes_to_latents`, set by `model.dtype`; assignment is always
      f32. One of "float32", "bfloat16".
  """

  # q; index shapes have an axis of q when it is above 1.
  codes_per_token: ClassVar[int] = 1
  # -1 where a code may be left out.
  lowest_index: ClassVar[int] = 0
  # Codebook tables that `update_codebook` moves; schedules may freeze them.
  ema_tables: ClassVar[Sequence[str]] = ()
  # (gh, gw), the only grid of tokens it takes; None for any.
  only_grid: ClassVar[tuple[int, int] | None] = None
  # Fields that only training reads: if only these differ, equal leaves give
  # equal codes.
  training_fields: ClassVar[Sequence[str]] = ()
  # Checked when built: (field, possible values), and fields above 0 or None.
  choices: ClassVar[Sequence[tuple[str, Sequence[str]]]] = ()
  positive: ClassVar[Sequence[str]] = ()

  latent_dim: int
  projection: bool | str = True
  post_quant: PostQuantSpec | None = None
  dtype: str = 'float32'

  def __post_init__(self):
    one_of('quantizer.projection', self.projection, (True, False, 'mlp'))
    for field, options in self.choices:
      one_of(f'quantizer.{field}', getattr(self, field), options)
    for field in self.positive:
      value = getattr(self, field)
      if value is not None and not 0 < value < math.inf:
        raise UserError(f'quantizer.{field}={value} must be above 0')
    super().__post_init__()

  # -- what a subclass defines ---------------------------------------------
  @property
  def codebook_size(self) -> int:
    """K, the number of codes; 0 if the quantizer is continuous."""
    raise NotImplementedError

  @property
  def code_width(self) -> int:
    """c, the channels of a code, `code_dim` or the latents' width."""
    return self.code_dim or self.latent_dim

  @property
  def index_axes(self) -> tuple[str, ...]:
    """Names of the axes of one image's indices."""
    return ('gh', 'gw') + (('q',) if self.codes_per_token > 1 else ())

  def index_shape(self, grid: tuple[int, int]) -> tuple[int, ...]:
    """The shape of the indices of a grid of tokens."""
    q = self.codes_per_token
    return (*grid, q) if q > 1 else tuple(grid)

  @property
  def loss_names(self) -> tuple[str, ...]:
    """The losses that a config may weight. A call always returns those in
    `LOSSES`, and the others (regularisers) on request."""
    return ()

  @property
  def draws(self) -> bool:
    """Whether training draws random numbers (`random` of a call)."""
    return False

  def make_project_in(self) -> nn.Module:
    """[... d] -> [... c]."""
    if self.projection == 'mlp':
      return MLP(self.code_width)
    return nn.Dense(self.code_width, precision='highest')

  def make_project_out(self) -> nn.Module:
    """[... c] -> [... d]."""
    return nn.Dense(self.latent_dim, dtype=self.dtype, precision='highest')

  def from_code_space(self, z: Array) -> Array:
    """The inverse projection, [... c] -> [... d]."""
    return self.project_out(z)

  def setup_codes(self) -> None:
    """Makes the subclass's parameters and codebook."""

  def table(self, name: str, std: float, shape: tuple[int, ...]) -> nn.Variable:
    """A normal f32 table of the collection "codebook"."""
    init = nn.initializers.normal(std)
    make = lambda: init(self.make_rng('params'), shape)  # noqa: E731
    return self.variable('codebook', name, make)

  def _assign(self, z: Array, train: bool, random: Any) -> tuple[Array, Array]:
    """f32[... c] -> (surrogate f32[... c], indices i32[...])."""
    raise NotImplementedError

  def _gradient_path(self, surrogate: Array, codes: Array) -> Array:
    """f32[... c] that the codes' gradient passes through in training."""
    return surrogate

  def _perturbed(self, codes: Array, random: Any) -> Array:
    """Codes as the decoder reads them in training."""
    return codes

  def _regulariser(self, name: str, z: Array, surrogate: Array) -> Array:
    """f32[], a loss in `loss_names` that is not in `LOSSES`.

    Args:
      name: the loss's.
      z: f32[... c], the input of `_assign`.
      surrogate: its output.
    """
    raise NotImplementedError

  def _lookup(self, indices: Array) -> Array:
    """i32[...] -> codes f32[... c]."""
    raise NotImplementedError

  @property
  def search_names(self) -> tuple[tuple[str, str], ...]:
    """(name, table name) of each search in `latents_to_searches`; searches in
    the same table share its name."""
    return (('', ''),)

  def _searches(self, z: Array) -> list[Search]:
    """f32[... c] -> the search of each code of a token."""
    surrogate, indices = self._assign(z, False, None)
    return [Search(surrogate, None, indices)]

  def _losses(self, z: Array, indices: Array, codes: Array) -> dict[str, Array]:
    """{name: f32[]} of surrogate, indices and codes."""
    return {n: LOSSES[n](z, codes) for n in self.loss_names if n in LOSSES}

  def _stats(self, z: Array, indices: Array, train: bool) -> dict[str, Array]:
    """Sums over the batch: counts i32[q k], and what the update needs."""
    counts = code_ops.count_codes(indices, self.codebook_size)
    return {'counts': counts[None]}

  def _tokens(self, z: Array, codes: Array, random: Any) -> Array | None:
    """f32[b c] for `update_codebook`, computed from one token of each sample
    of f32[b ... c] and its code; or None."""
    return None

  def init_codebook(
    self, codebook: dict, z: Array, rng: Array, tokens: int | None = None
  ) -> dict:
    """The codebook initialized from a run's first tokens f32[n c]; pure.

    `tokens` is how many a step has, if not n.
    """
    return codebook

  def update_codebook(self, codebook: dict, stats: dict) -> dict:
    """The codebook updated by one optimizer step's summed stats, which include
    "tokens" f32[n q c] if the call returns any; pure."""
    return codebook

  def baked_codebook(self) -> dict[str, Any]:
    """The table that inference reads: {} or {"codes": f32[k c]}."""
    return {}

  def training_codebook(self, tables: dict) -> dict:
    """The training codebook from a tokenizer's tables on disk, without the
    tables that are baked from weights."""
    return {n: x for n, x in tables.items() if n != 'codes'}

  def rescale_average(self, codebook: dict, indices: float) -> dict:
    """A training codebook whose averages have the size that they reach at so
    many indices a step; pure."""
    return codebook

  # -- what the base computes ----------------------------------------------
  def setup(self):
    c, d = self.code_width, self.latent_dim
    if self.projection:
      self.project_in = self.make_project_in()
      self.project_out = self.make_project_out()
    elif c != d:
      raise UserError(
        f'quantizer.projection=False needs codes as wide as the latents: '
        f'codes have {c} channels, latents {d}; set projection=True or make '
        'the two equal'
      )
    if self.post_quant is not None:
      kernel = self.post_quant.kernel
      self.post_conv = nn.Conv(
        c if self.post_quant.space == 'code' else d,
        (kernel, kernel),
        dtype=self.dtype,
        precision='highest',
      )
    self.setup_codes()

  def to_code_space(self, latents: Array) -> Array:
    """f[... d] -> f32[... c], what codes are compared with."""
    z = latents.astype(jnp.float32)
    return self.project_in(z) if self.projection else z

  def codes_to_latents(self, codes: Array) -> Array:
    """Codes f32[... c] -> z_q f[... d]: the one path from codes to decoder."""
    z = codes.astype(self.dtype)
    if self.post_quant is not None and self.post_quant.space == 'code':
      z = self._convolve(z)
    z = self.from_code_space(z) if self.projection else z
    if self.post_quant is not None and self.post_quant.space == 'latent':
      z = self._convolve(z)
    return z

  def _convolve(self, z: Array) -> Array:
    if self.post_quant.kernel == 1:
      flat = z.reshape(-1, 1, 1, z.shape[-1])
      return self.post_conv(flat).reshape(z.shape)
    if z.ndim < 4:
      raise UserError(
        f'quantizer.post_quant.kernel={self.post_quant.kernel} needs a grid '
        f'[b gh gw c], got shape {z.shape}'
      )
    return self.post_conv(z)

  def __call__(
    self,
    latents: Array,
    *,
    train: bool = False,
    random: Mapping[str, Array] | None = None,
    losses: Sequence[str] = (),
  ) -> QuantizerOutput:
    """Quantizes f[... d].

    Args:
      latents: any leading shape; a post_quant kernel above 1 needs [b gh gw].
      train: whether gradients pass straight through and stats hold what the
        codebook's update needs; else the looked-up codes are used unchanged.
      random: what a quantizer that `draws` uses to draw in training (`rngs` is
        already an argument of linen's `apply`): "samples", a key for each entry
        of the first axis, and "temperature", f32[], for a Gumbel quantizer.
        Without it nothing is drawn.
      losses: names of losses; those that are regularisers are computed too.

    Returns:
      A `QuantizerOutput`; `codes` equal `indices_to_codes(indices)` bitwise.
    """
    z = self.to_code_space(latents)
    found = self._quantize(z, train, random, losses)
    quantized, codes, decoded = None, found.codes, found.codes
    if train:
      quantized = self.codes_to_latents(codes)
      path = self._gradient_path(found.surrogate, codes)
      codes = code_ops.straight_through(path, codes)
      decoded = self._perturbed(codes, random)
    return QuantizerOutput(
      z_q=self.codes_to_latents(decoded),
      codes=codes,
      indices=found.indices,
      losses=found.losses,
      stats=found.stats,
      quantized=quantized,
      tokens=found.tokens,
    )

  def _quantize(
    self, z: Array, train: bool, random: Any, losses: Sequence[str]
  ) -> Quantized:
    """The call in code space, on f32[... c]; other arguments as there."""
    surrogate, indices = self._assign(z, train, random)
    codes = self._lookup(indices)
    values = self._losses(surrogate, indices, codes)
    values |= self._regularisers(losses, z, surrogate)
    stats = self._stats(surrogate, indices, train)
    tokens = None
    if train and random:
      tokens = self._tokens(surrogate, codes, random)
    tokens = None if tokens is None else tokens[:, None]
    return Quantized(surrogate, indices, codes, values, stats, tokens)

  def _regularisers(
    self, losses: Sequence[str], z: Array, surrogate: Array
  ) -> dict[str, Array]:
    """{name: f32[]} of the regularisers in `losses`."""
    return {
      name: self._regulariser(name, z, surrogate)
      for name in self.loss_names
      if name in losses and name not in LOSSES
    }

  def latents_to_indices(self, latents: Array) -> Array:
    """f[... d] -> i32[...]: the call up to the indices."""
    return self._assign(self.to_code_space(latents), False, None)[1]

  def latents_to_searches(self, latents: Array) -> list[Search]:
    """f[... d] -> the search of each code, named by `search_names`."""
    return self._searches(self.to_code_space(latents))

  def indices_to_codes(self, indices: Array) -> Array:
    """i32[...] in [0, K) -> codes f32[... c]."""
    return self._lookup(indices)

  def codes_to_indices(self, codes: Array) -> Array:
    """Codes f32[... c] -> i32[...]: the inverse of `indices_to_codes`."""
    raise NotImplementedError

  def all_codes(self) -> Array:
    """f32[K c], the code of each index."""
    return self._lookup(jnp.arange(self.codebook_size))


def commitment(surrogate: Array, codes: Array) -> Array:
  """mean (surrogate - sg(codes))^2: pulls latents to their codes."""
  return jnp.mean((surrogate - jax.lax.stop_gradient(codes)) ** 2)


def codebook_loss(surrogate: Array, codes: Array) -> Array:
  """mean (sg(surrogate) - codes)^2: pulls codes to their latents."""
  return jnp.mean((jax.lax.stop_gradient(surrogate) - codes) ** 2)


LOSSES = {'commit': commitment, 'codebook': codebook_loss}


class MLP(nn.Module):
  """f32[... d] -> f32[... c]: two layers with a GELU between, d wide."""

  features: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = nn.Dense(x.shape[-1], precision='highest', name='dense0')(x)
    x = jax.nn.gelu(x, approximate=False)
    return nn.Dense(self.features, precision='highest', name='dense1')(x)


def check_quantizer(quantizer: Quantizer, where: str) -> None:
  """Checks that another package's class returns what `Quantizer` specifies;
  shapes only.

  Values are left to that class's own tests: the round trip is bitwise.

  Raises:
    UserError: names what it returns instead.
  """
  q, kind = quantizer, type(quantizer).__name__
  if q.index_axes[:2] != ('gh', 'gw'):
    return  # it may take some grids only
  z = jax.ShapeDtypeStruct((2, 2, 3, q.latent_dim), jnp.float32)

  def outputs(key, z):
    variables = q.init(key, z)
    found = {
      f'call(train={train})': q.apply(
        variables, z, train=train, losses=q.loss_names
      )
      for train in (False, True)
    }
    if q.codebook_size:
      indices = q.apply(variables, z, method='latents_to_indices')
      codes = q.apply(variables, indices, method='indices_to_codes')
      found |= {'latents_to_indices': indices, 'indices_to_codes': codes}
    return variables, found

  variables, found = jax.eval_shape(outputs, jax.random.key(0), z)
  if others := variables.keys() - {'params', 'codebook'}:
    raise UserError(
      f'{where}: {kind} has variables in the collection "{min(others)}"; a '
      'quantizer has "params" and "codebook"'
    )
  codes = 'float32', (2, 2, 3, q.code_width)
  wanted = {'z_q': (q.dtype, z.shape), 'codes': codes}
  wanted |= {f'losses/{n}': ('float32', ()) for n in q.loss_names}
  alone = {}
  if q.codebook_size:
    indices = 'int32', (2, *q.index_shape((2, 3)))
    wanted['indices'] = indices
    wanted['stats/counts'] = 'int32', (q.codes_per_token, q.codebook_size)
    alone = {'latents_to_indices': indices, 'indices_to_codes': codes}
  have = trees.flatten(found)
  calls = sorted(found.keys() - alone.keys())
  wanted = {f'{c}/{n}': want for c in calls for n, want in wanted.items()}
  for name, (dtype, shape) in (wanted | alone).items():
    leaf = have.get(name)
    gives = 'nothing' if leaf is None else f'{leaf.dtype}{list(leaf.shape)}'
    if gives != f'{dtype}{list(shape)}':
      raise UserError(
        f'{where}: {kind} returns {gives} as {name} for latents '
        f'{list(z.shape)}; it must return {dtype}{list(shape)}'
      )


def check_indices(quantizer: Quantizer, where: str) -> None:
  """Checks that indices of random latents lie in [0, K), at random weights.

  Raises:
    UserError: the least and the greatest index.
  """
  q = quantizer
  if not q.codebook_size or q.index_axes[:2] != ('gh', 'gw'):
    return
  z = jax.random.normal(jax.random.key(0), (4, 8, 8, q.latent_dim))

  @jax.jit
  def ends(key, z):
    variables = q.init(key, z)
    indices = q.apply(variables, z, method='latents_to_indices')
    return indices.min(), indices.max()

  low, high = map(int, ends(jax.random.key(1), z))
  if low < 0 or high >= q.codebook_size:
    raise UserError(
      f'{where}: {type(q).__name__} returns indices from {low} to {high}, but '
      f'its codebook_size is {q.codebook_size}'
    )


def check_size(given: str, size: int) -> None:
  """Raises a UserError unless an i32 index can count `size` codes; its message
  starts with the fields `given`."""
  if size >= 2**31:
    raise UserError(
      f'{given} make too many codes; an i32 index holds fewer than 2147483648: '
      'give a token several smaller codes (a grouped quantizer)'
    )


def init_codes_from_data(z: Array, num_codes: int, rng: Array) -> Array:
  """Codes f32[num_codes c] at tokens f32[n c] of a batch, drawn by `rng`.

  If there are enough tokens, all codes are different tokens. With fewer, tokens
  repeat, perturbed by a hundredth of their standard deviation so that no two
  codes tie.
  """
  n, k = z.shape[0], num_codes
  order_key, noise_key = jax.random.split(rng)
  order = jax.random.permutation(order_key, n)
  codes = z[order[jnp.arange(k) % n]].astype(jnp.float32)
  repeated = (jnp.arange(k) >= n)[:, None]
  noise = jax.random.normal(noise_key, codes.shape) * z.std(0) * 0.01
  return codes + jnp.where(repeated, noise, 0.0)


SEEDED_FROM = 4  # tokens a code, at most, that `spread_codes` looks at


def spread_codes(z: Array, num_codes: int, rng: Array) -> Array:
  """Codes f32[num_codes c] at tokens f32[n c] by k-means++ (Arthur and
  Vassilvitskii, SODA 2007): each is drawn in proportion to its squared distance
  from the nearest code so far. Once every token coincides with a code, codes
  repeat, perturbed as in `init_codes_from_data`.
  """
  order_key, first_key, draw_key, noise_key = jax.random.split(rng, 4)
  order = jax.random.permutation(order_key, len(z))
  z = z[order[: SEEDED_FROM * num_codes]].astype(jnp.float32)
  draws = jax.random.uniform(draw_key, (num_codes,))
  noise = jax.random.normal(noise_key, (num_codes, z.shape[-1]))
  noise = noise * z.std(0) * 0.01

  def add(i, found):
    codes, distances = found
    ends = jnp.cumsum(distances)
    row = jnp.searchsorted(ends, draws[i] * ends[-1], side='right')
    left = ends[-1] > 0
    code = z[jnp.where(left, jnp.minimum(row, len(z) - 1), i % len(z))]
    code = jnp.where(left, code, code + noise[i])
    distances = jnp.minimum(distances, ((z - code) ** 2).sum(-1))
    return codes.at[i].set(code), distances

  first = z[jax.random.randint(first_key, (), 0, len(z))]
  codes = jnp.zeros((num_codes, z.shape[-1])).at[0].set(first)
  distances = ((z - first) ** 2).sum(-1)
  return jax.lax.fori_loop(1, num_codes, add, (codes, distances))[0]


class TableQuantizer(Quantizer):
  """Codes are the `num_codes` rows of a table f32[k c]."""

  @property
  def codebook_size(self):
    return self.num_codes

  def _table(self) -> Array:
    """f32[k c], the codes."""
    raise NotImplementedError

  def _lookup(self, indices):
    return code_ops.lookup(self._table(), indices)

  def baked_codebook(self):
    return {'codes': self._table()}

  def codes_to_indices(self, codes):
    return nearest_code(codes.astype(jnp.float32), self._table())


class Nearest(TableQuantizer):
  """The nearest row of the table.

  Losses that spread usage over the codes: "entropy" (arXiv 2310.05737), the
  mean entropy of a token's softmax over codes minus gamma times the entropy of
  the mean softmax; "diversity", the second term alone; "orthogonal" (arXiv
  2112.00384), for tables trained by gradients. The softmax is of
  -distance^2 / temperature.

  Attributes:
    rotation: whether gradients pass to a token through the rotation and scaling
      that takes it to its code (arXiv 2410.06424), instead of unchanged.
    entropy_gamma: in the loss "entropy", the weight of the entropy of the
      tokens' mean. At least 0.
    entropy_temperature: of the softmax over codes, in units of squared
      distances. Above 0.
  """

  training_fields = ('rotation', 'entropy_gamma', 'entropy_temperature')
  positive = ('num_codes', 'code_dim', 'entropy_temperature')

  rotation: bool = False
  entropy_gamma: float = 1.0
  entropy_temperature: float = 0.01

  def __post_init__(self):
    super().__post_init__()
    at_least(0, 'quantizer.', self, 'entropy_gamma')

  def _searches(self, z):
    surrogate, indices = self._assign(z, False, None)
    return [Search(surrogate, self._table(), indices)]

  def _of_softmax(self, surrogate: Array) -> tuple[Array, Array]:
    """The tokens and codes between which the softmax measures distances."""
    return surrogate, self._table()

  def _gradient_path(self, surrogate, codes):
    if self.rotation:
      return code_ops.rotate(surrogate, codes)
    return surrogate

  def _regulariser(self, name, z, surrogate):
    if name == 'orthogonal':
      return code_ops.orthogonality(self._table())
    tokens, spread = code_ops.code_entropies(
      *self._of_softmax(surrogate), self.entropy_temperature
    )
    if name == 'diversity':
      return -spread
    return tokens - self.entropy_gamma * spread


class Continuous(Quantizer):
  """The continuous autoencoder (RAE, arXiv 2510.11690): codes equal latents.

  There are no indices. The same config, trainer and decoder then train a
  continuous tokenizer.

  Attributes:
    code_dim: with `projection`, the width of a linear bottleneck; None for the
      latents' width. At least 1 channel, or None.
  """

  positive = ('code_dim',)

  projection: bool | str = False
  code_dim: int | None = None

  @property
  def codebook_size(self):
    return 0

  def __call__(self, latents, *, train=False, random=None, losses=()):
    """Latents f[... d] as `codes` f32[... c]; no indices."""
    codes = self.to_code_space(latents)
    return QuantizerOutput(
      z_q=self.codes_to_latents(codes),
      codes=codes,
      indices=None,
      losses={},
      stats={},
    )

  def latents_to_indices(self, latents):
    raise UserError(
      'this tokenizer is continuous (quantizer "none") and has no indices; '
      'use encode for its latents'
    )

  indices_to_codes = codes_to_indices = latents_to_indices
