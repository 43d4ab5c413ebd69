"""python -m benchmarks.two_stages --data=FOLDER [--steps=1000] [--out=DIR]

Both stages of `configs/two_stages_small.py` with and without each term, one run
after another: the base, five runs with the encoder frozen, three with it open,
half as long, and `longer`, as long as those at their rate, the encoder frozen.
`--only=open,l2` trains those and what they begin with. Finished runs are not
run again; `--report` runs none. Writes OUT/table.md, OUT/curves.svg (held-out
PSNR and losses over steps) and OUT/reconstructions.png (two images of the
scikit-image wheel, which no run has seen, by each run).
"""

import argparse
import functools
import pathlib

from benchmarks import report as report_lib

CONFIG = 'configs/two_stages_small.py'

L2 = 'stage=1,lpips=False,gan=False'
# name: (the config's arguments, the run it begins with, what else is set)
RUNS = {
  'base': ('stage=0', None),
  'l2': (L2, 'base'),
  'l2-commit': (L2, 'base', '--config.losses.commit=0.25'),
  'l2-lpips': ('stage=1,gan=False', 'base'),
  'l2-gan': ('stage=1,lpips=False', 'base'),
  'l2-lpips-gan': ('stage=1', 'base'),
  'open': ('stage=2,distill=none', 'l2-lpips-gan'),
  'open-teacher': ('stage=2,distill=teacher', 'l2-lpips-gan'),
  'open-self': ('stage=2,distill=self', 'l2-lpips-gan'),
  'longer': ('stage=2,frozen=True,distill=none', 'l2-lpips-gan'),
}
CURVES = ('eval/psnr', 'usage', 'loss/lpips', 'loss/gan', 'adaptive_weight')


def steps_of(name, options):
  return options.steps // (2 if 'stage=2' in RUNS[name][0] else 1)


def command(name, options):
  arguments, before, *more = RUNS[name]
  words = [
    f'--config={CONFIG}:{arguments},steps={steps_of(name, options)}',
    f'--config.data.source={options.data}',
    f'--workdir={options.out}/{name}',
  ]
  if before:
    key = 'init.encoder' if before == 'base' else 'init_from'
    words.append(f'--config.{key}={options.out}/{before}')
  return words + more


def written(name, options):
  return report_lib.written(pathlib.Path(options.out) / name)


def finished(options):
  """Names of the runs whose figures are there, after as many steps."""
  steps = {name: written(name, options)[1].get('steps') for name in RUNS}
  return [n for n, count in steps.items() if count == steps_of(n, options)]


def opened(name, options):
  import vqrae_jax

  folder = pathlib.Path(options.out) / name / 'tokenizer'
  return vqrae_jax.load_tokenizer(folder)


def drift(name, options, tiles):
  """|Z - Z0|^2 / |Z0|^2 of latents against the run it began with."""
  import numpy as np

  import vqrae_jax

  now, before = (
    np.asarray(vqrae_jax.encode(*opened(n, options), tiles))
    for n in (name, RUNS[name][1])
  )
  return float(((now - before) ** 2).sum() / (before**2).sum())


def table(options, tiles):
  """Markdown: a row a run, with the command that made it."""
  lines = [
    '| run | PSNR, dB | SSIM | usage | perplexity | latents moved |',
    '|---|---|---|---|---|---|',
  ]
  commands = []
  for name in finished(options):
    x = written(name, options)[1]
    codes = 'continuous | –'
    if 'usage' in x:
      codes = f'{x["usage"]:.3f} | {x["perplexity"]:.0f}'
    moved = f'{drift(name, options, tiles):.2g}' if RUNS[name][1] else '–'
    lines.append(
      f'| {name} | {x["psnr"]:.2f} | {x["ssim"]:.3f} | {codes} | {moved} |'
    )
    words = ' '.join(command(name, options))
    commands.append(f'    python -m vqrae_jax.train {words}')
  return '\n'.join([*lines, '', *commands, ''])


def points(figure, name, options):
  """[(step, value)] of a run."""
  if (figure, name) == ('eval/psnr', 'base'):
    return []  # continuous, and so far above the others
  late = figure in ('loss/gan', 'adaptive_weight')
  return [
    (r['step'], r[figure])
    for r in written(name, options)[0]
    if r.get(figure) is not None and (r.get('weight/gan') or not late)
  ]


def curves(options):
  """SVG: a panel a figure, a line a run."""
  panels = {
    figure: {name: points(figure, name, options) for name in finished(options)}
    for figure in CURVES
  }
  return report_lib.curves(panels, list(RUNS))


def page(options):
  """A crop of two images by each run, three times as large."""
  from vqrae_jax.data.sources import open_source
  from vqrae_jax.evaluate import evaluator, visualize

  source = open_source('bundled:photos', ('astronaut', 'chelsea'), ())
  corners = ((0, 160), (60, 110))
  crops = [
    source[i][top : top + 96, left : left + 96]
    for i, (top, left) in enumerate(corners)
  ]

  columns = {'original': crops}
  for name in finished(options):
    tokenizer, variables = opened(name, options)
    run = functools.partial(evaluator.reconstruct_tiled, tokenizer, variables)
    columns[name] = [visualize.to_uint8(run(x, 32)[1]) for x in crops]
  return report_lib.sheet(columns, 3 * 96)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--data', required=True)
  parser.add_argument('--steps', type=int, default=1000)
  parser.add_argument('--out', default='runs/two_stages')
  parser.add_argument('--only', help='names of runs, with commas between')
  parser.add_argument('--report', action='store_true')
  options = parser.parse_args()
  before = {name: begins for name, (_, begins, *_) in RUNS.items()}
  names = report_lib.wanted(parser, options.only, before)
  if not options.report:
    for name in names:
      if name not in finished(options):
        print(f'== {name}', flush=True)
        report_lib.train(*command(name, options)).check_returncode()
  from configs import two_stages_small
  from vqrae_jax.data.sources import open_source
  from vqrae_jax.evaluate import evaluator

  held_out = open_source(options.data, two_stages_small.HELD_OUT, ())
  out = pathlib.Path(options.out)
  tiles = evaluator.tiles_of(held_out, 32)[:256]
  (out / 'table.md').write_text(table(options, tiles))
  (out / 'curves.svg').write_text(curves(options))
  page(options).save(out / 'reconstructions.png')
  print((out / 'table.md').read_text())


if __name__ == '__main__':
  main()
