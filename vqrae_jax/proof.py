"""What a conversion prints as its proof: keys, the way back, parity.

Every key of the file is counted as matched or skipped for a reason; the
leaves, turned back into the file's layout, are held to it bit by bit; and
where transformers and torch are installed, an encoder is held to their model,
which reads the same folder by itself. Neither is a requirement, and code that
lies beside weights is not run. What it does not do: convert (`convert.py`,
`store_encoder.py`).
"""

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqrae_jax.errors import UserError
from vqrae_jax.models.encoder import Encoder
from vqrae_jax.ops import trees
from vqrae_jax.specs import EncoderSpec
from vqrae_jax.weights import Handle, Pretrained, Source

# Of f32 against f32, where 1e-6 is usual: beyond it something is wrong.
LIMIT = 1e-4
_SHOWN = 6


def say(source: Source, fits: Mapping[str, Pretrained]) -> None:
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


def back_again(pairs: Iterable[tuple[Handle, np.ndarray]]) -> None:
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
