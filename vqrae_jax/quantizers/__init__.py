"""The quantizers that a config may name, and how one is built.

Each has its own file, one idea and one arXiv number; or it is a class of
another package, given as "package.module:Class". To the tokenizer they are all
alike: `base.Quantizer` is the protocol.
"""

from collections.abc import Collection, Mapping

from vqrae_jax import plugins
from vqrae_jax.errors import UserError, choose
from vqrae_jax.quantizers.base import (
  Continuous,
  Quantizer,
  check_quantizer,
)
from vqrae_jax.quantizers.fsq import FSQ
from vqrae_jax.quantizers.grouped import Grouped
from vqrae_jax.quantizers.gumbel import Gumbel
from vqrae_jax.quantizers.lfq import BSQ, LFQ
from vqrae_jax.quantizers.multiscale import MultiScale
from vqrae_jax.quantizers.nested import Nested
from vqrae_jax.quantizers.residual import Residual
from vqrae_jax.quantizers.simvq import SimVQ
from vqrae_jax.quantizers.vq import VQ
from vqrae_jax.specs import build_spec

QUANTIZERS = {
  'fsq': FSQ,
  'lfq': LFQ,
  'bsq': BSQ,
  'vq': VQ,
  'simvq': SimVQ,
  'gumbel': Gumbel,
  'none': Continuous,
  # Made of another quantizer, which chooses each of several codes.
  'residual': Residual,
  'grouped': Grouped,
  'multiscale': MultiScale,
}
# Fields that a nested quantizer inherits from the outer one.
OUTER = ('latent_dim', 'dtype', 'projection', 'post_quant')


def build(
  section: Mapping,
  latent_dim: int,
  dtype: str,
  trusted: Collection[str] | None = None,
) -> Quantizer:
  """The quantizer that `section` names, for latents of `latent_dim`.

  Args:
    section: dict(name=…, **its fields); the name is one of `QUANTIZERS` or
      names a class of another package.
    latent_dim: the encoder's width.
    dtype: of the map from codes to latents.
    trusted: packages that may be imported for it; None: any.

  Raises:
    UserError: an unknown name or field, or a class that does not do what
      `base.Quantizer` says.
  """
  fields = {k: v for k, v in section.items() if k != 'name'}
  name, where = section.get('name', ''), 'model.quantizer'
  if others := plugins.is_name(name):
    cls = plugins.load_class(name, Quantizer, f'{where}.name', trusted)
  else:
    cls = choose(QUANTIZERS, name, 'quantizer')
  for key in ('latent_dim', 'dtype'):
    if key in fields:
      raise UserError(
        f'model.quantizer.{key} is not set here: it follows '
        f'{"the encoder" if key == "latent_dim" else "model.dtype"}'
      )
  fields = dict(latent_dim=latent_dim, dtype=dtype) | fields
  if issubclass(cls, Nested):
    fields['quantizer'] = _nested(cls, fields, latent_dim, where)
  quantizer = build_spec(cls, fields, where)
  if others:
    check_quantizer(quantizer, where)
  return quantizer


def _nested(
  outer: type[Nested], fields: Mapping, latent_dim: int, where: str
) -> Quantizer:
  """The quantizer that `fields` of an outer one name."""
  section, key = fields.get('quantizer'), f'{where}.quantizer'
  if not isinstance(section, Mapping):
    raise UserError(
      f'{key}={section!r} must be a section, dict(name=…), that names the '
      f'quantizer of each code: {", ".join(outer.allowed)}'
    )
  fields = {k: v for k, v in section.items() if k != 'name'}
  name = section.get('name', '')
  if name in [*QUANTIZERS] and name not in outer.allowed:
    raise UserError(
      f'{key}.name="{name}" cannot be nested in {outer.__name__}, which takes '
      f'{", ".join(outer.allowed)}'
    )
  table = {name: QUANTIZERS[name] for name in outer.allowed}
  cls = choose(table, name, f'{key}.name')
  for name in OUTER:
    if name in fields:
      outer = name in ('projection', 'post_quant')
      raise UserError(
        f'{key}.{name} is not set here: the nested quantizer lies in code '
        + (f'space; set {where}.{name}' if outer else 'space, in f32')
      )
  for name in ('adapter_in', 'adapter_out') if cls is FSQ else ():
    if fields.get(name, 'linear') != 'linear':
      raise UserError(
        f'{key}.{name}={fields[name]!r}: a nested quantizer has no projection '
        f'of its own; leave it out, and set {where}.projection'
      )
  fields |= dict(latent_dim=latent_dim, projection=False)
  if issubclass(cls, Nested):
    fields['quantizer'] = _nested(cls, fields, latent_dim, key)
  return build_spec(cls, fields, key)


def name_of(quantizer: Quantizer) -> str:
  """A quantizer's name: in the table, or "package.module:Class"."""
  cls = type(quantizer)
  return next(
    (n for n, c in QUANTIZERS.items() if cls is c), plugins.name_of(cls)
  )
