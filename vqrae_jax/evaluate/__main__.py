"""python -m vqrae_jax.evaluate --tokenizer=DIR --data=DATA --out=metrics.json

Measures a tokenizer on images: PSNR, SSIM, LPIPS and rFID of reconstructions,
codebook usage, and, if images have labels, how well the latents predict them
before and after quantization. The shorter side of each image is resized to
--size and the centre is cropped; rFID is the distance to the same crops, or to
a statistics file.

`metrics.json` holds the figures and the protocol that they depend on; the page
beside it shows the best, the median and the worst reconstructions.

Images are processed in batches of a fixed size, the last one padded with zeros:
apart from rounding, no figure depends on the number of devices or hosts. Each
host saves its part beside --out, on a disk that all hosts share, and continues
from there if it was stopped.
"""

import hashlib
import os
import pathlib
import shutil
from collections.abc import Collection
from typing import Any

import numpy as np
from absl import flags

from vqrae_jax import cli
from vqrae_jax.errors import UserError, did_you_mean
from vqrae_jax.evaluate.metrics import METRICS, table
from vqrae_jax.files import digest, write_json

MODULE = 'vqrae_jax.evaluate'
EXAMPLE = (
  f'python -m {MODULE} --tokenizer=runs/quickstart/tokenizer '
  '--data=imagenet/val --out=metrics.json'
)
SHOWN = 4  # best, median and worst images on the page
LARGE = 192  # pixels: smaller images are enlarged by an integer factor
ENOUGH = 2048  # images, for a covariance of full rank


def define(values: flags.FlagValues) -> None:
  """The command's flags."""
  keys = dict(flag_values=values)
  cli.define_tokenizer(values)
  cli.define_data(values)
  text = 'the file to write, F.json; F.png is written beside it'
  flags.DEFINE_string('out', None, text, **keys)
  text = (
    'side of the images in pixels, a multiple of the patch; default: the size '
    'that the tokenizer was made for'
  )
  flags.DEFINE_integer('size', None, text, lower_bound=1, **keys)
  text = 'number of images, evenly spaced in the listing; default: all'
  flags.DEFINE_integer('images', None, text, lower_bound=1, **keys)
  text = (
    'the metrics to compute that need a network: lpips, rfid; "" for neither'
  )
  flags.DEFINE_list('metrics', [*METRICS], text, **keys)
  text = (
    'an .npz with the mean ("mu") and covariance ("sigma") of Inception '
    'features, the reference of rFID in place of the same images'
  )
  flags.DEFINE_string('fid_stats', None, text, **keys)
  text = (
    "files in place of the networks' published ones, NAME=FILE with the names "
    'of fetch_weights: inception, vgg16, lpips-vgg'
  )
  flags.DEFINE_list('weights', [], text, **keys)
  cli.define_hosts(values)


def main(argv: list[str]) -> None:
  """Parses flags, joins the other hosts, measures, writes both files."""
  from vqrae_jax import hosts

  values = flags.FlagValues()
  define(values)
  cli.parse(values, argv, MODULE, EXAMPLE)
  cli.required(values, 'tokenizer', 'data', 'out')
  out = cli.new_file(values.out, '.json')
  cli.new_file(str(out.with_suffix('.png')), '.png')
  cli.join_hosts(values)
  with hosts.loss_reported():
    evaluate(
      values.tokenizer,
      values.data,
      out,
      size=values.size,
      images=values.images,
      metrics=values.metrics,
      fid_stats=values.fid_stats,
      weights=values.weights,
      trusted=values.trusted,
    )


def evaluate(
  tokenizer_dir: str,
  data: str,
  out: pathlib.Path,
  *,
  size: int | None = None,
  images: int | None = None,
  metrics: Collection[str] = METRICS,
  fid_stats: str | None = None,
  weights: Collection[str] = (),
  trusted: Collection[str] = (),
) -> dict[str, Any]:
  """Measures a tokenizer and writes `out` and the page; all hosts must call.

  Args:
    tokenizer_dir: what `load_tokenizer` opens.
    data: what `open_source` opens.
    out: a file that does not exist yet; process 0 writes it.
    size: the side of an image in pixels; None for the tokenizer's own.
    images: how many, evenly spaced; None for all.
    metrics: any of "lpips" and "rfid".
    fid_stats: rFID's reference; None for the originals.
    weights: "NAME=FILE" each, to replace a published file.
    trusted: as in `load_tokenizer`.

  Returns:
    The content of `out` on process 0; {} elsewhere.

  Raises:
    UserError: an unknown metric, a file of weights that is not here (with the
      command that brings it), fewer images than asked for, or none that can
      be read.
  """
  import jax

  from vqrae_jax import export, hosts, sharding
  from vqrae_jax.data.sources import choose_images, open_source
  from vqrae_jax.evaluate import evaluator, fid, visualize
  from vqrae_jax.evaluate import part as part_lib
  from vqrae_jax.models import latents
  from vqrae_jax.nn import inception

  sharding.compile_afresh_on_cpu()
  metrics = [name for name in metrics if name]
  files = _network_files(metrics, weights)
  reference = None
  if fid_stats is not None:
    if 'rfid' not in metrics:
      raise UserError('--fid_stats is for rfid, which --metrics leaves out')
    fid_stats = os.path.expanduser(fid_stats)
    reference = fid.load_statistics(fid_stats, inception.WIDTH)
  source = open_source(data)
  chosen = choose_images(source, images, data)
  tokenizer, variables = export.load_tokenizer(tokenizer_dir, trusted=trusted)
  sides = (size, size) if size else tokenizer.native_size
  latents.check_grid(tokenizer.latents_spec, tokenizer.grid(*sides), '--size')
  card = _protocol(tokenizer, variables, data, sides, files, fid_stats)
  run = part_lib.Run(tokenizer, variables, source, chosen, sides, _load(files))
  # What must match for a part to be continued.
  paths = source.paths
  if len(paths) == len(source):  # a file an image
    paths = [paths[i] for i in chosen]
  sizes = [(str(path), _size(path)) for path in paths]
  identity = card | dict(
    files=hashlib.sha256(repr(sizes).encode()).hexdigest(),
    images=len(chosen),
    hosts=jax.process_count(),
  )
  parts = out.with_name(f'{out.name}.parts')
  part = part_lib.measure(run, parts, identity)
  if jax.process_count() > 1:
    hosts.wait_for_all('the parts of an evaluation')
    if jax.process_index():
      return {}
    part = part_lib.read_all(parts, identity)
  if not part.sums.images:
    raise UserError(
      f'none of the {len(chosen)} images of "{data}" can be read: '
      f'{next(iter(part.skipped.values()))}'
    )
  figures = part.sums.results(reference)
  if tokenizer.codebook_size:
    figures['bits_per_image'] = evaluator.bits_per_image(tokenizer, *sides)
  figures |= _probes(run, part)
  skipped = {**source.damaged, **part.skipped}
  report = figures | dict(
    tokenizer=str(tokenizer_dir),
    skipped=skipped,
    device=f'{jax.device_count()} x {jax.devices()[0].device_kind}',
    protocol=card,
  )
  visualize.save_png(_page(run, part), out.with_suffix('.png'))
  write_json(out, report)
  shutil.rmtree(parts, ignore_errors=True)
  n, lost = part.sums.images, len(skipped)
  print(f'{n} image{"s" * (n != 1)}' + f' ({lost} skipped)' * bool(lost))
  print(table(report))
  if 'rfid' in figures and part.sums.images < ENOUGH:
    print(
      f'\nwarning: rFID on {part.sums.images} images: with fewer than '
      f'{ENOUGH:,}, the covariance of the features is rank-deficient; compare '
      'it only with an rFID of the same images'
    )
  print(f'\nwrote {out} and {out.with_suffix(".png")}')
  return report


def _size(path: pathlib.Path) -> int:
  """In bytes; -1 of a file that is gone."""
  try:
    return path.stat().st_size
  except OSError:
    return -1


def _network_files(
  metrics: Collection[str], weights: Collection[str]
) -> dict[str, dict[str, pathlib.Path]]:
  """{metric: {row of `weights.hub.FILES`: file}} of those with a network."""
  from vqrae_jax.pretrained import networks

  given = {}
  for text in weights:
    name, equals, file = text.partition('=')
    if not equals:
      raise UserError(f'--weights={text} must be NAME=FILE')
    given[name] = pathlib.Path(os.path.expanduser(file))
  for name in metrics:
    if name not in METRICS:
      raise UserError(
        f'--metrics: unknown metric "{name}"{did_you_mean(name, METRICS)}'
      )
  known = [row for name in metrics for row in networks.NEEDS[name]]
  for name in given:
    if name not in known:
      raise UserError(
        f'--weights: "{name}" is no file of the metrics asked for'
        f'{did_you_mean(name, known)}'
      )
  return networks.files_of(metrics, given)


def _load(files: dict[str, dict[str, pathlib.Path]]) -> Any:
  from vqrae_jax.pretrained import networks

  return {name: networks.load(name, rows) for name, rows in files.items()}


def _protocol(
  tokenizer: Any,
  variables: Any,
  data: str,
  sides: tuple[int, int],
  files: dict[str, dict[str, pathlib.Path]],
  fid_stats: str | None,
) -> dict[str, Any]:
  """What the figures depend on, as JSON values."""
  from vqrae_jax import export

  card = dict(
    fingerprint=export.fingerprint_of(tokenizer, variables),
    data=data,
    crop=(
      f'the shorter side to {min(sides)} pixels (Pillow, bicubic with '
      f'antialias and reducing_gap=3), the centre {sides[0]}x{sides[1]}'
    ),
    range='reconstructions clipped to [0, 1] and rounded to 8 bits',
    ssim='gaussian window of 11, sigma 1.5, data range 1, mean over channels',
    weights={
      row: dict(file=file.name, sha256=digest(file))
      for rows in files.values()
      for row, file in rows.items()
    },
    dtype=tokenizer.decoder_spec.vit.dtype,
    versions=cli.versions(),
  )
  if 'rfid' in files:
    card['rfid'] = dict(
      resize='TensorFlow 1 bilinear to 299 pixels, of 8-bit values',
      reference='the same crops',
    )
    if fid_stats is not None:
      path = pathlib.Path(fid_stats)
      reference = dict(file=path.name, sha256=digest(path))
      card['rfid']['reference'] = reference
  return card


# ----------------------------------------------------------------------------
# The report.


def _probes(run: Any, part: Any) -> dict[str, float]:
  """Accuracies of the latents before and after quantization, if images have
  labels of at least two classes."""
  from vqrae_jax.evaluate import probes

  measured = np.flatnonzero(part.measured)
  labels = [run.source.label(run.chosen[i]) for i in measured]
  if None in labels or len({*labels}) < 2:
    return {}
  labels = np.unique(labels, return_inverse=True)[1].astype(np.int32)
  if probes.halves(labels).all():  # no class has a second image
    return {}
  found = {'classes': int(labels.max()) + 1}
  for name, probe in dict(knn=probes.knn, linear=probes.linear).items():
    for i, when in enumerate(('', '_quantized')):
      if run.tokenizer.codebook_size or not i:
        found[f'{name}{when}'] = probe(part.latents[measured, i], labels)
  return found


def _page(run: Any, part: Any) -> Any:
  """The best, the median and the worst images by PSNR, each above its
  reconstruction."""
  from vqrae_jax.evaluate import evaluator, visualize

  measured = np.flatnonzero(part.measured)
  order = measured[np.argsort(-part.psnr[measured], kind='stable')].tolist()
  shown = min(SHOWN, max(len(order) // 3, 1))
  middle = (len(order) - shown) // 2
  groups = {
    'best': order[:shown],
    'median': order[middle : middle + shown],
    'worst': order[-shown:],
  }
  columns = {}
  for rank, places in groups.items():
    for i in places:
      if i in columns:
        continue
      (image,) = run.cut(run.source.picture(run.chosen[i]))
      original, recon = evaluator.reconstruct_tiled(
        run.tokenizer,
        run.variables,
        image,
        run.tokenizer.patch_size,
        whole=True,
      )
      label = f'{rank} {part.psnr[i]:.1f} dB  {run.source.name(run.chosen[i])}'
      pair = original, visualize.to_uint8(recon)
      sides = [visualize.enlarged(x, min(run.sides), LARGE) for x in pair]
      columns[i] = *sides, label
  title = f'best, median and worst of {len(order)} images by PSNR'
  return visualize.comparison(*zip(*columns.values(), strict=True), title=title)


if __name__ == '__main__':
  cli.run(main)
