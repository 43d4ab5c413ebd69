"""The end of a run: the tokenizer on disk, its figures and its picture.

What is evaluated is the exported directory, opened anew.
"""

import pathlib
from typing import Any

import jax
from absl import logging

from vqrae_jax import export
from vqrae_jax.evaluate import evaluator, pictures
from vqrae_jax.train.report import write_json

SHOWN = 12  # photographs on the page
# Figures in the order of summary.json and of the table at the end.
_TABLE = (
  ('psnr', 'PSNR, dB (held out, pooled)', '.2f'),
  ('psnr_block_mean', 'PSNR of block means, dB', '.2f'),
  ('psnr_shuffled', 'PSNR with codes shuffled, dB', '.2f'),
  ('ssim', 'SSIM', '.3f'),
  ('bits_per_image', 'bits per image', '.0f'),
  ('codes_used', 'codes used', 'd'),
  ('train_seconds', 'training, s', '.0f'),
  ('images_per_second', 'images/s', '.0f'),
)


def finish(
  run: Any, variables: Any, workdir: pathlib.Path, figures: dict[str, Any]
) -> dict[str, Any]:
  """Exports, evaluates, writes summary.json; returns what it holds.

  Args:
    run: the loop's `Run`.
    variables: the averaged weights and the live codebook.
    workdir: where tokenizer/, summary.json and reconstructions.png go.
    figures: what the loop measured.
  """
  if jax.process_index():
    return figures
  folder = workdir / 'tokenizer'
  figures['fingerprint'] = export.save_tokenizer(
    run.tokenizer, variables, folder
  )
  if run.spec.eval is not None:
    figures |= _evaluate(run, folder, workdir)
  write_json(workdir / 'summary.json', figures)
  return figures


def _evaluate(run, folder, workdir) -> dict[str, float]:
  options = {'dtype': run.spec.model.get('dtype', 'float32')}
  tokenizer, variables = export.load_tokenizer(folder, **options)
  spec = run.spec.eval
  names = run.held_out.names
  few = len(names) <= SHOWN
  logging.info(
    'evaluating on %s', ', '.join(names) if few else f'{len(names)} photographs'
  )
  figures = evaluator.evaluate_tiles(
    tokenizer, variables, run.held_out, spec.tile, spec.batch_size
  )
  figures['photographs'] = names
  page = picture_of(tokenizer, variables, run.held_out, spec.tile)
  pictures.save_png(page, workdir / 'reconstructions.png')
  return figures


def picture_of(tokenizer, variables, source, tile: int):
  """At most 12 photographs, each above its reconstruction, painted tile by
  tile."""
  originals, painted, labels = [], [], []
  for i in pictures.spread(len(source), SHOWN):
    name = source.names[i]
    original, image = evaluator.reconstruct_tiled(
      tokenizer, variables, source[i], tile
    )
    originals.append(original)
    painted.append(pictures.to_uint8(image))
    labels.append(f'{name}  {evaluator.psnr(original, image):.1f} dB')
  title = f'originals above reconstructions, in tiles of {tile} px'
  return pictures.comparison(originals, painted, labels, title)


def table(figures: dict[str, Any]) -> str:
  """The figures that a user asks for first, a line each."""
  rows = [
    (words, format(figures[key], form))
    for key, words, form in _TABLE
    if key in figures
  ]
  width = max(len(words) for words, _ in rows)
  return '\n'.join(f'  {words:<{width}}  {value:>9}' for words, value in rows)
