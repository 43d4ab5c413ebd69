"""python -m vqrae_jax.reconstruct_images --tokenizer=DIR --images=X --out=DIR

Encodes images to tokens and decodes them: one PNG and PSNR per image, and a
side-by-side page. Images are cropped to a multiple of the patch (or the tile).
"""

import pathlib
from collections.abc import Collection

from absl import flags

from vqrae_jax import cli
from vqrae_jax.errors import UserError

MODULE = 'vqrae_jax.reconstruct_images'
EXAMPLE = (
  f'python -m {MODULE} --tokenizer=runs/quickstart/tokenizer '
  '--images=photos/ --out=out'
)
_SHOWN = 8  # images on the page


def define(values: flags.FlagValues) -> None:
  """The command's flags."""
  keys = dict(flag_values=values)
  cli.define_tokenizer(values)
  cli.define_data(values, 'images')
  text = 'the folder for the PNGs, made if absent'
  flags.DEFINE_string('out', None, text, **keys)
  text = (
    'pixels of the square tiles that are tokenized one by one; 0 processes '
    'each image in one piece; default: the size the tokenizer was made for'
  )
  flags.DEFINE_integer('tile', None, text, **keys)


def main(argv: list[str]) -> None:
  """Parses flags, reconstructs, prints a line an image."""
  values = flags.FlagValues()
  define(values)
  cli.parse(values, argv, MODULE, EXAMPLE)
  cli.required(values, 'tokenizer', 'images', 'out')
  out = cli.new_folder(values.out)
  reconstruct_folder(
    values.tokenizer, values.images, out, values.tile, values.trusted
  )


def reconstruct_folder(
  tokenizer_dir: str,
  images: str,
  out: pathlib.Path,
  tile: int | None,
  trusted: Collection[str] = (),
) -> None:
  """Writes out/NAME.png for each image and out/comparison.png.

  Args:
    tokenizer_dir: what `load_tokenizer` opens.
    images: what `open_source` opens.
    out: the folder.
    tile: None for the decoder's native size, 0 for whole images.
    trusted: that of `load_tokenizer`.
  """
  from PIL import Image
  from tqdm import tqdm

  from vqrae_jax import export
  from vqrae_jax.data.decode import ImageDecodeError
  from vqrae_jax.data.pipeline import each_image
  from vqrae_jax.data.sources import open_source
  from vqrae_jax.evaluate import evaluator, visualize

  source = open_source(images)
  _check_outputs(source, out)
  tokenizer, variables = export.load_tokenizer(tokenizer_dir, trusted=trusted)
  if not tokenizer.codebook_size:
    print('this tokenizer is continuous: images pass through latents')
  p = tokenizer.patch_size
  if tile is not None and (tile < 0 or tile % p):
    raise UserError(
      f'--tile={tile} must be 0 or a multiple of the decoder patch {p}'
    )
  whole = tile == 0
  size = tokenizer.native_size if tile is None else (tile or p,) * 2
  names, columns, skipped = source.names, [], []
  for i, image in tqdm(
    each_image(source), total=len(source), unit='img', disable=None
  ):
    name = names[i]
    if not isinstance(image, ImageDecodeError):
      (h, w), (least_h, least_w) = image.shape[:2], size
      if h < least_h or w < least_w:
        reason = f'{h}x{w} pixels, and {least_h}x{least_w} are the least here'
        image = ImageDecodeError(name, reason)
    if isinstance(image, ImageDecodeError):
      tqdm.write(f'{name}  skipped: {image.reason}')
      skipped.append(image)
      continue
    original, recon = evaluator.reconstruct_tiled(
      tokenizer, variables, image, size, whole=whole
    )
    picture = visualize.to_uint8(recon)
    db = evaluator.psnr(original, recon)
    visualize.save_png(Image.fromarray(picture), out / f'{name}.png')
    tqdm.write(f'{name}  {db:.2f} dB  {picture.shape[1]}x{picture.shape[0]}')
    if len(columns) < _SHOWN:
      columns.append((original, picture, f'{name}  {db:.1f} dB'))
  if not columns:
    raise skipped[-1]
  how = f'from tokens of tiles of {size[0]}x{size[1]} pixels'
  how = 'in one piece' if whole else how
  page = visualize.comparison(
    *zip(*columns, strict=True), title=f'images {how}'
  )
  visualize.save_png(page, out / 'comparison.png')
  count = len(source) - len(skipped)
  lost = f' ({len(skipped)} skipped)' if skipped else ''
  print(
    f'{count} image{"s" * (count > 1)}{lost} in {out}, side by side in '
    f'{out}/comparison.png'
  )


def _check_outputs(source, out: pathlib.Path) -> None:
  """No file lies among the originals, and no two images share a name."""
  taken = {'comparison': out / 'comparison.png'}
  for path in source.paths:
    if out.resolve() in path.resolve().parents:
      raise UserError(f'--out={out} holds {path}; name a folder of its own')
  for i, name in enumerate(source.names):
    if name in taken:
      raise UserError(
        f'{source.name(i)} and {taken[name]} would both be {out / name}.png; '
        'reconstruct them in two runs, or rename one'
      )
    taken[name] = source.name(i)


if __name__ == '__main__':
  cli.run(main)
