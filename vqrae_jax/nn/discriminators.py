"""The discriminators that a config may name, and how one is built.

Each is `apply(variables, images f32[b h w 3] in [0, 1]) -> logits f32[b n]`,
with the collection "params"; the DINO one has "backbone" and "spectral" too.
"""

import dataclasses
from collections.abc import Mapping

from vqrae_jax.errors import UserError, choose
from vqrae_jax.nn.dino import DINO_S8, DinoDiscriminator
from vqrae_jax.nn.patchgan import PatchGAN
from vqrae_jax.specs import RunOptions, build_spec, merge_sections

DISCRIMINATORS = {'patch': PatchGAN, 'dino': DinoDiscriminator}

Discriminator = PatchGAN | DinoDiscriminator


def build(section: Mapping, run: RunOptions | None = None) -> Discriminator:
  """The discriminator that `section` names.

  Args:
    section: dict(name="patch"|"dino", **its fields). Fields of `vit` that are
      not given are DINO ViT-S/8's.
    run: dtype and remat, if the fields omit them; None: f32 without remat.

  Raises:
    UserError: an unknown name, field or value.
  """
  fields = {k: v for k, v in section.items() if k != 'name'}
  cls = choose(DISCRIMINATORS, section.get('name', ''), 'discriminator')
  where = 'discriminator.fields'
  options = dataclasses.asdict(run or RunOptions())
  if cls is DinoDiscriminator:
    given = fields.get('vit', {})
    if not isinstance(given, Mapping):
      raise UserError(f'{where}.vit={given!r} must be a section of fields')
    vit = dataclasses.asdict(DINO_S8) | options
    fields['vit'] = merge_sections(vit, given)
  else:
    fields = options | fields
  return build_spec(cls, fields, where)
