"""python -m benchmarks.pods

Writes the table of docs/pods.md from benchmarks/results/pods/*.json, the
reports of `python -m vqrae_jax.preflight --json=…`.
"""

import json
import re

from benchmarks import report
from vqrae_jax import preflight

HEAD = """| recipe | devices | batch | on each | GiB | of | temporaries, MiB | \
code, MiB | CPU-minutes | GFLOPs |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
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
    batch['size'],
    batch['microbatch'],
    f'{step["needs"] / gib:.2f}{fits}',
    f'{step["limit"] / gib:.2f}',
    f'{memory["temporaries"] / 2**20:,.0f}',
    f'{memory["code"] / 2**20:.0f}' if memory['code'] else '–',
    f'{step["seconds"]["compile_cpu"] / 60:.1f}',
    f'{step["flops"] / step["images"] / 1e9:,.0f}',
  ]
  return '| ' + ' | '.join(map(str, cells)) + ' |'


def main():
  files = sorted((report.ROOT / 'benchmarks/results/pods').glob('*.json'))
  found = [json.loads(path.read_text()) for path in files]
  text = HEAD + '\n'.join(map(row, found))
  versions = {
    ', '.join(
      f'{k} {v}' for k, v in f['versions'].items() if k in preflight.VERSIONS
    )
    for f in found
  }
  text += '\n\nVersions: ' + '; '.join(sorted(versions)) + '.'
  report.write('pods.md', 'pods', text)


if __name__ == '__main__':
  main()
