"""python -m vqrae_jax.demo --tokenizer=DIR

A local web page: an image beside its reconstruction, its tokens as colours, the
difference, PSNR and bits. Clicking a token shows where else its code occurs;
clicking the reconstruction replaces tokens with that code, and the rest of the
page follows.

The page is Gradio's (the extra `gradio`), reachable from this machine alone
unless --host says otherwise.
"""

import dataclasses
import math
import os
from collections.abc import Collection
from typing import Any

import numpy as np
from absl import flags

from vqrae_jax import cli
from vqrae_jax.errors import UserError

MODULE = 'vqrae_jax.demo'
EXAMPLE = f'python -m {MODULE} --tokenizer=runs/quickstart/tokenizer'
LEAST = 256  # pixels of a side, if --size does not say


def define(values: flags.FlagValues) -> None:
  """The command's flags."""
  keys = dict(flag_values=values)
  cli.define_tokenizer(values)
  text = (
    'side of the square shown, in pixels: a multiple of the size that the '
    'tokenizer was made for, in whose tiles it is tokenized; default: the '
    f'smallest multiple of at least {LEAST}'
  )
  flags.DEFINE_integer('size', None, text, lower_bound=1, **keys)
  text = 'the address to listen on; 0.0.0.0 lets other machines in'
  flags.DEFINE_string('host', '127.0.0.1', text, **keys)
  text = 'the port'
  flags.DEFINE_integer('port', 7860, text, 1, 65535, **keys)


def main(argv: list[str]) -> None:
  """Parses flags, serves the page until it is stopped."""
  values = flags.FlagValues()
  define(values)
  cli.parse(values, argv, MODULE, EXAMPLE)
  cli.required(values, 'tokenizer')
  model = Model.load(values.tokenizer, values.size, values.trusted)
  blocks = page(model, values.tokenizer)
  try:
    blocks.launch(
      server_name=values.host,
      server_port=values.port,
      quiet=True,
      prevent_thread_lock=True,
    )
  except OSError:
    raise UserError(
      f'cannot listen on --host={values.host} --port={values.port}: the port '
      'may be in use; name another'
    ) from None
  print(f'http://{values.host}:{values.port}; Ctrl-C stops it', flush=True)
  blocks.block_thread()


def _latents(tokenizer: Any, variables: Any, indices: np.ndarray) -> Any:
  """f[b gh gw d], what the decoder reads of indices."""

  def read(module, x):
    codes = module.quantizer.indices_to_codes(x)
    return module.latents.inverse(module.quantizer.codes_to_latents(codes))

  return tokenizer.apply(variables, indices, method=read)


@dataclasses.dataclass(frozen=True)
class Model:
  """A tokenizer on squares of `size` pixels, of tiles of its own size.

  Attributes:
    tokenizer, variables: the tokenizer.
    size: of the square.
    tile: (h, w) that the tokenizer was made for.
  """

  tokenizer: Any
  variables: Any
  size: int
  tile: tuple[int, int]

  @classmethod
  def load(
    cls, source: str, size: int | None, trusted: Collection[str] = ()
  ) -> 'Model':
    """Opens what `load_tokenizer` opens.

    Raises:
      UserError: a continuous tokenizer, one without a grid of indices, or a
        size that is no multiple of its own.
    """
    from vqrae_jax import export

    tokenizer, variables = export.load_tokenizer(source, trusted=trusted)
    if not tokenizer.codebook_size:
      raise UserError(
        f'{source} is continuous (model.quantizer.name="none"): it has no '
        'tokens to show'
      )
    if tokenizer.quantizer.index_axes[:2] != ('gh', 'gw'):
      raise UserError(
        f'{source} has indices of several scales; the page shows one grid'
      )
    tile = tokenizer.native_size
    step = math.lcm(*tile)
    size = size or -(-LEAST // step) * step
    if size % step:
      raise UserError(f'--size={size} must be a multiple of {step}')
    return cls(tokenizer, variables, size, tile)

  @property
  def _tile_count(self) -> int:
    return (self.size // self.tile[0]) * (self.size // self.tile[1])

  def crop(self, image: np.ndarray) -> np.ndarray:
    """uint8 [h w 3] -> uint8 [size size 3]: the centre of the image, its
    shorter side brought to `size`."""
    from vqrae_jax.data import pipeline

    return pipeline.centre_crop(image, (self.size, self.size), self.size)

  def _run(self, function: Any, x: np.ndarray) -> np.ndarray:
    import jax

    return np.asarray(
      jax.jit(function, static_argnums=0)(self.tokenizer, self.variables, x)
    )

  def encode(self, crop: np.ndarray) -> np.ndarray:
    """uint8 [size size 3] -> i32[gh gw], or [gh gw q], of all tiles."""
    from vqrae_jax import inference
    from vqrae_jax.data import pipeline

    tiles = pipeline.tiles(crop, self.tile)
    return self._joined(self._run(inference.encode_to_indices, tiles))

  def _joined(self, tiles: np.ndarray) -> np.ndarray:
    from vqrae_jax.data import pipeline

    return pipeline.join_tiles(tiles, self.size // self.tile[1])

  def latents(self, indices: np.ndarray) -> np.ndarray:
    """f[gh gw d], what the decoder reads."""
    from vqrae_jax.data import pipeline

    window = self.tokenizer.index_shape(*self.tile)[:2]
    return self._joined(self._run(_latents, pipeline.tiles(indices, window)))

  def decode(self, indices: np.ndarray) -> np.ndarray:
    """The reconstruction, uint8 [size size 3]."""
    from vqrae_jax.evaluate import evaluator, visualize

    image = evaluator.decode_tiles(
      self.tokenizer,
      self.variables,
      self.latents(indices),
      self.tokenizer.grid(*self.tile),
      batch_size=self._tile_count,
    )
    return visualize.to_uint8(image)

  def colours(self, indices: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The tokens, uint8 [size size 3], in the colours that the image's own
    tokens have; see `visualize.token_map`."""
    from vqrae_jax.evaluate import visualize

    z, like = (self.latents(x)[None] for x in (indices, own))
    return visualize.token_map(z, (self.size, self.size), like)[0]

  def token_at(self, indices: np.ndarray, x: float, y: float) -> np.ndarray:
    """The index i32[], or i32[q], of the token at a pixel."""
    side = self.size // indices.shape[0]
    return indices[int(y) // side, int(x) // side]

  def where(self, indices: np.ndarray, code: np.ndarray) -> np.ndarray:
    """bool[gh gw]: the tokens of that index."""
    same = indices == code
    return same.reshape(*indices.shape[:2], -1).all(-1)

  def shown(self, crop: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The image, uint8, dark but for tokens that are kept, bool[gh gw]."""
    side = self.size // kept.shape[0]
    light = kept.repeat(side, 0).repeat(side, 1)[..., None]
    return np.where(light, crop, crop // 4)

  def edited(
    self, indices: np.ndarray, x: float, y: float, brush: int, code: np.ndarray
  ) -> np.ndarray:
    """Indices with `code` in a square of `brush` tokens a side, about the token
    at a pixel."""
    side, indices = self.size // indices.shape[0], indices.copy()
    top, left = (max(int(n) // side - (brush - 1) // 2, 0) for n in (y, x))
    indices[top : top + brush, left : left + brush] = code
    return indices

  def figures(self, crop: np.ndarray, recon: np.ndarray, changed: int) -> str:
    """PSNR and bits, as a line."""
    from vqrae_jax.evaluate import evaluator

    n = crop.size // 3
    tiles = self._tile_count
    bits = tiles * evaluator.bits_per_image(self.tokenizer, *self.tile)
    tokens = tiles * math.prod(self.tokenizer.index_shape(*self.tile))
    psnr = evaluator.psnr(crop, recon / 255)
    line = (
      f'**{psnr:.2f} dB** PSNR · {tokens:,} indices of '
      f'{self.tokenizer.codebook_size:,} codes · {bits:,.0f} bits, '
      f'{bits / n:.3f} a pixel'
    )
    if bits:
      line += f', 1/{24 * n / bits:.0f} of the image'
    return line + f' · {changed:,} tokens edited' * bool(changed)


def page(model: Model, title: str) -> Any:
  """The page, `gradio.Blocks`.

  Raises:
    UserError: Gradio is not installed.
  """
  os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')  # calls nobody
  try:
    import gradio as gr
  except ImportError:
    raise UserError(
      "the page needs a package: pip install 'vqrae_jax[gradio]'"
    ) from None

  def warned(text):
    gr.Warning(text)
    return [gr.skip()] * len(outputs)  # an error would take all pictures away

  def views(state):
    crop, indices = state['crop'], state['indices']
    recon = model.decode(indices)
    changed = int((~model.where(state['own'], indices)).sum())
    difference = np.abs(crop.astype(int) - recon)
    difference = np.minimum(4 * difference, 255).astype(np.uint8)
    return (
      state,
      (crop, recon),
      model.colours(indices, state['own']),
      difference,
      model.figures(crop, recon, changed),
      recon,
      *occurrences(state),
    )

  def occurrences(state):
    """The image dark but for the tokens of the chosen code, and a line."""
    if state['code'] is None:
      return None, ''
    kept = model.where(state['indices'], state['code'])
    count = f'{int(kept.sum())} of {kept.size:,} tokens'
    caption = f'code **{state["code"]}**: {count}'
    return model.shown(state['crop'], kept), caption

  def opened(image):
    if image is None:
      return [None] * len(outputs)
    crop = model.crop(image)
    indices = model.encode(crop)
    return views(dict(crop=crop, own=indices, indices=indices, code=None))

  def chosen(state, event: gr.SelectData):
    if state is None:
      return None, None, ''
    code = model.token_at(state['indices'], *event.index)
    state = state | dict(code=code)
    return state, *occurrences(state)

  def edited(state, brush, event: gr.SelectData):
    if state is None or state['code'] is None:
      return warned('Click on a token first: you paint with its code.')
    indices = model.edited(state['indices'], *event.index, brush, state['code'])
    return views(state | dict(indices=indices))

  def restored(state):
    if state is None:
      return warned('Open an image first.')
    return views(state | dict(indices=state['own']))

  side = dict(height=model.size + 60, type='numpy', format='png')
  with gr.Blocks(title='vqrae_jax') as blocks:
    gr.Markdown(f'## {title}')
    state = gr.State()
    with gr.Row():
      upload = gr.Image(
        label='image', elem_id='upload', sources=['upload', 'clipboard'], **side
      )
      slider = gr.ImageSlider(
        label='original | reconstruction',
        elem_id='slider',
        interactive=False,
        type='numpy',
        format='png',
        max_height=model.size + 60,
      )
      difference = gr.Image(
        label='difference × 4', elem_id='difference', interactive=False, **side
      )
    figures = gr.Markdown(elem_id='figures')
    with gr.Row():
      tokens = gr.Image(
        label='tokens: click on one',
        elem_id='tokens',
        interactive=False,
        **side,
      )
      same = gr.Image(
        label='where its code occurs', elem_id='same', interactive=False, **side
      )
      recon = gr.Image(
        label='reconstruction: click to paint',
        elem_id='recon',
        interactive=False,
        **side,
      )
    caption = gr.Markdown(elem_id='caption')
    with gr.Row():
      brush = gr.Slider(1, 16, 4, step=1, label='brush size, tokens per side')
      restore = gr.Button("The image's own tokens again")
    outputs = [state, slider, tokens, difference, figures, recon, same, caption]
    upload.change(opened, upload, outputs)
    tokens.select(chosen, state, [state, same, caption])
    recon.select(edited, [state, brush], outputs)
    restore.click(restored, state, outputs)
  return blocks


if __name__ == '__main__':
  cli.run(main)
