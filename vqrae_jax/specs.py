"""Static nouns: what a network looks like, as frozen and hashable dataclasses.

A spec holds numbers and words, never arrays, modules or functions, so it may
be a static argument of `jax.jit` and be written to JSON as it is. `scan`,
`remat` and `dtype` say how to run, not what is computed: they stay out of a
tokenizer's `config.json` and of its fingerprint.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from vqrae_jax.errors import UserError, did_you_mean

RUN_OPTIONS = ('scan', 'remat', 'dtype')
# Younger than format 1: absent from a `config.json` where they say nothing,
# so that the fingerprint of what came before them stays.
LATER_FIELDS = {
  'num_registers': 0,
  'bound': 'tanh',
  'adapter_in': 'linear',
  'adapter_out': 'linear',
  'code_scale': 'rms',
  'token_map': False,
  'basis_init': 'tokens',
}
DTYPES = ('float32', 'bfloat16')
RESIZES = ('bicubic', 'bilinear')
LATENT_NORMS = ('none', 'channel', 'position')

Spec = TypeVar('Spec')


def _one_of(where: str, value: Any, options: tuple) -> None:
  if value not in options:
    raise UserError(f'{where}={value!r}{did_you_mean(value, options)}')


def _positive(where: str, **numbers: float) -> None:
  for name, value in numbers.items():
    if value <= 0:
      raise UserError(f'{where}.{name}={value} must be above 0')


@dataclasses.dataclass(frozen=True)
class PixelNorm:
  """Per-channel mean and std of pixels in [0, 1]: x -> (x - mean) / std."""

  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  std: tuple[float, float, float] = (0.5, 0.5, 0.5)

  def __post_init__(self):
    if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
      raise UserError(
        f'pixel_norm wants 3 means and 3 stds above 0, got mean={self.mean} '
        f'std={self.std}'
      )


IMAGENET_NORM = PixelNorm((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclasses.dataclass(frozen=True)
class ViTSpec:
  """A plain pre-norm vision transformer, encoder or decoder.

  `grid` is the native grid of patches (rows, columns); others are reached by
  interpolating positions. `layer_scale` is the initial value, None for none.
  `qk_norm` normalises queries and keys over the full width (InternViT).
  Of the `num_prefix_tokens` the last `num_registers` have no position; the
  others (cls) have one each if `prefix_has_posemb`.
  """

  width: int
  depth: int
  mlp_dim: int
  num_heads: int
  patch_size: int
  grid: tuple[int, int]
  norm: str = 'layer'
  norm_eps: float = 1e-6
  act: str = 'gelu'
  qkv_bias: bool = True
  qk_norm: bool = False
  layer_scale: float | None = None
  posemb: str = 'learned'
  num_prefix_tokens: int = 0
  prefix_has_posemb: bool = False
  num_registers: int = 0
  scan: bool = True
  remat: bool = False
  dtype: str = 'float32'

  def __post_init__(self):
    _positive(
      'vit',
      width=self.width,
      depth=self.depth,
      mlp_dim=self.mlp_dim,
      num_heads=self.num_heads,
      patch_size=self.patch_size,
      norm_eps=self.norm_eps,
    )
    _one_of('vit.norm', self.norm, ('layer', 'rms'))
    _one_of('vit.act', self.act, ('gelu', 'gelu_tanh', 'swiglu'))
    _one_of('vit.posemb', self.posemb, ('learned', 'sincos2d'))
    _one_of('vit.dtype', self.dtype, DTYPES)
    whole = all(isinstance(n, int) and n > 0 for n in self.grid)
    if len(self.grid) != 2 or not whole:
      raise UserError(f'vit.grid={self.grid} must be (rows, columns)')
    if self.num_prefix_tokens < 0:
      raise UserError(
        f'vit.num_prefix_tokens={self.num_prefix_tokens} must not be negative'
      )
    if not 0 <= self.num_registers <= self.num_prefix_tokens:
      raise UserError(
        f'vit.num_registers={self.num_registers} must lie in '
        f'[0, {self.num_prefix_tokens}]: registers are some of the '
        'vit.num_prefix_tokens'
      )
    if self.width % self.num_heads:
      raise UserError(
        f'vit.width={self.width} must be a multiple of '
        f'vit.num_heads={self.num_heads}'
      )
    if self.posemb == 'sincos2d' and self.width % 4:
      raise UserError(
        f'vit.width={self.width} must be a multiple of 4 for '
        'vit.posemb="sincos2d"'
      )


@dataclasses.dataclass(frozen=True)
class EncoderSpec:
  """A vision encoder: its ViT and how its family treats pixels and positions.

  `output_norm` is "affine" (the published final norm), "plain" (the same
  without its affine parameters) or "none" (before the final norm).
  `final_norm` is False where the family publishes none: "affine" is then the
  identity.
  """

  vit: ViTSpec
  pixel_norm: PixelNorm = PixelNorm()
  output_norm: str = 'affine'
  final_norm: bool = True
  resize: str = 'bicubic'
  posemb_resize: str = 'bicubic'
  posemb_antialias: bool = False

  def __post_init__(self):
    _one_of(
      'encoder.output_norm', self.output_norm, ('affine', 'plain', 'none')
    )
    _one_of('encoder.resize', self.resize, RESIZES)
    _one_of('encoder.posemb_resize', self.posemb_resize, RESIZES)


@dataclasses.dataclass(frozen=True)
class DecoderSpec:
  """A ViT decoder that paints `patch_size` pixels a token, de-normalised."""

  vit: ViTSpec
  pixel_norm: PixelNorm = PixelNorm()


@dataclasses.dataclass(frozen=True)
class LatentsSpec:
  """How latents are normalised before they are quantised.

  `norm` is "none", "channel" (a mean and a std a channel, any grid) or
  "position" (one for each position's channels too); `grid` is then the grid
  of tokens (rows, columns) that the statistics are of, else None.
  """

  norm: str = 'none'
  grid: tuple[int, int] | None = None

  def __post_init__(self):
    _one_of('latents.norm', self.norm, LATENT_NORMS)
    if (self.norm == 'position') != (self.grid is not None):
      raise UserError(
        f'latents.norm="{self.norm}" with latents.grid={self.grid}: the grid '
        'of tokens, (16, 16) for instance, goes with norm="position" and with '
        'no other'
      )
    if self.grid is not None:
      whole = all(isinstance(n, int) and n > 0 for n in self.grid)
      if len(self.grid) != 2 or not whole:
        raise UserError(f'latents.grid={self.grid} must be (rows, columns)')


@dataclasses.dataclass(frozen=True)
class PostQuantSpec:
  """A convolution on the codes: before ("code") or after ("latent") the
  projection out. `kernel` is its side in tokens, odd."""

  kernel: int = 1
  space: str = 'code'

  def __post_init__(self):
    _one_of('post_quant.space', self.space, ('code', 'latent'))
    if self.kernel < 1 or self.kernel % 2 == 0:
      raise UserError(
        f'post_quant.kernel={self.kernel} must be an odd number (1, 3, 5, …)'
      )


def _plain(value: Any) -> Any:
  """Lists as tuples, so that a spec built from a config is hashable."""
  if isinstance(value, list | tuple):
    return tuple(_plain(v) for v in value)
  return value


def _accepts(kind: Any, value: Any) -> bool:
  """Whether a field annotated `kind` may hold `value` (top level only)."""
  if kind is Any:
    return True
  if typing.get_origin(kind) in (types.UnionType, typing.Union):
    return any(_accepts(k, value) for k in typing.get_args(kind))
  kind = typing.get_origin(kind) or kind
  if kind is type(None):
    return value is None
  if kind is float:
    return isinstance(value, int | float) and not isinstance(value, bool)
  if kind is int:
    return isinstance(value, int) and not isinstance(value, bool)
  return isinstance(value, kind)


def _nested(kind: Any) -> type | None:
  """The dataclass that a field annotated `X` or `X | None` holds, if any."""
  for k in (kind, *typing.get_args(kind)):
    if dataclasses.is_dataclass(k):
      return k
  return None


def _placed(message: str, where: str) -> str:
  """A spec's own error, which cannot know where in a config it stands, with
  that place ahead of it: "optim.b1=…" of "discriminator.optim"."""
  where = where.removeprefix('config.')
  parent, dot, section = where.rpartition('.')
  if where == 'config' or message.startswith(where):
    return message
  if message.startswith(f'{section}.'):
    return f'{parent}{dot}{message}'
  return f'{where}: {message}'


def build_spec(cls: type[Spec], section: Mapping[str, Any], where: str) -> Spec:
  """`cls(**section)`, nested specs included, with errors a user can mend.

  Args:
    cls: a dataclass (a spec, or a linen module).
    section: its fields, as a plain mapping; absent ones take the default.
    where: the section's name in the config, for the errors.

  Raises:
    UserError: an unknown, missing or mistyped key.
  """
  hints = typing.get_type_hints(cls)
  fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
  if fields.pop('parent', None):  # a linen module's own, and so is its name
    del fields['name']
  values = {}
  for key, value in section.items():
    if key not in fields:
      raise UserError(f'unknown key "{where}.{key}"{did_you_mean(key, fields)}')
    kind = hints[key]
    inner = _nested(kind)
    if inner is not None and isinstance(value, Mapping):
      value = build_spec(inner, value, f'{where}.{key}')
    value = _plain(value)
    if not _accepts(kind, value):
      shown = f'of type {getattr(kind, "__name__", kind)}'
      if inner is not None:
        names = ', '.join(f.name for f in dataclasses.fields(inner))
        shown = f'a section, dict(…) of: {names}'
      raise UserError(f'{where}.{key}={value!r} must be {shown}')
    values[key] = value
  for key, field in fields.items():
    needed = (
      field.default is dataclasses.MISSING
      and field.default_factory is dataclasses.MISSING
    )
    if needed and key not in values:
      raise UserError(f'missing key "{where}.{key}"')
  try:
    return cls(**values)
  except UserError as e:
    raise UserError(_placed(str(e), where)) from None


def merge_sections(base: Mapping, over: Mapping) -> dict:
  """`base` with the keys of `over`, nested mappings merged in turn."""
  merged = dict(base)
  for key, value in over.items():
    if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
      value = merge_sections(merged[key], value)
    merged[key] = value
  return merged
