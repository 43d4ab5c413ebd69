"""python -m vqrae_jax.convert --source=hf:ORG/NAME --out=DIR

Published weights to ours, and whole models of the PyTorch project back:

  --source=hf:ORG/NAME[@REV] --out=DIR                an encoder; also a row of
                                                      the table, a folder
  --source=FILE --row=NAME --out=DIR                  an encoder's lone file
  --source=vqrae_torch:FILE --config=… --out=DIR      a whole tokenizer
  --source=rae:FILE --config=… --out=F.safetensors    a decoder, checked
  --source=rae:FILE --out=F.npz                       statistics of latents
  --source=DIR --to=torch --out=F.safetensors         a tokenizer, back

A file of the PyTorch project does not say its heads, pixel norm, activation or
resizing: the config's `model` section does. What it does say is held to that,
whole, before anything is written. A decoder stays in its published names, which
`init.decoder=rae:F.safetensors` reads; without a pickle, and the weights alone.
An encoder's folder is what `load_encoder` and `init.encoder` open.
"""

import ast
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from absl import flags

from vqrae_jax import command, config_flag
from vqrae_jax.encoders import ENCODERS
from vqrae_jax.errors import UserError, did_you_mean
from vqrae_jax.specs import DTYPES
from vqrae_jax.weights import Source, open_weights, parse_source

MODULE = 'vqrae_jax.convert'
EXAMPLE = (
  f'python -m {MODULE} --source=vqrae_torch:ckpt.pt '
  '--config=configs/simvq_siglip_l.py --out=tokenizer'
)
ABOUT = 'a config whose "model" the file is; --config.model.a.b=v changes a key'


def main(argv: list[str]) -> None:
  """Parses flags, converts one source, prints what became of each key."""
  values = config_flag.parse(argv, MODULE, EXAMPLE, ABOUT, _flags)
  command.required(values, 'source', 'out')
  if values.to not in ('ours', 'torch'):
    raise UserError(f'--to={values.to} must be ours or torch')
  word = parse_source(values.source, ENCODERS)
  out = pathlib.Path(values.out).expanduser()
  lone = values.to == 'ours' and word.kind not in ('rae', 'vqrae_torch')
  if not lone:
    _without(values, ('row', 'dtype'), 'no encoder alone')
  if values.to == 'torch':
    if word.kind != 'path':
      raise UserError(
        f'--source={values.source} with --to=torch must be the directory of a '
        'tokenizer'
      )
    return back(word.value, _target(out, '.safetensors'))
  if lone:
    _without(
      values,
      ('config', 'quantizer'),
      'an encoder, which says its numbers itself; a whole model of the PyTorch '
      'project is vqrae_torch:FILE, a decoder rae:FILE',
    )
    return encoder(values, _target(out, ''))
  source = open_weights(word.value)
  stats = set(source) <= {'mean', 'var'}
  if word.kind == 'rae' and stats:
    return statistics(source, _target(out, '.npz'))
  command.required(values, 'config')
  model = values.config.to_dict().get('model')
  if not isinstance(model, dict):
    raise UserError('--config: the config has no section "model"')
  if word.kind == 'rae':
    return decoder(source, model, _target(out, '.safetensors'))
  whole(source, model, _fields(values.quantizer), out)


def _flags(values: flags.FlagValues) -> None:
  flags.DEFINE_string(
    'source',
    None,
    'an encoder (hf:ORG/NAME[@REV], a folder, a file, a row of the table), '
    'rae:FILE, vqrae_torch:FILE, or a tokenizer with --to=torch',
    flag_values=values,
  )
  flags.DEFINE_string(
    'out',
    None,
    'a directory, or for single files F.safetensors or F.npz',
    flag_values=values,
  )
  flags.DEFINE_string(
    'row',
    None,
    "the row of the table that an encoder's folder or file is, if it does not "
    'say',
    flag_values=values,
  )
  flags.DEFINE_string(
    'dtype',
    'float32',
    "the type of a stored encoder's weights, float32 or bfloat16",
    flag_values=values,
  )
  flags.DEFINE_string(
    'to', 'ours', 'ours, or torch: the way back', flag_values=values
  )
  flags.DEFINE_string(
    'quantizer',
    '',
    'fields of the quantizer that the file cannot tell, over the config: '
    'levels=(8,5,5),bound="clip" or distance="l2"',
    flag_values=values,
  )


def _fields(text: str) -> dict[str, Any]:
  try:
    call = ast.parse(f'dict({text})', mode='eval').body
    if not isinstance(call, ast.Call) or call.args:
      raise ValueError
    return {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
  except (ValueError, SyntaxError, TypeError):
    raise UserError(
      f'--quantizer={text} must be field=value,… as in '
      '--quantizer=levels=(8,5,5),bound="clip"'
    ) from None


def encoder(values: flags.FlagValues, out: pathlib.Path) -> None:
  """A published encoder as a directory of ours."""
  from vqrae_jax.store_encoder import store_encoder

  word, row, dtype = values.source, values.row, values.dtype
  if dtype not in DTYPES:
    raise UserError(f'--dtype={dtype}{did_you_mean(dtype, DTYPES)}')
  if row is not None and word in ENCODERS:
    raise UserError(f'--row={row} names what {word} names by itself')
  store_encoder(word, out, row, dtype)


def _without(
  values: flags.FlagValues, names: tuple[str, ...], what: str
) -> None:
  """None of the flags was given: the source is something they do not fit."""
  for name in names:
    if values[name].present:
      raise UserError(f'--{name} does not go with this source: it is {what}')


def _target(out: pathlib.Path, ending: str) -> pathlib.Path:
  """What may be written: new, and a file in a folder that is there."""
  if ending:
    return command.new_file(str(out), ending)
  if out.exists() or out.is_symlink():
    raise UserError(f'--out={out} exists and is not replaced; name another')
  # A directory, whose parents are made.
  if out.suffix in ('.safetensors', '.npz', '.pt'):
    raise UserError(f'--out={out} must be a directory, with no {out.suffix}')
  above = next(p for p in out.absolute().parents if p.exists())
  if not above.is_dir():
    raise UserError(f'--out={out}: {above} is a file')
  return out


def _write(out: pathlib.Path, arrays: dict) -> None:
  """The whole file under another name first."""
  import numpy as np
  from safetensors.numpy import save_file

  arrays = {
    k: np.ascontiguousarray(v).reshape(v.shape) for k, v in arrays.items()
  }
  temporary = out.with_name(out.stem + '.writing' + out.suffix)
  try:
    if out.suffix == '.npz':
      np.savez(temporary, **arrays)
    else:
      save_file(arrays, temporary)
    os.replace(temporary, out)
  finally:
    temporary.unlink(missing_ok=True)
  print(f'wrote {out}: {len(arrays)} arrays')


def _pairs(source: Source, theirs: dict, skipped: dict) -> Iterator[tuple]:
  """(the file's array, ours) of each key; prefixes in the file are its own."""
  for key, handle in source.items():
    plain = [k for k in theirs if key.endswith(k)]
    if key not in skipped and plain:
      yield handle, theirs[max(plain, key=len)]


_NO_REFERENCE = (
  'parity with PyTorch: not measured, the PyTorch project is not installed'
)


def whole(source: Source, model: dict, fields: dict, out: pathlib.Path) -> None:
  """A whole model of the PyTorch project as a tokenizer directory.

  Args:
    source: the opened checkpoint.
    model: the config's section; its quantizer gives way to the file's form.
    fields: of the quantizer, over both.
    out: the directory.
  """
  from vqrae_jax import export, proof
  from vqrae_jax.models import torch_quantizers, vqrae_torch
  from vqrae_jax.models.tokenizer import build_tokenizer
  from vqrae_jax.ops import trees

  export.check_target(out)
  section = dict(model.get('quantizer') or {})
  latent_dim = build_tokenizer(model).latent_dim
  part = vqrae_torch.split(source)['quantizer']
  form = torch_quantizers.detect(part, latent_dim, section.get('name', 'none'))
  print(f"the file's quantizer: {form.words}")
  if section.pop('name', form.name) != form.name:
    print(f'  the config has another, model.quantizer.name: {form.name} taken')
    section = {}
  section = section | form.fields | form.guesses | fields
  section['name'] = form.name
  if section.get('distance') == 'l2':  # whose codes have one scale
    section['code_scale'] = fields.get('code_scale', 'rms')
    section['normalize'] = fields.get('normalize', False)
  for key, value in form.fields.items():
    if key in fields and fields[key] != value:
      raise UserError(
        f'--quantizer={key}={fields[key]!r}, and {source.name} has {value!r}'
      )
  if form.name == 'fsq' and 'levels' not in section:
    raise UserError(
      f"{source.name} does not tell FSQ's levels; give --quantizer=levels=(…)"
    )
  tokenizer = build_tokenizer(model | dict(quantizer=section))
  fits = vqrae_torch.fit(source, tokenizer)
  proof.say(source, fits)
  if form.name == 'simvq':
    print(
      'beta: in no file; the project trained with the legacy form, commit + '
      'beta * codebook (to go on so, losses.commit=1 and losses.codebook=0.25)'
    )
  variables = trees.unflatten(vqrae_torch.load(fits))
  theirs = vqrae_torch.export(tokenizer, variables)
  skipped = {k: w for f in fits.values() for k, w in f.skipped.items()}
  proof.back_again(_pairs(source, theirs, skipped))
  print(_NO_REFERENCE)
  mark = export.save_tokenizer(tokenizer, variables, out)
  print(f'wrote {out}, fingerprint {mark[:12]}…')


def decoder(source: Source, model: dict, out: pathlib.Path) -> None:
  """A published RAE decoder, held to the config's, as .safetensors."""
  from vqrae_jax import proof
  from vqrae_jax.models import rae
  from vqrae_jax.models.tokenizer import build_tokenizer

  tokenizer = build_tokenizer(model)
  spec = tokenizer.decoder_spec
  fitted = rae.fit_decoder(source, spec, tokenizer.latent_dim)
  proof.say(source, {'decoder': fitted})
  theirs = rae.export_rae_decoder(fitted.load(), spec)
  proof.back_again(_pairs(source, theirs, fitted.skipped))
  print(_NO_REFERENCE)
  _write(out, theirs)
  print(f'begin a run with it: --config.init.decoder=rae:{out}')


def statistics(source: Source, out: pathlib.Path) -> None:
  """RAE's mean and variance of latents, as .npz; bitwise."""
  from vqrae_jax.models.latent_files import read_statistics

  arrays = read_statistics(source)
  print(f'read {source.name}: mean and var of shape {arrays["mean"].shape}')
  _write(out, arrays)
  print(f'begin a run with them: --config.init.latents={out}')


def back(directory: str, out: pathlib.Path) -> None:
  """A tokenizer as a state dict of the PyTorch project."""
  from vqrae_jax import export
  from vqrae_jax.models import vqrae_torch

  tokenizer, variables = export.load_tokenizer(directory)
  _write(out, vqrae_torch.export(tokenizer, variables))


if __name__ == '__main__':
  command.run(main)
