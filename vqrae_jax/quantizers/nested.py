"""Several codes per token: what residual, grouped and multi-scale quantizers
share. (Each has a file of its own, with its papers.)

Each code is chosen by a quantizer from another file, the field `quantizer`. Its
variables are stacked along a first axis, one slice per table, under the name
"parts"; its methods are applied to a slice.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from vqrae_jax.errors import UserError
from vqrae_jax.ops import codes as code_ops
from vqrae_jax.ops.nearest import nearest_code
from vqrae_jax.quantizers import base

PARTS = 'parts'
# Values required of a nested quantizer's fields, if it has them; and a stage's.
_ALONE = {'rotation': False, 'noise_dropout': 0.0, 'token_map': False}
_SUBTRACTED = {'distance': 'l2', 'normalize': False}


def value_of(module: base.Quantizer, name: str, default: Any) -> Any:
  """A field's value, or `default` if there is no such field. (`getattr` of an
  absent attribute calls a linen module's `setup`.)"""
  names = {f.name for f in dataclasses.fields(module)}
  return getattr(module, name) if name in names else default


def innermost(
  quantizer: base.Quantizer, key: str
) -> tuple[base.Quantizer, str]:
  """(what chooses each code, its config key), given those of the outer one."""
  while isinstance(quantizer, Nested):
    quantizer, key = quantizer.quantizer, f'{key}.quantizer'
  return quantizer, key


class Nested(base.Quantizer):
  """A quantizer whose codes are chosen by others.

  Attributes:
    quantizer: the section, dict(name=…), of the quantizer that chooses one
      code. It works in code space: `projection`, `post_quant` and `dtype` are
      those of the outer one.
  """

  # Names of the quantizers that may be nested.
  allowed: ClassVar[Sequence[str]] = ()

  quantizer: base.Quantizer | None = None

  def __post_init__(self):
    super().__post_init__()
    for field, right in _ALONE.items():
      if value_of(self.quantizer, field, right) != right:
        raise UserError(
          f'quantizer.quantizer.{field} is of a quantizer alone, not of the '
          f'parts of several; set it to {right!r}'
        )

  @property
  def index_axes(self):
    return 'gh', 'gw', 'q'  # also of one code

  def index_shape(self, grid):
    return (*grid, self.codes_per_token)

  @property
  def codes_per_part(self) -> int:
    """How many indices a part has per token."""
    return self.quantizer.codes_per_token

  @property
  def tables(self) -> int:
    """How many parts have variables of their own."""
    raise NotImplementedError

  @property
  def part_dim(self) -> int:
    """Channels of a part whose code width follows the latents."""
    return self.latent_dim

  @property
  def part(self) -> base.Quantizer:
    """The quantizer that chooses one code, without variables."""
    part = self.quantizer.clone(
      parent=None, name=None, latent_dim=self.part_dim
    )
    return part.clone(latent_dim=part.code_width)

  @property
  def codebook_size(self):
    """K of each index."""
    return self.quantizer.codebook_size

  @property
  def code_width(self):
    return self.part.code_width

  @property
  def loss_names(self):
    return self.quantizer.loss_names

  @property
  def draws(self):
    return self.quantizer.draws

  @property
  def ema_tables(self):
    return tuple(f'{PARTS}/{name}' for name in self.quantizer.ema_tables)

  @property
  def training_fields(self):
    return tuple(f'quantizer.{n}' for n in self.quantizer.training_fields)

  def setup_codes(self):
    if not self.is_initializing() or any(
      self.has_variable(c, PARTS) for c in ('params', 'codebook')
    ):
      return
    part, key = self.part, self.make_rng('params')
    z = jnp.zeros((1, part.code_width))
    made = [part.init(k, z) for k in jax.random.split(key, self.tables)]
    for collection, variables in _stacked(made).items():
      self.put_variable(collection, PARTS, variables)

  def _call(self, i: int, method: str, *args: Any) -> Any:
    """A method of part i."""
    i = i if self.tables > 1 else 0
    variables = {
      c: jax.tree.map(lambda x: x[i], self.get_variable(c, PARTS))
      for c in ('params', 'codebook')
      if self.has_variable(c, PARTS)
    }
    return self.part.apply(variables, *args, method=method)

  def update_codebook(self, codebook, stats):
    """Updates each table with the stats of its part; a shared table with their
    sum, and with the tokens of all parts, sample after sample."""
    if PARTS not in codebook:
      return codebook
    shape = self.tables, -1, self.codes_per_part

    def grouped(name, x):
      if name != 'tokens':
        return x.reshape(*shape, *x.shape[1:]).sum(1)
      x = jnp.moveaxis(x.reshape(len(x), *shape, x.shape[-1]), 1, 0)
      return x.reshape(self.tables, -1, *x.shape[3:])

    stats = {name: grouped(name, x) for name, x in stats.items()}
    return self._each(self.part.update_codebook, codebook, stats)

  def _each(self, fn: Callable, codebook: dict, *trees: Any) -> dict:
    """fn(codebook, slices of `trees`) for every table; returns `codebook`
    itself if fn changes nothing."""
    old = _slices(codebook[PARTS], self.tables)
    more = [_slices(tree, self.tables) for tree in trees]
    new = [fn(*args) for args in zip(old, *more, strict=True)]
    if all(a is b for a, b in zip(new, old, strict=True)):
      return codebook
    return {PARTS: _stacked(new)}

  def baked_codebook(self):
    baked = [self._call(i, 'baked_codebook') for i in range(self.tables)]
    return {PARTS: _stacked(baked)} if baked[0] else {}

  def training_codebook(self, tables):
    if PARTS not in tables:
      return tables
    return self._each(self.part.training_codebook, tables)

  def rescale_average(self, codebook, indices):
    if PARTS not in codebook:
      return codebook
    return self._each(
      lambda old: self.part.rescale_average(old, indices / self.tables),
      codebook,
    )

  def all_codes(self):
    """f32[q K c], q = 1 where all share a table."""
    found = [self._call(i, 'all_codes') for i in range(self.tables)]
    return jnp.concatenate([x.reshape(-1, *x.shape[-2:]) for x in found])


def random_of_part(random: Any, i: int) -> Any:
  """`random` for part i, independent of the other parts."""
  fold = jax.vmap(jax.random.fold_in, (0, None))
  return jax.tree.map(lambda keys: fold(keys, i), random)


def mean_of(losses: Sequence[dict[str, Array]]) -> dict[str, Array]:
  """The mean of each of the parts' losses."""
  return jax.tree.map(lambda *x: jnp.mean(jnp.stack(x)), *losses)


def joined(trees: Sequence[Any], axis: int = 0) -> Any:
  """The parts' statistics or tokens, concatenated; None if they are None."""
  return jax.tree.map(lambda *x: jnp.concatenate(x, axis), *trees)


def _stacked(trees: Sequence[Any]) -> Any:
  return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def _slices(tree: Any, count: int) -> list:
  return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(count)]


def check_residual(quantizer: base.Quantizer) -> None:
  """Checks that a code can be subtracted from the token that it quantizes.

  Raises:
    UserError: the quantizer compares tokens by angle or scaled.
  """
  for field, right in _SUBTRACTED.items():
    have = value_of(quantizer, field, right)
    if have != right:
      raise UserError(
        f'quantizer.quantizer.{field}={have!r}: a stage compares the residual '
        f'of a token unchanged and subtracts its code; set it to {right!r}'
      )


def check_shared_start(quantizer: base.Quantizer) -> None:
  """Checks that a table shared by all stages starts at random tokens of each.

  Raises:
    UserError: it is initialized otherwise.
  """
  for field in ('data_init', 'basis_init'):
    if value_of(quantizer, field, None) == 'kmeans++':
      raise UserError(
        f'quantizer.quantizer.{field}="kmeans++" reads the tokens of one '
        f'stage, but here all stages share a table; leave {field} out'
      )


def check_stage_codes(codes: Array, count: int, width: int) -> None:
  """Raises a UserError unless `codes` are f32[... count c]."""
  if codes.shape[-2:] != (count, width):
    raise UserError(
      f'codes_to_indices takes the codes of {count} stages one by one, '
      f'[… {count} {width}], as indices_to_stage_codes gives them (their sum '
      f'does not say which they were); got shape {codes.shape}'
    )


def rows_of_all_stages(
  rest: Array,
  counts: Sequence[int],
  num_codes: int,
  take: Callable[[Array, int], Array],
  leave: Callable[[Array, int, Array], Array],
  rng: Array,
) -> Array:
  """f32[num_codes c]: initial rows for one table that all stages share.

  Each stage gets a share of the rows, placed at its tokens: the residual after
  the shares before it. A table at the first stage's tokens alone would be too
  coarse for all other stages.

  Args:
    rest: what the first stage quantizes.
    counts: how many tokens each stage has; shares are in proportion.
    num_codes: rows of the table.
    take: (rest, stage) -> the stage's tokens f32[n c].
    leave: (rest, stage, its codes f32[n c]) -> the residual.
    rng: draws the tokens.
  """
  ends = np.cumsum(counts) / np.sum(counts) * num_codes
  ends = np.maximum(np.round(ends).astype(int), 1)
  table = jnp.zeros((0, take(rest, 0).shape[-1]))
  for i, end in enumerate(ends):
    tokens, key = take(rest, i), jax.random.fold_in(rng, i)
    rows = base.init_codes_from_data(tokens, int(end) - len(table), key)
    table = jnp.concatenate([table, rows])
    nearest = nearest_code(tokens, table)
    rest = leave(rest, i, code_ops.lookup(table, nearest))
  return table
