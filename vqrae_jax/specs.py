"""Specifications of networks, as frozen and hashable dataclasses.

A spec holds numbers and strings, never arrays, modules or functions, so it may
be a static argument of `jax.jit` and be written to JSON as it is. `scan`,
`remat` and `dtype` say how to run, not what is computed: they stay out of a
tokenizer's `config.json` and of its fingerprint.
"""

import dataclasses
import itertools
import math
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

from vqrae_jax.errors import UserError, did_you_mean

RUN_OPTIONS = ('scan', 'remat', 'dtype')
# Fields added after format 1. At these values they are omitted from
# `config.json`, so that older tokenizers keep their fingerprints. Each value is
# the default in every class with such a field, or in the named quantizer.
LATER_FIELDS = {
  'num_registers': 0,
  'embed_norm': False,
  'bound': 'tanh',
  'adapter_in': 'linear',
  'adapter_out': 'linear',
  'code_scale': 'rms',
  'token_map': False,
  'basis_init': 'tokens',
  'layers': None,
  'fuse': 'mean',
  'add_final_mean': False,
  'rotation': False,
  'entropy_gamma': 1.0,
  'entropy_temperature': 0.01,
  'fsq.entropy_temperature': 0.1,
  'preserve_symmetry': False,
  'noise_dropout': 0.0,
  'revive_below': 0.1,
  'affine': False,
  'vq.distance': 'l2',  # of this quantizer: another's is older
}
DTYPES = ('float32', 'bfloat16')
REMATS = (False, True, 'dots')
ACTS = ('gelu', 'gelu_tanh', 'quick_gelu', 'swiglu')
POSEMBS = ('learned', 'sincos2d', 'rope2d')
RESIZES = ('bicubic', 'bilinear')
TORCH_BICUBIC = 'torch_bicubic'
OUTPUT_NORMS = ('affine', 'plain', 'none')
FUSES = ('mean', 'concat', 'attention')
LATENT_NORMS = ('none', 'channel', 'position')
INT_BOUND = 2**31  # of whole numbers in a config: JAX counts in 32 bits

Spec = TypeVar('Spec')


def one_of(key: str, value: Any, options: Collection) -> None:
  """Raises a UserError unless `value`, a config's `key`, is an option."""
  if value not in options:
    raise UserError(f'{key}={value!r}{did_you_mean(value, options)}')


def at_least(least: int, where: str, spec: Any, *names: str) -> None:
  """Raises a UserError if a field is below `least`; None counts as absent."""
  for name in names:
    value = getattr(spec, name)
    if value is not None and value < least:
      raise UserError(f'{where}{name}={value} must be at least {least}')


@dataclasses.dataclass(frozen=True)
class RunOptions:
  """How a network of a loss is run.

  Attributes:
    dtype: what it computes in. One of "float32", "bfloat16".
    remat: whether what its gradient needs is computed again instead of kept.
  """

  dtype: str = 'float32'
  remat: bool = False

  def __post_init__(self):
    one_of('dtype', self.dtype, DTYPES)

  @property
  def precision(self) -> str | None:
    """The precision of matrix products, which is the highest in f32."""
    return 'highest' if self.dtype == 'float32' else None


def _grid(where: str, grid: Any) -> None:
  if len(grid) != 2 or not all(isinstance(n, int) and n > 0 for n in grid):
    raise UserError(f'{where}.grid={grid} must be (rows, columns)')


@dataclasses.dataclass(frozen=True)
class PixelNorm:
  """Pixels in [0, 1], normalised by channel: x -> (x - mean) / std.

  Attributes:
    mean: of red, green and blue. Each any number.
    std: of red, green and blue. Each above 0.
  """

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

  Attributes:
    width: channels of a token, a multiple of `num_heads` (and four times that
      with "rope2d"; of 4 with "sincos2d"). At least 1 channel.
    depth: how many blocks. At least 1.
    mlp_dim: hidden width of a block's MLP. At least 1 channel.
    num_heads: attention heads. At least 1.
    patch_size: the side of a patch. At least 1 pixel.
    grid: the native grid of patches (rows, columns); others are reached by
      interpolating positions. Each at least 1 patch.
    norm: LayerNorm or RMSNorm. One of "layer", "rms".
    norm_eps: added to the variance. Above 0.
    act: the MLP's activation. One of "gelu", "gelu_tanh", "quick_gelu",
      "swiglu".
    qkv_bias: whether queries, keys and values have biases; with "qv" the keys
      alone have none (DINOv3). One of True, False, "qv".
    qk_norm: whether queries and keys are normalised over the full width
      (InternViT).
    layer_scale: the initial value of the trained factor on what a block adds
      (arXiv 2103.17239); None for no factor. Any number, or None.
    posemb: positions: a trained table, fixed sines and cosines, or the
      rotation of queries and keys by coordinates that any grid has, with no
      table (DINOv3). One of "learned", "sincos2d", "rope2d".
    num_prefix_tokens: tokens before the patches (cls, registers), which are not
      part of the output. At least 0 tokens.
    prefix_has_posemb: whether prefix tokens other than registers have
      positions.
    num_registers: how many of the prefix tokens, the last ones, are registers,
      which have no position; at most `num_prefix_tokens`. At least 0 tokens.
    embed_norm: whether tokens are normalised before the blocks, and patches
      embedded without a bias (CLIP).
    scan: whether blocks run as a loop over one block, except on a GPU without
      `remat`; set by `model.scan`.
    remat: whether a block's gradient recomputes the block from its input;
      "dots" keeps the outputs of its dense layers and recomputes the rest.
      Set by `model.remat`. One of True, False, "dots".
    dtype: what it computes in, set by `model.dtype`. One of "float32",
      "bfloat16".
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
  qkv_bias: bool | str = True
  qk_norm: bool = False
  layer_scale: float | None = None
  posemb: str = 'learned'
  num_prefix_tokens: int = 0
  prefix_has_posemb: bool = False
  num_registers: int = 0
  embed_norm: bool = False
  scan: bool = True
  remat: bool | str = False
  dtype: str = 'float32'

  def __post_init__(self):
    at_least(1, 'vit.', self, 'width', 'depth', 'mlp_dim', 'num_heads')
    at_least(1, 'vit.', self, 'patch_size')
    if self.norm_eps <= 0:
      raise UserError(f'vit.norm_eps={self.norm_eps} must be above 0')
    one_of('vit.norm', self.norm, ('layer', 'rms'))
    one_of('vit.act', self.act, ACTS)
    one_of('vit.qkv_bias', self.qkv_bias, (True, False, 'qv'))
    one_of('vit.posemb', self.posemb, POSEMBS)
    one_of('vit.dtype', self.dtype, DTYPES)
    one_of('vit.remat', self.remat, REMATS)
    _grid('vit', self.grid)
    if not 0 <= self.num_registers <= self.num_prefix_tokens:
      raise UserError(
        f'vit.num_registers={self.num_registers} must lie in [0, vit.'
        f'num_prefix_tokens={self.num_prefix_tokens}]: registers are some of '
        'the prefix tokens'
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
    head = self.width // self.num_heads
    if self.posemb == 'rope2d' and head % 4:
      raise UserError(
        f'vit.width={self.width} gives vit.num_heads={self.num_heads} heads of '
        f'{head} channels, which must be a multiple of 4 for '
        'vit.posemb="rope2d"'
      )


@dataclasses.dataclass(frozen=True)
class EncoderSpec:
  """A vision encoder: its ViT and how its family treats pixels and positions.

  With `layers` the latents are computed from the outputs of several blocks, and
  the blocks above the last one listed are omitted.

  Attributes:
    vit: its transformer.
    pixel_norm: mean and std of its pixels.
    output_norm: the norm of the latents: the published final norm, the same
      without its affine parameters, or none; a tuple has one for each of
      `layers`. Each one of "affine", "plain", "none".
    final_norm: False where the family publishes no final norm: "affine" is
      then the identity.
    resize: how images are resized to the encoder's size: as PIL does, or with
      "torch_bicubic" as RAE does, without antialias. One of "bicubic",
      "bilinear", "torch_bicubic".
    posemb_resize: how learned positions are resampled to another grid. One of
      "bicubic", "bilinear".
    posemb_antialias: whether that resizing is antialiased.
    layers: the blocks, counted from 0 and in ascending order, whose outputs
      become the latents; None: only the last block. Each at least 0, or None.
    fuse: how several outputs are combined: their mean, their channels
      concatenated, or a trained cross-attention from the last of them to the
      others. One of "mean", "concat", "attention".
    add_final_mean: whether the mean over tokens of the last output is added to
      the mean of outputs.
  """

  vit: ViTSpec
  pixel_norm: PixelNorm = PixelNorm()
  output_norm: str | tuple[str, ...] = 'affine'
  final_norm: bool = True
  resize: str = 'bicubic'
  posemb_resize: str = 'bicubic'
  posemb_antialias: bool = False
  layers: tuple[int, ...] | None = None
  fuse: str = 'mean'
  add_final_mean: bool = False

  def __post_init__(self):
    one_of('encoder.resize', self.resize, (*RESIZES, TORCH_BICUBIC))
    one_of('encoder.posemb_resize', self.posemb_resize, RESIZES)
    one_of('encoder.fuse', self.fuse, FUSES)
    for norm in self.norms:
      one_of('encoder.output_norm', norm, OUTPUT_NORMS)
    layers, depth = self.layers, self.vit.depth
    if layers is None:
      if (self.fuse, self.add_final_mean) != ('mean', False):
        raise UserError(
          'encoder.fuse and encoder.add_final_mean need encoder.layers, the '
          'blocks to fuse: layers=(7, 23) for instance'
        )
    elif not layers or any(
      not low < high for low, high in itertools.pairwise((-1, *layers, depth))
    ):
      raise UserError(
        f'encoder.layers={layers} must be blocks in rising order, 0 to '
        f'{depth - 1}'
      )
    elif self.fuse == 'attention' and len(layers) < 2:
      raise UserError(
        f'encoder.layers={layers}: encoder.fuse="attention" needs two or more'
      )
    if len(self.norms) != len(layers or (0,)):
      raise UserError(
        f'encoder.output_norm={self.output_norm} must be one norm, or one for '
        f'each of encoder.layers={layers}'
      )
    if self.add_final_mean and self.fuse != 'mean':
      raise UserError(
        f'encoder.add_final_mean goes with fuse="mean", not "{self.fuse}"'
      )

  @property
  def norms(self) -> tuple[str, ...]:
    """The norm of each output that is read."""
    if isinstance(self.output_norm, tuple):
      return self.output_norm
    return (self.output_norm,) * len(self.layers or (0,))

  @property
  def patch_size(self) -> int:
    """Pixels of a patch's side."""
    return self.vit.patch_size

  @property
  def computed(self) -> ViTSpec:
    """`vit` up to the last block that is read."""
    if self.layers is None:
      return self.vit
    return dataclasses.replace(self.vit, depth=self.layers[-1] + 1)

  @property
  def latent_dim(self) -> int:
    """Channels of the latents."""
    concat = self.layers is not None and self.fuse == 'concat'
    return self.vit.width * (len(self.layers) if concat else 1)


@dataclasses.dataclass(frozen=True)
class DecoderSpec:
  """A ViT decoder: each token becomes a square of `patch_size` pixels a side.

  Attributes:
    vit: its transformer.
    pixel_norm: pixels are its output times std, plus mean; the encoder's if
      omitted.
  """

  vit: ViTSpec
  pixel_norm: PixelNorm = PixelNorm()


@dataclasses.dataclass(frozen=True)
class FeatureDecoderSpec:
  """A ViT between quantizer and decoder that predicts the encoder's output of
  the last block read ("deep"), which the decoder turns into pixels.

  Attributes:
    vit: its transformer, whose `patch_size` has no effect; omitted fields are
      the decoder's.
    shallow: whether it also predicts the output of the first of
      `encoder.layers`.
  """

  vit: ViTSpec
  shallow: bool = False


@dataclasses.dataclass(frozen=True)
class LatentsSpec:
  """How latents are normalised before they are quantised.

  Attributes:
    norm: by a mean and a std per channel, for any grid, or per channel and
      position. One of "none", "channel", "position".
    grid: with "position", the grid of tokens (rows, columns) that the
      statistics are of, else None. Each at least 1 token, or None.
  """

  norm: str = 'none'
  grid: tuple[int, int] | None = None

  def __post_init__(self):
    one_of('latents.norm', self.norm, LATENT_NORMS)
    if (self.norm == 'position') != (self.grid is not None):
      raise UserError(
        f'latents.norm="{self.norm}" with latents.grid={self.grid}: the grid '
        'of tokens, (16, 16) for instance, goes with norm="position" and with '
        'no other'
      )
    if self.grid is not None:
      _grid('latents', self.grid)


@dataclasses.dataclass(frozen=True)
class PostQuantSpec:
  """A convolution on the codes, in training and in decoding.

  Attributes:
    kernel: its side, an odd number. At least 1 token.
    space: whether it comes before the projection to latents or after it. One of
      "code", "latent".
  """

  kernel: int = 1
  space: str = 'code'

  def __post_init__(self):
    one_of('post_quant.space', self.space, ('code', 'latent'))
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
  """Whether a field annotated `kind` may hold `value`, elements included."""
  args = typing.get_args(kind)
  if kind is Any:
    return True
  if typing.get_origin(kind) in (types.UnionType, typing.Union):
    return any(_accepts(k, value) for k in args)
  if typing.get_origin(kind) is tuple and isinstance(value, tuple):
    if args[-1] is ...:
      args = args[:1] * len(value)
    return len(args) == len(value) and all(map(_accepts, args, value))
  if kind in (int, float):
    if isinstance(value, bool) or not isinstance(value, int | kind):
      return False
    # Comparisons with NaN are False.
    return abs(value) < (INT_BOUND if isinstance(value, int) else math.inf)
  kind = typing.get_origin(kind) or kind
  return isinstance(value, kind or type(None))


def _nested(kind: Any) -> type | None:
  """The dataclass that a field annotated `X` or `X | None` holds, if any."""
  kinds = (kind, *typing.get_args(kind))
  return next((k for k in kinds if dataclasses.is_dataclass(k)), None)


def _fields(cls: type) -> dict[str, tuple[Any, bool]]:
  """{field: (its type, whether it must be given)} of a spec or a module."""
  hints, missing = typing.get_type_hints(cls), dataclasses.MISSING
  module = 'parent' in hints  # a linen module's own field, as its name is
  return {
    f.name: (hints[f.name], f.default is f.default_factory is missing)
    for f in dataclasses.fields(cls)
    if f.init and not (module and f.name in ('parent', 'name'))
  }


def missing_keys(cls: type, section: Mapping, where: str) -> list[str]:
  """The dotted names of all required keys that `section` lacks, including
  those of nested sections."""
  found = []
  for name, (kind, required) in _fields(cls).items():
    inner, value = _nested(kind), section.get(name, {} if required else None)
    if inner and isinstance(value, Mapping):
      found += missing_keys(inner, value, f'{where}.{name}')
    elif required and name not in section:
      found.append(f'{where}.{name}')
  return found


def check_missing(names: Sequence[str]) -> None:
  """Raises a UserError that names all of them, if there are any."""
  if names:
    listed = ', '.join(f'"{name}"' for name in names)
    raise UserError(f'missing key{"s"[: len(names) > 1]} {listed}')


def _at(message: str, where: str) -> str:
  """A spec's error message with its place in the config, which a spec cannot
  know: "optim.b1=…", or "b1=…" in "discriminator.optim"."""
  where = where.removeprefix('config.')
  parent, dot, section = where.rpartition('.')
  if where == 'config' or message.startswith(where):
    return message
  if message.startswith(f'{section}.'):
    return f'{parent}{dot}{message}'
  bare = re.match(r'\w+=', message)
  return f'{where}{"." if bare else ": "}{message}'


def build_spec(cls: type[Spec], section: Mapping[str, Any], where: str) -> Spec:
  """`cls(**section)`, nested specs included, with errors a user can fix.

  Args:
    cls: a dataclass (a spec, or a linen module).
    section: its fields, as a plain mapping; absent ones take the default.
    where: the section's name in the config, for the errors.

  Raises:
    UserError: an unknown or mistyped key, a number that is not finite, or
      missing keys: all of them at once.
  """
  fields, values = _fields(cls), {}
  for key in section:
    if key not in fields:
      raise UserError(f'unknown key "{where}.{key}"{did_you_mean(key, fields)}')
  check_missing(missing_keys(cls, section, where))
  for key, value in section.items():
    kind, _ = fields[key]
    inner = _nested(kind)
    if inner and isinstance(value, Mapping):
      value = build_spec(inner, value, f'{where}.{key}')
    value = values[key] = _plain(value)
    if not _accepts(kind, value):
      wanted = f'of type {kind if typing.get_args(kind) else kind.__name__}'
      if {int, float} & {kind, *typing.get_args(kind)}:
        wanted += f' (finite; integers below {INT_BOUND})'
      if inner:
        names = ', '.join(f.name for f in dataclasses.fields(inner))
        wanted = f'a section, dict(…) of: {names}'
      raise UserError(f'{where}.{key}={value!r} must be {wanted}')
  try:
    return cls(**values)
  except UserError as e:
    raise UserError(_at(str(e), where)) from None


def merge_sections(base: Mapping, over: Mapping) -> dict:
  """`base` with the keys of `over`, nested mappings merged in turn."""
  merged = dict(base)
  for key, value in over.items():
    if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
      value = merge_sections(merged[key], value)
    merged[key] = value
  return merged
