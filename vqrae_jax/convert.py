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
import contextlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from vqrae_jax import cli, export
from vqrae_jax.encoders import ENCODERS, converted, published
from vqrae_jax.errors import UserError, did_you_mean
from vqrae_jax.files import atomic_write
from vqrae_jax.models.encoder import Encoder
from vqrae_jax.ops import trees
from vqrae_jax.pretrained import encoders
from vqrae_jax.specs import DTYPES, EncoderSpec
from vqrae_jax.weights import (
  LazyArray,
  Pretrained,
  WeightFile,
  open_weights,
  parse_source,
  write_safetensors,
)

# ----------------------------------------------------------------------------
# What a conversion prints as its proof: keys, the way back, parity.
#
# Every key of the file is counted as matched or skipped for a reason; the
# leaves, turned back into the file's layout, are held to it bit by bit; and
# where transformers and torch are installed, an encoder is held to their model,
# which reads the same folder by itself. Neither is a requirement, and code that
# lies beside weights is not run. What it does not do: convert (`convert.py`,
# `store_encoder.py`).

# Of f32 against f32, where 1e-6 is usual: beyond it something is wrong.
LIMIT = 1e-4
_SHOWN = 6


def say(source: WeightFile, fits: Mapping[str, Pretrained]) -> None:
  """Prints what became of each key.

  Args:
    source: the opened file.
    fits: {what it fills: the file held to it}.
  """
  note = f' ({source.note})' if source.note else ''
  print(f'read {source.name}{note}')
  for part, fitted in fits.items():
    matched = len(fitted.source) - len(fitted.skipped)
    print(
      f'{part}: {matched} keys matched, {len(fitted.target)} leaves filled, '
      f'{len(fitted.skipped)} keys skipped'
    )
    whys: dict[str, list[str]] = {}
    for key, why in fitted.skipped.items():
      whys.setdefault(why, []).append(key)
    for why, keys in whys.items():
      more = f' and {len(keys) - _SHOWN} more' if len(keys) > _SHOWN else ''
      print(f'  skipped {", ".join(keys[:_SHOWN])}{more}: {why}')


def back_again(pairs: Iterable[tuple[LazyArray, np.ndarray]]) -> None:
  """Prints how many arrays come out of our leaves as they went in.

  Args:
    pairs: (an array of the file, the same made out of leaves); where the
      leaves' type holds less than the file's, rounding is all that may differ.
  """
  same = total = 0
  rounded = ''
  for handle, ours in pairs:
    value = handle.read()
    cast = value.astype(ours.dtype)
    if cast.astype(value.dtype).tobytes() != value.tobytes():
      rounded = f' once rounded to {ours.dtype}'
    same += ours.tobytes() == cast.tobytes()
    total += 1
  print(f'back again: {same} of {total} arrays equal bit for bit{rounded}')


class _NotMeasured(Exception):
  """There is no reference to measure against, and why."""


# How a model of transformers is called: (model, f32[b 3 h w], patch) -> output.
def _plain(model: Any, x: Any, patch: int) -> Any:
  return model(x)


def _unmasked(model: Any, x: Any, patch: int) -> Any:
  """ViT-MAE without masks, its tokens in the image's order."""
  import torch

  model.config.mask_ratio = 0.0
  n = (x.shape[2] // patch) * (x.shape[3] // patch)
  order = torch.arange(n, dtype=torch.float32).expand(x.shape[0], n)
  return model(x, noise=order, interpolate_pos_encoding=True)


def _packed(model: Any, x: Any, patch: int) -> Any:
  """NaFlex wants the patches themselves, a mask, and their grid."""
  import torch

  b, c, h, w = x.shape
  gh, gw = h // patch, w // patch
  x = x.reshape(b, c, gh, patch, gw, patch).permute(0, 2, 4, 3, 5, 1)
  x = x.reshape(b, gh * gw, patch * patch * c)
  mask = torch.ones(b, gh * gw, dtype=torch.int32)
  return model(x, mask, torch.tensor([[gh, gw]] * b))


# config.json's model_type -> transformers' class, and how it is called. Of a
# model around an encoder the class takes the encoder alone.
_REFERENCES: dict[str, tuple[str, Callable]] = {
  'siglip': ('SiglipVisionModel', _plain),
  'siglip_vision_model': ('SiglipVisionModel', _plain),
  'siglip2': ('Siglip2VisionModel', _packed),
  'siglip2_vision_model': ('Siglip2VisionModel', _packed),
  'dinov2': ('Dinov2Model', _plain),
  'dinov2_with_registers': ('Dinov2WithRegistersModel', _plain),
  'vit_mae': ('ViTMAEModel', _unmasked),
  'internvl_vision': ('InternVLVisionModel', _plain),
}
# Parts of a class that its last hidden state does not read.
_UNREAD = ('head.', 'pooler.', 'embeddings.mask_token')


def parity(folder: pathlib.Path, spec: EncoderSpec, fit: Pretrained) -> None:
  """Prints how far our latents are from transformers', or why nobody knows.

  One fixed random image of the encoder's own size, in f32: |a - b| / |b|
  over all tokens. One of the two models is in memory at a time.

  Args:
    folder: where the source lies; measured if transformers can read it.
    spec: the encoder's, with its published norm.
    fit: its leaves in f32, on the host.

  Raises:
    UserError: they differ by more than `LIMIT`.
  """
  side = [n * spec.vit.patch_size for n in spec.vit.grid]
  images = np.random.default_rng(0).random((1, *side, 3), np.float32)
  try:
    version, want = _theirs(folder, spec, images)
  except _NotMeasured as why:
    print(f'parity with PyTorch: not measured, {why}')
    return
  have = _ours(spec, fit, images).astype(np.float64).reshape(want.shape)
  off = np.linalg.norm(have - want) / np.linalg.norm(want)
  size = side[0] if side[0] == side[1] else f'{side[0]}x{side[1]}'
  line = (
    f'parity with transformers {version}: {off:.1e} (relative, f32, one image '
    f'of {size} px)'
  )
  if not off <= LIMIT:
    raise UserError(
      f'{line}: this is too much, above {LIMIT:.0e}; do not use the result: '
      'nothing was written'
    )
  print(line)


def _ours(spec: EncoderSpec, fit: Pretrained, images: np.ndarray) -> np.ndarray:
  encoder = Encoder(spec)
  try:
    host = jax.local_devices(backend='cpu')[0]
  except RuntimeError:  # JAX_PLATFORMS leaves the host out
    host = None
  with jax.default_device(host), jax.default_matmul_precision('highest'):
    leaves = {name: jnp.asarray(fit.read(name)) for name in fit.target}
    variables = {'params': trees.unflatten(leaves)}
    return np.asarray(jax.jit(encoder.apply)(variables, images))


def _theirs(
  folder: pathlib.Path, spec: EncoderSpec, images: np.ndarray
) -> tuple[str, np.ndarray]:
  """(transformers' version, f64[b n d] of its model)."""
  name, call = _class_of(folder)
  try:
    import torch
  except ImportError:
    raise _NotMeasured('torch is not installed') from None
  try:
    import transformers
    from transformers.utils import logging
  except ImportError:
    raise _NotMeasured('transformers is not installed') from None
  version = transformers.__version__
  mean, std = np.array(spec.pixel_norm.mean), np.array(spec.pixel_norm.std)
  pixels = ((images - mean) / std).astype(np.float32).transpose(0, 3, 1, 2)
  # Whatever another package raises is no fault of the weights.
  try:
    with _quiet(logging), torch.inference_mode():
      model, info = getattr(transformers, name).from_pretrained(
        str(folder),
        local_files_only=True,
        use_safetensors=True,
        attn_implementation='eager',  # none that its config.json fetches
        dtype=torch.float32,
        output_loading_info=True,
      )
      unset = [k for k in info['missing_keys'] if not k.startswith(_UNREAD)]
      if unset:
        raise _NotMeasured(
          f'{name} of transformers {version} does not find {len(unset)} of its '
          f'weights there ({min(unset)})'
        )
      x = torch.from_numpy(np.ascontiguousarray(pixels))
      out = call(model.eval(), x, spec.vit.patch_size).last_hidden_state
      return version, out[:, spec.vit.num_prefix_tokens :].double().numpy()
  except _NotMeasured:
    raise
  except Exception as e:
    words = ' '.join(str(e).split())[:140] or type(e).__name__
    raise _NotMeasured(
      f'transformers {version} fails on it ({type(e).__name__}: {words})'
    ) from None


def _class_of(folder: pathlib.Path) -> tuple[str, Callable]:
  """The class that opens a folder, and how it is called."""
  if not folder.is_dir():
    raise _NotMeasured('the source is a lone file')
  if not (folder / 'config.json').is_file():
    raise _NotMeasured('the source has no config.json')
  if not any(folder.glob('model*.safetensors')):
    raise _NotMeasured('the source has no model.safetensors')
  kind = json.loads((folder / 'config.json').read_bytes()).get('model_type')
  if kind not in _REFERENCES:
    raise _NotMeasured(f'transformers itself has no model "{kind}"')
  return _REFERENCES[kind]


@contextlib.contextmanager
def _quiet(logging: Any) -> Iterator[None]:
  """Without transformers' bars and its own list of unused keys."""
  level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
  logging.set_verbosity_error()
  logging.disable_progress_bar()
  try:
    yield
  finally:
    logging.set_verbosity(level)
    if bars:
      logging.enable_progress_bar()


# ----------------------------------------------------------------------------
# A published encoder as a directory of ours, and what is said of it.
#
# The directory (`encoders/stored.py`) is there whole or not at all, and not
# before its proof. Leaves go to the file one at a time, so that memory holds one
# of them and its copy in the file's layout; only the parity figure wants a whole
# model, in f32. `load_encoder` and `init.encoder` open it (`pretrained.py`).


def store_encoder(
  word: str,
  out: pathlib.Path,
  row: str | None = None,
  dtype: str = 'float32',
) -> None:
  """Converts an encoder; prints what became of each key, and the parity.

  Args:
    word: the source, as `load_encoder` takes it.
    out: the directory, which is not there yet.
    row: the row of the table that a folder or file is, if it does not say.
    dtype: of the leaves on disk, "float32" or "bfloat16".

  Raises:
    UserError: a source that does not open, or latents that are not the
      reference's; nothing is written.
  """
  from tqdm import tqdm

  found = encoders.find_encoder(word, row)
  if found.stored:
    raise UserError(f'{word} is converted already; load_encoder opens it')
  spec = encoders.spec_of(found)
  whole = encoders.fit_encoder(found, spec)
  fit = encoders.fit_encoder(found, spec, encoders.target_of(spec, dtype))
  say(whole.source, {'encoder': whole})
  origin = _origin(found)
  print('\n'.join(f'{key}: {value}' for key, value in origin.items()))
  back_again(fit.backwards())
  parity(found.path, spec, whole)
  with (
    export.written_whole(out) as folder,
    tqdm(total=len(fit.target), unit=' leaves', leave=False) as bar,
  ):

    def read(name: str) -> Any:
      bar.update()
      return fit.read(name)

    write_safetensors(folder / export.WEIGHTS, fit.target, read)
    config = {
      'format_version': converted.FORMAT_VERSION,
      **origin,
      converted.KEY: converted.describe(spec),
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + '\n'
    (folder / export.CONFIG).write_text(text, encoding='utf8')
  print(f'wrote {out}: {len(fit.target)} leaves, {dtype}')


def _origin(found: encoders.Found) -> dict[str, str]:
  """Where it came from, as far as that is known."""
  known = {'source': found.word, 'revision': found.revision, 'row': found.row}
  if found.row in published.PUBLISHED:
    known['licence'] = published.PUBLISHED[found.row].licence
  return {key: value for key, value in known.items() if value is not None}


MODULE = 'vqrae_jax.convert'
EXAMPLE = (
  f'python -m {MODULE} --source=vqrae_torch:ckpt.pt '
  '--config=configs/simvq_siglip_l.py --out=tokenizer'
)
ABOUT = 'a config whose "model" the file is; --config.model.a.b=v changes a key'


def main(argv: list[str]) -> None:
  """Parses flags, converts one source, prints what became of each key."""
  values = cli.parse_config_flag(argv, MODULE, EXAMPLE, ABOUT, _flags)
  cli.required(values, 'source', 'out')
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
  cli.required(values, 'config')
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
    return cli.new_file(str(out), ending)
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
  import numpy as np
  from safetensors.numpy import save

  arrays = {
    k: np.ascontiguousarray(v).reshape(v.shape) for k, v in arrays.items()
  }
  with atomic_write(out) as file:
    if out.suffix == '.npz':
      np.savez(file, **arrays)
    else:
      file.write(save(arrays))
  print(f'wrote {out}: {len(arrays)} arrays')


def _pairs(source: WeightFile, theirs: dict, skipped: dict) -> Iterator[tuple]:
  """(the file's array, ours) of each key; prefixes in the file are its own."""
  for key, handle in source.items():
    plain = [k for k in theirs if key.endswith(k)]
    if key not in skipped and plain:
      yield handle, theirs[max(plain, key=len)]


_NO_REFERENCE = (
  'parity with PyTorch: not measured, the PyTorch project is not installed'
)


def whole(
  source: WeightFile, model: dict, fields: dict, out: pathlib.Path
) -> None:
  """A whole model of the PyTorch project as a tokenizer directory.

  Args:
    source: the opened checkpoint.
    model: the config's section; its quantizer gives way to the file's form.
    fields: of the quantizer, over both.
    out: the directory.
  """
  from vqrae_jax import export
  from vqrae_jax.models.tokenizer import build_tokenizer
  from vqrae_jax.ops import trees
  from vqrae_jax.pretrained import vqrae_torch

  export.check_target(out)
  section = dict(model.get('quantizer') or {})
  latent_dim = build_tokenizer(model).latent_dim
  part = vqrae_torch.split(source)['quantizer']
  form = vqrae_torch.detect(part, latent_dim, section.get('name', 'none'))
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
  say(source, fits)
  if form.name == 'simvq':
    print(
      'beta: in no file; the project trained with the legacy form, commit + '
      'beta * codebook (to go on so, losses.commit=1 and losses.codebook=0.25)'
    )
  variables = trees.unflatten(vqrae_torch.load(fits))
  theirs = vqrae_torch.to_torch(tokenizer, variables)
  skipped = {k: w for f in fits.values() for k, w in f.skipped.items()}
  back_again(_pairs(source, theirs, skipped))
  print(_NO_REFERENCE)
  mark = export.save_tokenizer(tokenizer, variables, out)
  print(f'wrote {out}, fingerprint {mark[:12]}…')


def decoder(source: WeightFile, model: dict, out: pathlib.Path) -> None:
  """A published RAE decoder, held to the config's, as .safetensors."""
  from vqrae_jax.models.tokenizer import build_tokenizer
  from vqrae_jax.pretrained import rae

  tokenizer = build_tokenizer(model)
  spec = tokenizer.decoder_spec
  fitted = rae.fit_decoder(source, spec, tokenizer.latent_dim)
  say(source, {'decoder': fitted})
  theirs = rae.export_rae_decoder(fitted.load(), spec)
  back_again(_pairs(source, theirs, fitted.skipped))
  print(_NO_REFERENCE)
  _write(out, theirs)
  print(f'begin a run with it: --config.init.decoder=rae:{out}')


def statistics(source: WeightFile, out: pathlib.Path) -> None:
  """RAE's mean and variance of latents, as .npz; bitwise."""
  from vqrae_jax.models.latents import read_statistics

  arrays = read_statistics(source)
  print(f'read {source.name}: mean and var of shape {arrays["mean"].shape}')
  _write(out, arrays)
  print(f'begin a run with them: --config.init.latents={out}')


def back(directory: str, out: pathlib.Path) -> None:
  """A tokenizer as a state dict of the PyTorch project."""
  from vqrae_jax import export
  from vqrae_jax.pretrained import vqrae_torch

  tokenizer, variables = export.load_tokenizer(directory)
  _write(out, vqrae_torch.to_torch(tokenizer, variables))


if __name__ == '__main__':
  cli.run(main)
