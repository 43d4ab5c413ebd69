"""python -m benchmarks.pods

Writes docs/pods.md from benchmarks/results/pods/*.json, the reports of
`python -m vqrae_jax.preflight --json=…`.
"""

import json
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]
HEAD = """# Recipes on pods

Compiled ahead of time by `python -m vqrae_jax.preflight` for devices that are
not there; nothing ran. A row is the report of

    python -m vqrae_jax.preflight --config=configs/RECIPE --topology=DEVICES

with `--config.batch_size` where it is given and `--config.init_from=RUN` for
stage 2. "Needs" is what the compiler sets aside on a device for the train step,
the larger of the two programs: parameters, moments, EMA weights, frozen
networks, the batch, temporaries and the program itself. FLOPs are of one image
of the train step, whatever is computed twice included.

| recipe | devices | mesh | batch | images at once | needs, GiB | of | \
temporaries, MiB | code, MiB | compiled in, CPU-minutes | GFLOPs an image |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def row(found):
  """A line of the table."""
  step, gib = found['train_step'], 2**30
  config = re.search(r'--config=configs/(\S+)', found['command'])[1]
  overrides = re.findall(r'--config\.((?!init_from)\S+)', found['command'])
  fits = '' if found['fits'] else ' **does not fit**'
  batch, memory = found['batch'], step['memory']
  cells = [
    f'`{" ".join([config, *overrides])}`',
    re.search(r'--topology=(\S+)', found['command'])[1],
    ', '.join(f'{k}={v}' for k, v in found['mesh'].items() if v > 1),
    batch['size'],
    batch['microbatch'],
    f'{step["needs"] / gib:.2f}{fits}',
    f'{step["limit"] / gib:.2f}',
    f'{memory["temporaries"] / 2**20:,.0f}',
    f'{memory["code"] / 2**20:.0f}',
    f'{step["seconds"]["compile_cpu"] / 60:.1f}',
    f'{step["flops"] / step["images"] / 1e9:,.0f}',
  ]
  return '| ' + ' | '.join(map(str, cells)) + ' |'


def main():
  files = sorted((ROOT / 'benchmarks/results/pods').glob('*.json'))
  found = [json.loads(path.read_text()) for path in files]
  text = HEAD + '\n'.join(map(row, found))
  versions = {
    ', '.join(f'{k} {v}' for k, v in f['versions'].items()) for f in found
  }
  text += '\n\nVersions: ' + '; '.join(sorted(versions)) + '.\n'
  (ROOT / 'docs' / 'pods.md').write_text(text)


if __name__ == '__main__':
  main()
