"""python -m vqrae_jax.convert --source=hf:ORG/NAME --out=DIR

Published weights to ours, and models of the PyTorch project back:

  --source=hf:ORG/NAME[@REV] --out=DIR                an encoder; also a row of
                                                      the table, a folder
  --source=FILE --row=NAME --out=DIR                  an encoder's single file
  --source=vqrae_torch:FILE --config=… --out=DIR      a tokenizer
  --source=rae:FILE --config=… --out=F.safetensors    a decoder, checked
  --source=rae:FILE --out=F.npz                       statistics of latents
  --source=DIR --to=torch --out=F.safetensors         a tokenizer, back
  --source=DIR --out=DIR, hf:ORG/NAME too             diffusers' AutoencoderRAE
  --source=DIR --to=diffusers --out=DIR               a tokenizer as one

A file of the PyTorch project does not contain its heads, pixel norm, activation
or resizing: the config's `model` section does. The file's keys and shapes must
agree with that section before anything is written. A decoder keeps its
published names, which `init.decoder=rae:F.safetensors` reads; the new file has
no pickle and the weights alone. `load_encoder` and `init.encoder` open an
encoder's folder.

Each conversion prints a report. Every key of the file is matched, or skipped
for a reason; the leaves, turned back into the file's layout, are compared with
it bit by bit; and an encoder is compared with the model of transformers, if
that and torch are installed, which opens the same folder by itself. Code
beside the weights never runs.
"""

import ast
import itertools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from vqrae_jax import cli, export
from vqrae_jax.encoders import ENCODERS, PUBLISHED, converted
from vqrae_jax.errors import UserError, read_json
from vqrae_jax.files import atomic_write
from vqrae_jax.models.encoder import Encoder
from vqrae_jax.models.latents import read_statistics
from vqrae_jax.models.tokenizer import Tokenizer, build_tokenizer
from vqrae_jax.ops import trees
from vqrae_jax.pretrained import autoencoder_rae, encoders, rae, vqrae_torch
from vqrae_jax.specs import (
  DTYPES,
  TORCH_BICUBIC,
  EncoderSpec,
  merge_sections,
)
from vqrae_jax.weights.files import WeightFile, open_weights, write_safetensors
from vqrae_jax.weights.hub import Source, parse_source, snapshot
from vqrae_jax.weights.load import Pretrained

MODULE = 'vqrae_jax.convert'
EXAMPLE = (
  f'python -m {MODULE} --source=vqrae_torch:ckpt.pt '
  '--config=configs/simvq_siglip_l.py --out=tokenizer'
)
ABOUT = (
  'a config whose "model" describes the file; --config.model.a.b=v changes a '
  'key'
)
_FLAGS = {
  'source': (
    None,
    'an encoder (hf:ORG/NAME[@REV], a folder, a file, a row of the table), '
    "rae:FILE, vqrae_torch:FILE, a folder of diffusers' AutoencoderRAE, or a "
    'tokenizer with --to',
  ),
  'out': (None, 'a directory, or for single files F.safetensors or F.npz'),
  'row': (None, "the table's row for an encoder without a config.json"),
  'quantizer': (
    '',
    'quantizer fields that the file does not show, which override the '
    'config: levels=(8,5,5),bound="clip" or distance="l2"',
  ),
}

_FILES = ('.safetensors', '.npz', '.pt')
RAE = f"diffusers' {autoencoder_rae.CLASS}"

# f32 against f32 gives about 1e-6; beyond this limit something is wrong.
PARITY_LIMIT = 1e-4
_SHOWN_KEYS = 6


def define(values: flags.FlagValues) -> None:
  """The command's flags but --config."""
  for name, (default, text) in _FLAGS.items():
    flags.DEFINE_string(name, default, text, flag_values=values)
  text = "the type of a converted encoder's weights"
  flags.DEFINE_enum('dtype', 'float32', DTYPES, text, flag_values=values)
  text, ways = 'ours, or the way back', ('ours', 'torch', 'diffusers')
  flags.DEFINE_enum('to', 'ours', ways, text, flag_values=values)


def main(argv: list[str]) -> None:
  """Parses flags, converts one source, prints the report."""
  values = cli.parse_config_flag(argv, MODULE, EXAMPLE, ABOUT, define)
  cli.required(values, 'source', 'out')
  source = parse_source(values.source, ENCODERS)
  is_encoder = values.to == 'ours' and source.kind not in ('rae', 'vqrae_torch')
  for name in ('config', 'quantizer') if is_encoder else ('row', 'dtype'):
    if (name == 'config' and values.config) or values[name].present:
      what = 'not an encoder alone'
      if is_encoder:
        what = 'an encoder, or has a config.json that describes all of it'
      raise UserError(
        f'--{name} does not go with --source={values.source}: it is {what}; '
        'vqrae_torch:FILE is a full model, rae:FILE a decoder'
      )
  if values.to != 'ours':
    if source.kind != 'path':
      raise UserError(
        f'--source={values.source} with --to={values.to} must be the directory '
        'of a tokenizer'
      )
    if values.config or values['quantizer'].present:
      raise UserError(
        f'--to={values.to} goes without --config and --quantizer: a tokenizer '
        'has a config of its own'
      )
    if values.to == 'torch':
      out = cli.new_file(values.out, '.safetensors')
    else:
      out = _folder(values.out, absent=True)
    tokenizer, variables = export.load_tokenizer(source.value)
    if values.to == 'torch':
      _write_arrays(out, vqrae_torch.to_torch(tokenizer, variables))
      vit, heads = tokenizer.encoder_spec.vit, tokenizer.decoder_spec.vit
      print(
        'to be set alike in PyTorch, since no weight shows them: '
        f'encoder num_heads={vit.num_heads}, act="{vit.act}", norm_eps='
        f'{vit.norm_eps:g}, how its positions are resized; decoder num_heads='
        f'{heads.num_heads}'
      )
    else:
      _write_autoencoder_rae(tokenizer, variables, out)
  elif is_encoder:
    out = _folder(values.out, absent=True)
    if folder := _autoencoder_rae(source):
      for name in ('row', 'dtype'):
        if values[name].present:
          raise UserError(f'--{name} is for encoders; {folder} is {RAE}')
      _convert_autoencoder_rae(folder, out)
    else:
      convert_encoder(values.source, out, values.row, values.dtype)
  else:
    if source.kind == 'rae' and values['quantizer'].present:
      raise UserError('--quantizer is for full models; rae:FILE has no codes')
    file = open_weights(source.value)
    if source.kind == 'rae' and set(file) <= {'mean', 'var'}:
      out, arrays = cli.new_file(values.out, '.npz'), read_statistics(file)
      print(f'read {file.name}: mean and var of shape {arrays["mean"].shape}')
      _write_arrays(out, arrays)  # RAE's latents, bitwise
      return print(f'to start a run with them: --config.init.latents={out}')
    cli.required(values, 'config')
    model = values.config.to_dict().get('model')
    if not isinstance(model, dict):
      raise UserError('--config: the config has no section "model"')
    if source.kind == 'rae':
      out = cli.new_file(values.out, '.safetensors')
      _convert_decoder(file, model, out)
    else:
      out, fields = _folder(values.out), _quantizer_fields(values.quantizer)
      _convert_tokenizer(file, model, fields, out)


def _quantizer_fields(text: str) -> dict[str, Any]:
  try:
    call = ast.parse(f'dict({text}\n)', mode='eval').body
    if not isinstance(call, ast.Call) or call.args:
      raise ValueError
    if any(k.arg is None for k in call.keywords):  # **fields
      raise ValueError
    return {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    raise UserError(
      f'--quantizer={text} must be field=value,… as in '
      '--quantizer=levels=(8,5,5),bound="clip"'
    ) from None


def _folder(path: str, absent: bool = False) -> pathlib.Path:
  out = cli.new_folder(path, absent)
  if out.suffix in _FILES:
    raise UserError(f'--out={path} must be a directory, not a file')
  return out


def _write_arrays(out: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes a single file."""
  with atomic_write(out) as file:
    if out.suffix == '.npz':
      np.savez(file, **arrays)
    else:
      write_safetensors(file, arrays, arrays.__getitem__)
  print(f'wrote {out}: {len(arrays)} arrays')


# --------------------------------------------------------------- conversions


def convert_encoder(
  source: str,
  out: pathlib.Path,
  row: str | None = None,
  dtype: str = 'float32',
) -> None:
  """Converts an encoder; prints the report.

  One leaf at a time, and its copy in the file's layout, is in memory; the
  parity figure needs all leaves, in f32.

  Args:
    source: as `load_encoder` takes it.
    out: the directory, which does not exist yet. It appears complete, after
      the report, or not at all.
    row: the row of a folder or file without a `config.json`.
    dtype: of the leaves on disk, "float32" or "bfloat16".

  Raises:
    UserError: a source that does not open, or latents that differ from the
      reference's; nothing is written.
  """
  from tqdm import tqdm

  if row is not None and source in ENCODERS:
    raise UserError(f'--row={row}: {source} is itself a row; leave --row out')
  found = encoders.find_encoder(source, row)
  if found.converted:
    raise UserError(f'{source} is already converted; load_encoder opens it')
  spec = encoders.spec_of(found)
  in_f32 = encoders.fit_encoder(found, spec)
  fit = encoders.fit_encoder(found, spec, dtype)
  report_keys(in_f32.source, {'encoder': in_f32})
  origin = {'source': source, 'revision': found.revision, 'row': found.row}
  if found.row in PUBLISHED:
    origin['licence'] = PUBLISHED[found.row].licence
  origin = {key: value for key, value in origin.items() if value is not None}
  print('\n'.join(f'{key}: {value}' for key, value in origin.items()))
  report_roundtrip({'encoder': fit})
  report_parity(found.path, spec, in_f32)
  with (
    export.written_whole(out) as folder,
    tqdm(total=len(fit.target), unit=' leaves', leave=False) as bar,
  ):

    def read(name: str) -> Any:
      bar.update()
      return fit.read(name)

    with (folder / export.WEIGHTS).open('wb') as file:
      write_safetensors(file, fit.target, read)
    config = {
      'format_version': converted.FORMAT_VERSION,
      **origin,
      converted.KEY: converted.describe(spec),
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + '\n'
    (folder / export.CONFIG).write_text(text, encoding='utf8')
  print(f'wrote {out}: {len(fit.target)} leaves, {dtype}')


def _convert_tokenizer(
  source: WeightFile, model: dict, fields: dict, out: pathlib.Path
) -> None:
  """A full model of the PyTorch project as a tokenizer directory.

  Args:
    source: the opened checkpoint.
    model: the config's section; the file's form overrides its quantizer.
    fields: of the quantizer, which override both.
    out: the directory.
  """
  export.check_target(out)
  section = dict(model.get('quantizer') or {})
  latent_dim = build_tokenizer(model).latent_dim
  part = vqrae_torch.split(source)['quantizer']
  form = vqrae_torch.detect(part, latent_dim, section.get('name', 'none'))
  print(f"the file's quantizer: {form.summary}")
  if section.pop('name', form.name) != form.name:
    print(f'  overrides model.quantizer.name of the config: {form.name}')
    section = {}
  model = _as_trained(source, model)
  print(f'images are resized as RAE does: encoder.resize="{TORCH_BICUBIC}"')
  model = merge_sections(model, dict(encoder=dict(resize=TORCH_BICUBIC)))
  section = section | form.fields | form.defaults | fields
  section['name'] = form.name
  if section.get('distance') == 'l2':  # whose codes have one scale
    section['code_scale'] = fields.get('code_scale', 'rms')
    section['normalize'] = fields.get('normalize', False)
  for key, value in form.fields.items():
    if key in fields and fields[key] != value:
      raise UserError(
        f'--quantizer={key}={fields[key]!r}, but {source.name} has {value!r}'
      )
  if form.name == 'fsq' and 'levels' not in section:
    raise UserError(
      f"{source.name} does not show FSQ's levels; give --quantizer=levels=(…)"
    )
  tokenizer = build_tokenizer(model | dict(quantizer=section))
  fits = vqrae_torch.fit(source, tokenizer)
  report_keys(source, fits)
  if form.name == 'simvq':
    print(
      'beta: not in the file; the project trained with the legacy form, commit '
      '+ beta * codebook (to continue so, losses.commit=1 and '
      'losses.codebook=0.25)'
    )
  variables = trees.unflatten(vqrae_torch.load(fits))
  report_roundtrip(fits)
  print('parity with PyTorch: not measured')
  fingerprint = export.save_tokenizer(tokenizer, variables, out)
  print(f'wrote {out}, fingerprint {fingerprint[:12]}…')


def _as_trained(source: WeightFile, model: dict) -> dict:
  """The config's `model`, with learned positions of the decoder where those of
  the file are not the fixed ones."""
  if not rae.has_trained_positions(source, build_tokenizer(model).decoder_spec):
    return model
  print('the positions of its decoder were trained, and are read off the file')
  learned = dict(posemb='learned', prefix_has_posemb=True)
  return merge_sections(model, dict(decoder=dict(vit=learned)))


def _convert_decoder(
  source: WeightFile, model: dict, out: pathlib.Path
) -> None:
  """A published RAE decoder, matched with the config's, as .safetensors."""
  tokenizer = build_tokenizer(_as_trained(source, model))
  spec = tokenizer.decoder_spec
  fit = rae.fit_decoder(source, spec, tokenizer.latent_dim)
  report_keys(source, {'decoder': fit})
  report_roundtrip({'decoder': fit})
  print('parity with PyTorch: not measured')
  _write_arrays(out, rae.export_rae_decoder(fit.load(), spec))
  print(f'to start a run from it: --config.init.decoder=rae:{out}')


def _autoencoder_rae(source: Source) -> pathlib.Path | None:
  """The folder of an AutoencoderRAE, if the source is one."""
  folder = pathlib.Path(source.value)
  if source.kind == 'hf':
    folder, _ = snapshot(source.value, source.revision)
  file = folder / export.CONFIG
  if source.kind == 'row' or not file.is_file():
    return None
  is_one = read_json(file).get('_class_name') == autoencoder_rae.CLASS
  return folder if is_one else None


def _convert_autoencoder_rae(folder: pathlib.Path, out: pathlib.Path) -> None:
  """An AutoencoderRAE of diffusers as a tokenizer directory."""
  file, source = folder / export.CONFIG, open_weights(folder)
  config = read_json(file)
  tokenizer, fits, leaves = autoencoder_rae.read(config, str(file), source)
  report_keys(source, fits)
  norm, noise = tokenizer.latents_spec.norm, config.get('noise_tau')
  print(f'latents: norm="{norm}"')
  if noise:
    print(f'noise_tau={noise}: continue with --config.noise_tau={noise}')
  report_roundtrip(fits)
  print('parity with diffusers: not measured')
  variables = trees.unflatten(vqrae_torch.load(fits) | leaves)
  fingerprint = export.save_tokenizer(tokenizer, variables, out)
  print(f'wrote {out}, fingerprint {fingerprint[:12]}…')


def _write_autoencoder_rae(
  tokenizer: Tokenizer, variables: Any, out: pathlib.Path
) -> None:
  """A tokenizer as a folder that diffusers opens."""
  config, arrays = autoencoder_rae.to_diffusers(tokenizer, variables)
  with export.written_whole(out) as folder:
    text = json.dumps(config, indent=2) + '\n'
    (folder / export.CONFIG).write_text(text, encoding='utf8')
    with (folder / autoencoder_rae.WEIGHTS).open('wb') as file:
      write_safetensors(file, arrays, arrays.__getitem__)
  print(f'wrote {out}: {len(arrays)} arrays')


# -------------------------------------------------------------------- report


def report_keys(source: WeightFile, fits: Mapping[str, Pretrained]) -> None:
  """Prints what became of each key.

  Args:
    source: the opened file.
    fits: {the part it fills: the file matched with it}.
  """
  note = f' ({source.note})' if source.note else ''
  print(f'read {source.name}{note}')
  for part, fit in fits.items():
    matched = len(fit.source) - len(fit.ignored)
    print(
      f'{part}: {matched} keys matched, {len(fit.target)} leaves filled, '
      f'{len(fit.ignored)} keys skipped'
    )
    reasons: dict[str, list[str]] = {}
    for key, why in fit.ignored.items():
      reasons.setdefault(why, []).append(key)
    for why, keys in reasons.items():
      rest = len(keys) - _SHOWN_KEYS
      more = f' and {rest} more' if rest > 0 else ''
      print(f'  skipped {", ".join(keys[:_SHOWN_KEYS])}{more}: {why}')


def report_roundtrip(fits: Mapping[str, Pretrained]) -> None:
  """Prints how many arrays of a file our leaves give back bit for bit.

  If the leaves' type holds less than the file's, the file's arrays are rounded
  to it first.
  """
  equal = total = 0
  rounded = ''
  for array, ours in itertools.chain(*(f.backwards() for f in fits.values())):
    value = array.read()
    cast = value.astype(ours.dtype)
    if cast.astype(value.dtype).tobytes() != value.tobytes():
      rounded = f' after rounding to {ours.dtype}'
    equal += ours.tobytes() == cast.tobytes()
    total += 1
  print(f'round trip: {equal} of {total} arrays equal bit for bit{rounded}')


def report_parity(
  folder: pathlib.Path, spec: EncoderSpec, fit: Pretrained
) -> None:
  """Prints how far our latents are from transformers', or why not.

  One fixed random image of the encoder's own size, in f32: |a - b| / |b|
  over all tokens. One of the two models is in memory at a time.

  Args:
    folder: where the source is; measured if transformers can open it.
    spec: the encoder's, with its published norm.
    fit: its leaves in f32, on the host.

  Raises:
    UserError: they differ by more than `PARITY_LIMIT`.
  """
  h, w = (n * spec.vit.patch_size for n in spec.vit.grid)
  images = np.random.default_rng(0).random((1, h, w, 3), np.float32)
  try:
    version, want = _reference_latents(folder, spec, images)
  except _NotMeasured as why:
    print(f'parity with PyTorch: not measured, {why}')
    return
  try:
    host = jax.local_devices(backend='cpu')[0]
  except RuntimeError:  # JAX_PLATFORMS excludes the CPU
    host = None
  with jax.default_device(host), jax.default_matmul_precision('highest'):
    leaves = {name: jnp.asarray(fit.read(name)) for name in fit.target}
    variables = {'params': trees.unflatten(leaves)}
    latents = jax.jit(Encoder(spec).apply)(variables, images)
  have = np.asarray(latents, np.float64).reshape(want.shape)
  error = np.linalg.norm(have - want) / np.linalg.norm(want)
  line = (
    f'parity with transformers {version}: {error:.1e} (relative, f32, one '
    f'image of {h if h == w else f"{h}x{w}"} px)'
  )
  if not error <= PARITY_LIMIT:
    raise UserError(f'{line} is above {PARITY_LIMIT:.0e}; nothing was written')
  print(line)


class _NotMeasured(Exception):
  """There is no reference, for this reason."""


# How a model of transformers is called: (model, f32[b 3 h w], patch) -> output.
def _call(model: Any, x: Any, patch: int) -> Any:
  return model(x)


def _call_any_size(model: Any, x: Any, patch: int, **options: Any) -> Any:
  return model(x, interpolate_pos_encoding=True, **options)


def _call_clip(model: Any, x: Any, patch: int) -> Any:
  """CLIP's patches through its final norm, as `encoders/clip.py` says."""
  out = _call_any_size(model, x, patch)
  out.last_hidden_state = model.post_layernorm(out.last_hidden_state)
  return out


def _call_unmasked(model: Any, x: Any, patch: int) -> Any:
  """ViT-MAE without masks, its tokens in the image's order."""
  model.config.mask_ratio = 0.0
  n = (x.shape[2] // patch) * (x.shape[3] // patch)
  order = x.new_tensor(range(n)).expand(x.shape[0], n)
  return _call_any_size(model, x, patch, noise=order)


def _call_naflex(model: Any, x: Any, patch: int) -> Any:
  """NaFlex takes patches, a mask, and their grid."""
  b, c, h, w = x.shape
  gh, gw = h // patch, w // patch
  x = x.reshape(b, c, gh, patch, gw, patch).permute(0, 2, 4, 3, 5, 1)
  x = x.reshape(b, gh * gw, patch * patch * c)
  grid = x.new_tensor([[gh, gw]] * b).int()
  return model(x, x.new_ones(b, gh * gw).int(), grid)


# config.json's model_type -> transformers' class, and how it is called. For a
# model around an encoder, the class opens the encoder alone.
REFERENCES: dict[str, tuple[str, Callable]] = {
  'siglip': ('SiglipVisionModel', _call_any_size),
  'siglip_vision_model': ('SiglipVisionModel', _call_any_size),
  'siglip2': ('Siglip2VisionModel', _call_naflex),
  'siglip2_vision_model': ('Siglip2VisionModel', _call_naflex),
  'dinov2': ('Dinov2Model', _call),
  'dinov2_with_registers': ('Dinov2WithRegistersModel', _call),
  'dinov3_vit': ('DINOv3ViTModel', _call),
  'vit_mae': ('ViTMAEModel', _call_unmasked),
  'internvl_vision': ('InternVLVisionModel', _call),
  'clip': ('CLIPVisionModel', _call_clip),
  'clip_vision_model': ('CLIPVisionModel', _call_clip),
}
# Parts of a class that its last hidden state does not depend on.
_UNUSED = ('head.', 'pooler.', 'embeddings.mask_token')


def _reference_latents(
  folder: pathlib.Path, spec: EncoderSpec, images: np.ndarray
) -> tuple[str, np.ndarray]:
  """(transformers' version, f64[b n d] of its model)."""
  files = [*folder.glob('model*.safetensors'), *folder.glob('config.json')]
  if len(files) < 2:
    raise _NotMeasured('the source has no config.json or no model.safetensors')
  kind = read_json(folder / 'config.json').get('model_type')
  if kind not in REFERENCES:
    raise _NotMeasured(f'transformers has no model "{kind}"')
  name, call = REFERENCES[kind]
  try:
    import torch
    import transformers
    from transformers.utils import logging
  except ImportError as e:
    raise _NotMeasured(f'{e.name} is not installed') from None
  logging.set_verbosity_error()
  logging.disable_progress_bar()
  version = transformers.__version__
  norm = spec.pixel_norm
  pixels = (images - np.array(norm.mean)) / np.array(norm.std)
  # An error of another package is not a fault of the weights.
  try:
    with torch.inference_mode():
      model, info = getattr(transformers, name).from_pretrained(
        str(folder),
        local_files_only=True,
        use_safetensors=True,
        attn_implementation='eager',  # or its config.json could name code
        dtype=torch.float32,
        output_loading_info=True,
      )
      unset = [k for k in info['missing_keys'] if not k.startswith(_UNUSED)]
      if not unset:
        x = torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2)
        out = call(model.eval(), x, spec.vit.patch_size).last_hidden_state
        return version, out[:, spec.vit.num_prefix_tokens :].double().numpy()
  except Exception as e:
    reason = ' '.join(str(e).split())[:140]
    raise _NotMeasured(
      f'transformers {version} fails ({type(e).__name__}: {reason})'
    ) from None
  raise _NotMeasured(
    f'{name} of transformers {version} does not find {len(unset)} of its '
    f'weights there ({min(unset)})'
  )


if __name__ == '__main__':
  cli.run(main)
