"""python -m benchmarks.logs --data=FOLDER [--only=vq,gan]
  python -m benchmarks.logs --report

Small runs that have a trouble, and beside each the run with the key that cures
it, for docs/logs.md. FOLDER holds `cifar10_wds/{train,test}-*.tar`; `photos…`
read resized photographs of `bundled:photos`. This file is their config too, so
that each is a command of its own:

  python -m vqrae_jax.train --workdir=runs/logs/vq-no-revival \\
    --config=benchmarks/logs.py:run=vq-no-revival,data=FOLDER

`--only=gan,open` trains those and what they begin with. Runs that have finished
in runs/logs are not run again. Each writes a file in benchmarks/results/logs/:
its curves, warnings and last figures, of which `--report` makes the table and
the pictures of docs.
"""

import argparse
import datetime
import json
import pathlib
import re

from PIL import Image

from benchmarks import report as report_lib
from configs import common
from vqrae_jax import cli
from vqrae_jax.data.sources import open_source
from vqrae_jax.files import atomic_write
from vqrae_jax.ops import trees

CONFIG = 'benchmarks/logs.py'
SCRATCH = 'configs/scratch.py'
OUT = 'runs/logs'
RESULTS = report_lib.ROOT / 'benchmarks' / 'results' / 'logs'
FIGURES = 'psnr', 'usage', 'perplexity', 'images_per_second', 'data_wait'
DIGITS = 5  # of a curve's values

PATCH = dict(
  name='patch',
  fields=dict(hidden=32, halvings=2, groups=8, pool=0),
  schedule=dict(lr=5e-4),
  augment=False,
  lecam=0.001,
)


def _rate(lr, warmup):
  return {'schedules': (('.*', dict(lr=lr, warmup=warmup)),)}


def _gan(ramp=0, **discriminator):
  return {
    'losses.gan': dict(weight=0.3, ramp=ramp),
    'discriminator': PATCH | discriminator,
  }


_FROZEN = {
  'init.encoder': f'{OUT}/none/tokenizer',
  'schedules': common.encoder_frozen(lr=1e-3, warmup=25),
}
_OPEN = {'init_from': f'{OUT}/simvq-frozen/tokenizer'}
_TEACHER = {
  'teacher': 'init',
  'losses.distill': dict(weight=1.0, target='teacher'),
}
# So small a model that it waits for its images.
_SMALL = {
  'model': common.small_model(8, 32, dict(name='vq', num_codes=256), 64),
  'data.resize': (32, 40),
}
# name: (the quantizer of configs/scratch.py, the steps, {key: value} beside it)
RUNS = {
  'vq': ('vq', 300, {}),
  'vq-no-revival': ('vq', 300, {'model.quantizer.revive_below': 0.0}),
  'simvq': ('simvq', 300, {}),
  'simvq-normal': ('simvq', 300, {'model.quantizer.basis_init': 'normal'}),
  'none': ('none', 300, {}),
  'simvq-frozen': ('simvq', 300, _FROZEN | {'losses.commit': 0.01}),
  'simvq-frozen-commit': ('simvq', 300, _FROZEN | {'losses.commit': 0.25}),
  'gan': ('vq', 60, _gan(ramp=30)),
  'gan-won': ('vq', 60, _gan(schedule=dict(lr=1e-3), updates=4, lecam=0.0)),
  'gan-rate': ('vq', 60, _gan(schedule=dict(lr=1e-4), updates=4, lecam=0.0)),
  'gan-lecam': ('vq', 60, _gan(schedule=dict(lr=1e-3), updates=4, lecam=0.1)),
  'gan-r1': (
    'vq',
    60,
    _gan(schedule=dict(lr=1e-3), updates=4, lecam=0.0, r1=1.0),
  ),
  'gan-diverge': (
    'vq',
    60,
    _gan(schedule=dict(lr=1.0), loss='vanilla', lecam=0.0),
  ),
  'vq-1e3': ('vq', 30, _rate(1e3, warmup=5)),
  'vq-1e-1': ('vq', 100, _rate(1e-1, warmup=8)),
  'photos': ('vq', 40, _SMALL),
  'photos-simplejpeg': ('vq', 40, _SMALL | {'data.decoder': 'simplejpeg'}),
  'photos-64': ('vq', 40, _SMALL),
  'open': ('simvq', 100, _OPEN | _rate(1e-3, warmup=1)),
  'open-teacher': ('simvq', 100, _OPEN | _TEACHER | _rate(1e-3, warmup=1)),
  'open-slow': ('simvq', 100, _OPEN | _rate(1e-4, warmup=8)),
  'fsq': ('fsq', 150, _rate(1e-3, warmup=12)),
  'fsq-1e-2': ('fsq', 150, _rate(1e-2, warmup=12)),
  'fsq-2e-4': ('fsq', 150, _rate(2e-4, warmup=12)),
  'fsq-mlp': (
    'fsq',
    150,
    _rate(2e-4, warmup=12) | {'model.quantizer.projection': 'mlp'},
  ),
}
# name: the run that it begins with, if any
BEFORE = {
  name: pathlib.Path(folder).parent.name or None
  for name, (_, _, keys) in RUNS.items()
  for folder in (keys.get('init.encoder') or keys.get('init_from') or '',)
}
STOPPED = 'vq-1e3'  # the run that ends in an error
# picture: (its runs, its panels)
PICTURES = {
  'healthy': (
    ('vq',),
    ('loss/l2', 'loss/commit', 'psnr', 'eval/psnr', 'usage', 'perplexity',
     'grad_norm', 'update_norm', 'lr/decoder'),
  ),
  'collapse': (
    ('vq', 'vq-no-revival', 'simvq', 'simvq-normal'),
    ('usage', 'perplexity', 'eval/psnr'),
  ),
  'commit': (
    ('simvq-frozen', 'simvq-frozen-commit'),
    ('loss/commit', 'usage', 'perplexity'),
  ),
  'fsq': (
    ('fsq', 'fsq-1e-2', 'fsq-2e-4', 'fsq-mlp'),
    ('usage', 'perplexity', 'psnr'),
  ),
  'rate': (
    ('vq', 'vq-1e-1'),
    ('loss/l2', 'psnr', 'grad_norm', 'update_norm', 'usage'),
  ),
  'won': (
    ('gan', 'gan-won', 'gan-rate', 'gan-lecam', 'gan-r1'),
    ('loss/discriminator', 'logits/real', 'logits/fake', 'adaptive_weight',
     'psnr'),
  ),
  'diverge': (
    ('gan', 'gan-diverge'),
    ('logits/fake', 'adaptive_weight', 'discriminator/grad_norm'),
  ),
  'data': (
    ('photos', 'photos-simplejpeg', 'photos-64'),
    ('data_wait', 'images_per_second', 'loss/l2'),
  ),
  'second': (
    ('open', 'open-slow', 'open-teacher'),
    ('psnr', 'usage', 'loss/distill'),
  ),
}  # fmt: skip


def get_config(arguments=None):
  """The config of a run of this file; `:run=NAME,data=FOLDER`."""
  arg = common.arguments(arguments, run=(*RUNS,), data='FOLDER')
  quantizer, steps, keys = RUNS[arg.run]
  config = cli.load_config(f'{SCRATCH}:quantizer={quantizer},steps={steps}')
  config.batch_size = 16
  config.checkpoint.every = 0
  config.log.update(every=5, images_every=0, usage_window=25, tensorboard=False)
  if arg.run.startswith('photos'):
    config.data.source = str(photos(64 if arg.run == 'photos-64' else 2400))
  else:
    config.data.source = f'{arg.data}/cifar10_wds/train-*.tar'
    config.eval.source = f'{arg.data}/cifar10_wds/test-*.tar'
    config.eval.update(include=('*0',), every=25)
  for key, value in keys.items():
    *path, last = key.split('.')
    section = config
    for part in path:
      section = section[part]
    with section.ignore_type():
      section[last] = value
  return config


def photos(side):
  """The folder of JPEG files of `side` pixels a side, made if absent."""
  folder = report_lib.ROOT / OUT / f'jpeg-{side}'
  if not folder.exists():
    folder.mkdir(parents=True)
    source = open_source('bundled:photos')
    for i, title in enumerate(source.names):
      image = Image.fromarray(source[i]).resize((side, side), Image.BICUBIC)
      image.save(folder / f'{title}.jpg', quality=90)
  return folder


def run(name, data):
  """Trains a run; what is kept of it: its curves, warnings and figures."""
  config = f'--config={CONFIG}:run={name},data={data}'
  done = report_lib.train(config, f'--workdir={OUT}/{name}')
  rows, summary = report_lib.written(report_lib.ROOT / OUT / name)
  if name != STOPPED:
    done.check_returncode()
  drawn = {
    n for runs, names in PICTURES.values() if name in runs for n in names
  }
  return dict(
    date=datetime.date.today().isoformat(),
    hardware=report_lib.hardware(),
    versions=cli.versions(),
    code=done.returncode,
    figures={n: x for n, x in summary.items() if n in FIGURES},
    warnings=re.findall(
      r'^(?:W\S+ \S+ +\d+ \S+\] |error: )(.*)$', done.stderr, re.M
    ),
    curves={
      n: [
        (r['step'], float(f'{r[n]:.{DIGITS}g}'))
        for r in rows
        if r.get(n) is not None
      ]
      for n in sorted(drawn)
    },
  )


# -- the report ----------------------------------------------------------------
def table(results):
  """Markdown: where they ran, and a line a run."""
  columns = ('psnr', '.2f'), ('usage', '.3f'), ('perplexity', '.0f')
  lines = [
    '| run | quantizer | steps | keys | PSNR, dB | usage | perplexity '
    '| warnings |',
    '|---|---|---|---|---|---|---|---|',
  ]
  same, ran = trees.flatten({'discriminator': PATCH}), set()
  for name, found in results.items():
    quantizer, steps, keys = RUNS[name]
    flat: dict = {}
    for key, value in keys.items():
      part = {key: value}
      flat |= trees.flatten(part) if type(value) is dict else part
    words = [
      f'`{key.replace("/", ".")}={value}`'
      for key, value in flat.items()
      if not key.startswith('model/') and value != same.get(key)
    ]
    cells = [
      format(found['figures'][n], form) if n in found['figures'] else '–'
      for n, form in columns
    ]
    cells = [name, quantizer, str(steps), '; '.join(words) or '–', *cells]
    warnings = [w for w in found['warnings'] if not w.startswith('unusual: ')]
    lines.append(f'| {" | ".join(cells)} | {len(warnings)} |')
    versions = (f'{n} {found["versions"][n]}' for n in ('python', 'jax'))
    ran.add(f'{found["date"]}; {found["hardware"]}; {", ".join(versions)}.')
  return '\n'.join([*sorted(ran), '', *lines])


def report():
  """Writes the table of docs/logs.md and its pictures."""
  results = {
    name: json.loads((RESULTS / f'{name}.json').read_text()) for name in RUNS
  }
  report_lib.write('logs.md', 'logs', table(results))
  folder = report_lib.DOCS / 'images' / 'logs'
  folder.mkdir(parents=True, exist_ok=True)
  for picture, (names, panels) in PICTURES.items():
    curves = {name: results[name]['curves'] for name in names}
    lines = {
      panel: {name: curves[name].get(panel) for name in names}
      for panel in panels
    }
    svg = report_lib.curves(lines, names)
    (folder / f'{picture}.svg').write_text(svg)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--data', type=lambda x: pathlib.Path(x).resolve())
  parser.add_argument('--only', help='names of runs, with commas between')
  parser.add_argument('--report', action='store_true')
  options = parser.parse_args()
  if options.report:
    return report()
  if options.data is None:
    parser.error('--data is missing: the folder of CIFAR-10')
  for name in report_lib.wanted(parser, options.only, BEFORE):
    if report_lib.written(report_lib.ROOT / OUT / name)[1]:
      continue
    print(f'== {name}', flush=True)
    found = run(name, options.data)
    with atomic_write(RESULTS / f'{name}.json') as file:
      file.write(json.dumps(found, sort_keys=True).encode() + b'\n')


if __name__ == '__main__':
  main()
