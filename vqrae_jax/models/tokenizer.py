"""The tokenizer: encoder, quantizer, decoder, and the size rule between them.

Latents may be normalized before the quantizer and denormalized after it:
`encode` and the decoder use the encoder's own latents (`models/latents.py`).

The size rule: h and w are multiples of the decoder's patch p_d. The encoder,
with its patch p_e, sees the image resized to (h/p_d) p_e x (w/p_d) p_e, so
that both have the grid (h/p_d, w/p_d). The output is h x w. Any aspect ratio
works.

Training, `reconstruct` and `decode_from_indices` share one path from codes to
pixels. At inference an optimization barrier precedes it, so that fusions
before the barrier cannot change the values after it.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from jax.typing import ArrayLike
from jaxtyping import Array

from vqrae_jax import plugins, quantizers
from vqrae_jax.encoders import ENCODERS
from vqrae_jax.errors import UserError, choose, did_you_mean
from vqrae_jax.models.decoder import DECODERS, Decoder, FeatureDecoder
from vqrae_jax.models.encoder import (
  Encoder,
  EncoderModule,
  Fusion,
  check_encoder,
)
from vqrae_jax.models.latents import LatentNorm
from vqrae_jax.ops import images as image_ops
from vqrae_jax.ops import trees
from vqrae_jax.quantizers.nested import PARTS
from vqrae_jax.specs import (
  LATER_FIELDS,
  RUN_OPTIONS,
  TORCH_BICUBIC,
  DecoderSpec,
  EncoderSpec,
  FeatureDecoderSpec,
  LatentsSpec,
  build_spec,
  merge_sections,
)
from vqrae_jax.types import TokenizerOutput

# The state of an EMA codebook's average: not part of a tokenizer.
TRAINING_ONLY = ('codebook/quantizer/counts', 'codebook/quantizer/sums')


def is_training_only(name: str) -> bool:
  """Whether a leaf of that name is, in a quantizer or in a nested one."""
  return name.replace(f'{PARTS}/', '') in TRAINING_ONLY


class Tokenizer(nn.Module):
  """Images to tokens and back; frozen, hashable, static under jit."""

  encoder_spec: EncoderSpec | EncoderModule
  quantizer: quantizers.Quantizer
  decoder_spec: DecoderSpec
  latents_spec: LatentsSpec = LatentsSpec()
  features_spec: FeatureDecoderSpec | None = None

  def setup(self):
    spec = self.encoder_spec
    if isinstance(spec, EncoderSpec):
      self.encoder = Encoder(spec)
    else:  # under the name "encoder"
      self.encoder = spec.clone(parent=None, name=None)
    self.decoder = Decoder(self.decoder_spec)
    if self.layers:
      self.fusion = Fusion(spec)
    if self.features_spec:
      width = spec.vit.width if self.layers else self.latent_dim
      self.feature_decoder = FeatureDecoder(self.features_spec, width)
    self.latents = LatentNorm(self.latents_spec, self.latent_dim)

  @property
  def patch_size(self) -> int:
    """The side of a token in pixels. h and w are multiples of it."""
    return self.decoder_spec.vit.patch_size

  @property
  def native_size(self) -> tuple[int, int]:
    """The native image size (h, w) in pixels: the only one that a quantizer
    with scales takes; else that at which neither the decoder's positions nor
    per-position statistics are resampled."""
    own = self.quantizer.only_grid or self.latents_spec.grid
    gh, gw = own or self.decoder_spec.vit.grid
    return gh * self.patch_size, gw * self.patch_size

  @property
  def latent_dim(self) -> int:
    """Channels of the continuous latents."""
    return self.encoder_spec.latent_dim

  @property
  def layers(self) -> tuple[int, ...] | None:
    """The encoder's blocks that are read, or None for the last one only."""
    return _layers(self.encoder_spec)

  @property
  def codebook_size(self) -> int:
    """K, the vocabulary size; 0 if continuous. Indices lie in [0, K)."""
    return self.quantizer.codebook_size

  def grid(self, h: int, w: int) -> tuple[int, int]:
    """(gh, gw), the grid of tokens of an h x w image.

    Raises:
      UserError: h or w is not a multiple of the decoder's patch.
    """
    p = self.patch_size
    if h % p or w % p or h < 1 or w < 1:
      near = [max(round(s / p), 1) * p for s in (h, w)]
      raise UserError(
        f'an image of {h}x{w} is no multiple of the decoder patch {p}; '
        f'resize or crop it, to {near[0]}x{near[1]} for instance'
      )
    return h // p, w // p

  def index_shape(self, h: int, w: int) -> tuple[int, ...]:
    """The shape of the indices of one h x w image: (gh, gw), (gh, gw, q) with
    q codes per token, or (n,) with several scales."""
    return self.quantizer.index_shape(self.grid(h, w))

  def encode(self, images: ArrayLike) -> Array:
    """f[b h w 3] in [0, 1] (or uint8) -> latents f[b gh gw d]."""
    return self.fuse(self.read(images))

  def read(self, images: ArrayLike) -> Array:
    """The encoder's own output: the latents, or with `encoder.layers` the
    blocks' outputs f[b gh gw t d]."""
    images = image_ops.to_unit(images)
    grid = self.grid(*images.shape[1:3])
    p = self.encoder_spec.patch_size
    size = (grid[0] * p, grid[1] * p)
    if (method := self.encoder_spec.resize) == TORCH_BICUBIC:
      images = image_ops.resize(images, size, 'bicubic', antialias=False)
    else:
      images = image_ops.resize_exact(images, size, method)
    return self.encoder(images)

  def fuse(self, encoded: Array) -> Array:
    """`read`'s outputs -> latents f[b gh gw d]."""
    return self.fusion(encoded) if self.layers else encoded

  def project_to_code_space(self, images: ArrayLike) -> Array:
    """Images -> f32[n c], the tokens that codes are compared with."""
    z = self.quantizer.to_code_space(
      self.latents.normalise(self.encode(images))
    )
    return z.reshape(-1, z.shape[-1])

  def encode_to_indices(self, images: ArrayLike) -> Array:
    """Images -> i32[b *index_shape]; needs no decoder variables."""
    return self.quantizer.latents_to_indices(self._quantized(images))

  def _quantized(self, images: ArrayLike) -> Array:
    """Images -> the quantizer's input f[b gh gw d]."""
    latents = jax.lax.optimization_barrier(self.encode(images))
    return jax.lax.optimization_barrier(self.latents.normalise(latents))

  def search_codes(self, images: ArrayLike) -> list:
    """`encode_to_indices` as `Search`es, which have what each code is chosen
    by, in the order of `quantizer.search_names`."""
    return self.quantizer.latents_to_searches(self._quantized(images))

  def decode_from_indices(self, indices: ArrayLike) -> Array:
    """i32[b *index_shape] -> f32[b h w 3] not clipped; needs no encoder
    variables."""
    return self.decode_codes(self.quantizer.indices_to_codes(indices))[0]

  def decode(self, z_q: Array) -> tuple[Array, Array, dict | None]:
    """z_q f[b gh gw d] -> (images f32[b h w 3] not clipped, the decoder's
    features, the feature decoder's predictions, None without one)."""
    predictions = None
    if self.features_spec:
      predictions = self.feature_decoder(z_q)
      z_q = predictions['deep']
    return *self.decoder(z_q), predictions

  def decode_codes(self, codes: Array) -> tuple[Array, Array, dict | None]:
    """`decode` of codes f32[b gh gw c]."""
    codes = jax.lax.optimization_barrier(codes)
    z_q = self.latents.inverse(self.quantizer.codes_to_latents(codes))
    return jax.lax.optimization_barrier(self.decode(z_q))

  def __call__(
    self,
    images: ArrayLike,
    *,
    train: bool = False,
    random: Mapping[str, Array] | None = None,
    losses: Sequence[str] = (),
    noise: Array | None = None,
    encoded: Array | None = None,
  ) -> TokenizerOutput:
    """One pass: images f[b h w 3] in [0, 1] to a reconstruction.

    Args:
      images: f[b h w 3] in [0, 1], or uint8.
      train: gradients pass straight through the quantizer.
      random: the keys, one for each image, that a stochastic quantizer draws
        with (`quantizers/base.py`).
      losses: names of losses; those that are regularisers of the quantizer
        are computed too.
      noise: f32[b gh gw d], added to the latents before they are normalized,
        but not to the returned latents.
      encoded: `read(images)`, if already computed.
    """
    if encoded is None:
      encoded = self.read(images)
    latents = self.fuse(encoded)
    if not train:
      latents = jax.lax.optimization_barrier(latents)
    z = latents if noise is None else latents + noise.astype(latents.dtype)
    z = self.latents.normalise(z)
    if not train:
      z = jax.lax.optimization_barrier(z)
    out = self.quantizer(z, train=train, random=random, losses=losses)
    out = out.replace(z_q=self.latents.inverse(out.z_q))
    if out.quantized is not None:
      out = out.replace(quantized=self.latents.inverse(out.quantized))
    if train:
      images, features, predictions = self.decode(out.z_q)
    else:
      images, features, predictions = self.decode_codes(out.codes)
    return TokenizerOutput(
      images=images,
      latents=latents,
      quantizer=out,
      features=features,
      layers=encoded if self.layers else None,
      predictions=predictions,
    )

  def baked_codebook(self) -> dict[str, Any]:
    """The code table that inference reads: {"codes": f32[k c]} or {}, or
    {"parts": …} of stacked ones."""
    return self.quantizer.baked_codebook()

  def with_run_options(self, **options: Any) -> 'Tokenizer':
    """The same tokenizer run with another dtype, scan or remat."""

    def changed(spec):
      if isinstance(spec, EncoderModule):
        return spec.clone(**options)
      return spec and dataclasses.replace(
        spec, vit=dataclasses.replace(spec.vit, **options)
      )

    quantizer = self.quantizer
    if 'dtype' in options:
      quantizer = quantizer.clone(dtype=options['dtype'])
    return self.clone(
      encoder_spec=changed(self.encoder_spec),
      decoder_spec=changed(self.decoder_spec),
      features_spec=changed(self.features_spec),
      quantizer=quantizer,
    )


def _layers(spec: EncoderSpec | EncoderModule) -> tuple[int, ...] | None:
  # Another package's field of that name is something else.
  return spec.layers if isinstance(spec, EncoderSpec) else None


def _encoder_spec(
  section: Mapping, options: Mapping, trusted: Collection[str] | None
) -> EncoderSpec | EncoderModule:
  section = dict(section)
  if plugins.is_name(section.get('name')):
    name, where = section.pop('name'), 'model.encoder'
    cls = plugins.load_class(name, EncoderModule, f'{where}.name', trusted)
    for key in RUN_OPTIONS:
      if key in section:
        raise UserError(f'{where}.{key} is not set here: set model.{key}')
    module = build_spec(cls, section | options, where)
    check_encoder(module, where)
    return module
  if 'name' in section:
    row = choose(ENCODERS, section.pop('name'), 'encoder')
    section = merge_sections(row, section)
  section = merge_sections(section, {'vit': options})
  return build_spec(EncoderSpec, section, 'model.encoder')


def _decoder_spec(
  section: Mapping, options: Mapping, encoder: EncoderSpec | EncoderModule
) -> DecoderSpec:
  section = dict(section)
  name = section.pop('name', None)
  if name == 'symmetric':
    if not isinstance(encoder, EncoderSpec):
      raise UserError(
        'model.decoder.name="symmetric" takes the sizes of the encoder, but '
        f'{type(encoder).__name__} is not a ViT of this package; name one of '
        f'{", ".join(DECODERS)}'
      )
    sizes = ('width', 'depth', 'num_heads', 'mlp_dim', 'patch_size', 'grid')
    vit = dict(DECODERS['B']) | {k: getattr(encoder.vit, k) for k in sizes}
    section = merge_sections({'vit': vit}, section)
  elif name is not None:
    row = choose(DECODERS | {'symmetric': None}, name, 'decoder')
    section = merge_sections({'vit': row}, section)
  section = merge_sections(
    {'pixel_norm': dataclasses.asdict(encoder.pixel_norm)}, section
  )
  section = merge_sections(section, {'vit': options})
  return build_spec(DecoderSpec, section, 'model.decoder')


def _features_spec(
  section: Mapping | None,
  decoder: DecoderSpec,
  encoder: EncoderSpec | EncoderModule,
) -> FeatureDecoderSpec | None:
  if section is None:
    return None
  section = merge_sections({'vit': dataclasses.asdict(decoder.vit)}, section)
  spec = build_spec(FeatureDecoderSpec, section, 'model.feature_decoder')
  layers = _layers(encoder)
  if spec.shallow and len(layers or ()) < 2:
    raise UserError(
      'model.feature_decoder.shallow predicts the first of encoder.layers and '
      f'needs two or more: encoder.layers={layers}'
    )
  return spec


def build_tokenizer(
  model_config: Any, *, trusted: Collection[str] | None = None
) -> Tokenizer:
  """The tokenizer that a config's `model` section describes; no arrays yet.

  Args:
    model_config: a mapping (ConfigDict or dict) with

      - encoder: dict(name=…), a name of the encoder table, and/or fields of
        its spec; or dict(name="package.module:Class"), an `EncoderModule`,
        and its fields.
      - quantizer: dict(name=…), a name of `quantizers.QUANTIZERS` or
        "package.module:Class", a `quantizers.Quantizer`; and its fields.
      - decoder: dict(name=…), "B", "L", "XL" or "symmetric", and/or its
        fields.
      - latents: dict(norm=…), "none" (if absent), "channel" or "position",
        the last with grid=(rows, columns).
      - feature_decoder: dict(vit=dict(…), shallow=False), or absent: a
        `FeatureDecoderSpec`; fields missing from `vit` are the decoder's.
      - dtype: what all networks compute in, f32 by default. One of "float32",
        "bfloat16".
      - scan: whether blocks run as a loop over one block, the default; False
        unrolls it.
      - remat: whether the gradient recomputes blocks, which saves memory and
        costs time; "dots" keeps the outputs of dense layers, which saves and
        costs less. False by default. One of True, False, "dots".

    trusted: the packages that such a name may import; None allows any, since
      a config is the caller's own.

  Returns:
    A linen module. `init(key, images)` makes its variables: the collections
    "params" and, if the quantizer has tables or latents are normalized,
    "codebook".

  Raises:
    UserError: an unknown or impossible key, with the nearest right one.
  """
  to_dict = getattr(model_config, 'to_dict', None)
  config = to_dict() if to_dict else dict(model_config)
  known = ('encoder', 'quantizer', 'decoder', 'latents')
  known += ('feature_decoder', *RUN_OPTIONS)
  for key in config:
    if key not in known:
      raise UserError(f'unknown key "model.{key}"{did_you_mean(key, known)}')
  config['latents'] = config.get('latents') or {}
  for key in known[:4]:
    if not isinstance(config.get(key), Mapping):
      raise UserError(
        f'model.{key}={config.get(key)!r} must be a section, dict(…)'
      )
  options = {k: config[k] for k in RUN_OPTIONS if k in config}
  encoder = _encoder_spec(config['encoder'], options, trusted)
  decoder = _decoder_spec(config['decoder'], options, encoder)
  latents = build_spec(LatentsSpec, config['latents'], 'model.latents')
  fuse = encoder.fuse if isinstance(encoder, EncoderSpec) else ''
  if latents.norm != 'none' and fuse == 'attention':
    raise UserError(
      f'model.latents.norm="{latents.norm}" needs statistics from before '
      'training, but encoder.fuse="attention" trains the latents; use '
      'norm="none"'
    )
  return Tokenizer(
    encoder_spec=encoder,
    quantizer=quantizers.build(
      config['quantizer'],
      encoder.latent_dim,
      options.get('dtype', 'float32'),
      trusted,
    ),
    decoder_spec=decoder,
    latents_spec=latents,
    features_spec=_features_spec(
      config.get('feature_decoder'), decoder, encoder
    ),
  )


def describe(tokenizer: Tokenizer) -> dict:
  """The inverse of `build_tokenizer`: the full model config without the run
  options.

  The result is plain JSON; `build_tokenizer(describe(t))` computes the same
  as t.
  """

  def old_fields(fields, kind='', cls=None):
    def later(name, value):
      keys = {name, f'{kind}.{name}'} & LATER_FIELDS.keys()
      # For our encoders it is the default; for others it need not be.
      default = cls is None or value == getattr(cls, name)
      return default and any(value == LATER_FIELDS[key] for key in keys)

    return {n: value for n, value in fields.items() if not later(n, value)}

  def spec_fields(spec):
    if isinstance(spec, EncoderModule):
      name = plugins.name_of(type(spec))
      return {'name': name, **module_fields(spec, RUN_OPTIONS)}
    fields = dataclasses.asdict(spec)
    for option in RUN_OPTIONS:
      del fields['vit'][option]
    fields['vit'] = old_fields(fields['vit'])
    return old_fields(fields)

  def module_fields(module, left_out):
    fields = {
      f.name: getattr(module, f.name)
      for f in dataclasses.fields(module)
      if f.name not in ('parent', 'name', *left_out)
    }
    specs = {n: x for n, x in fields.items() if dataclasses.is_dataclass(x)}
    for name, value in specs.items():
      if not isinstance(value, nn.Module):
        fields[name] = dataclasses.asdict(value)
    return fields

  def quantizer_fields(quantizer, outer=('latent_dim', 'dtype')):
    fields = module_fields(quantizer, outer)
    if isinstance(quantizer, quantizers.Nested):
      fields['quantizer'] = quantizer_fields(
        quantizer.quantizer, quantizers.OUTER
      )
    name = quantizers.name_of(quantizer)
    # Another package's FSQ has FSQ's defaults.
    kind = 'fsq' if isinstance(quantizer, quantizers.FSQ) else name
    return {'name': name, **old_fields(fields, kind, type(quantizer))}

  model = {
    'encoder': spec_fields(tokenizer.encoder_spec),
    'quantizer': quantizer_fields(tokenizer.quantizer),
    'decoder': spec_fields(tokenizer.decoder_spec),
  }
  # Added after format 1, like LATER_FIELDS, but a section.
  if tokenizer.latents_spec != LatentsSpec():
    model['latents'] = dataclasses.asdict(tokenizer.latents_spec)
  if tokenizer.features_spec is not None:
    model['feature_decoder'] = spec_fields(tokenizer.features_spec)
  return model


def packages_of(tokenizer: Tokenizer) -> tuple[str, ...]:
  """The packages, other than ours, whose code a tokenizer uses."""
  model = describe(tokenizer)
  names = (model[part].get('name') for part in ('encoder', 'quantizer'))
  return tuple({plugins.package_of(n) for n in names if plugins.is_name(n)})


@functools.lru_cache(maxsize=64)
def variable_shapes(tokenizer: Tokenizer) -> dict[str, jax.ShapeDtypeStruct]:
  """{leaf name: shape} of a tokenizer's variables, the baked table included."""
  p = tokenizer.patch_size
  image = jax.ShapeDtypeStruct((1, p, p, 3), 'float32')

  def make(key, image):
    variables = tokenizer.init(key, image)
    baked = tokenizer.apply(variables, method='baked_codebook')
    return variables, {'codebook': {'quantizer': baked}}

  shapes = jax.eval_shape(make, jax.random.key(0), image)
  leaves = trees.flatten(shapes[0]) | trees.flatten(shapes[1])
  return {n: leaf for n, leaf in leaves.items() if not is_training_only(n)}
