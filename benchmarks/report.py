"""What the benchmarks' reports share: tables in docs, the machine's name."""

import os
import pathlib

import jax

DOCS = pathlib.Path(__file__).resolve().parents[1] / 'docs'


def write(document: str, benchmark: str, made: str) -> None:
  """Puts `made` between a benchmark's marks in a file of docs."""
  begin, end = f'<!-- benchmarks.{benchmark} --report -->', '<!-- end -->'
  path = DOCS / document
  before, _, rest = path.read_text().partition(begin)
  _, _, after = rest.partition(end)
  path.write_text(f'{before}{begin}\n\n{made}\n\n{end}{after}')


def hardware() -> str:
  """The accelerator, or the CPU and how many cores may be used."""
  device = jax.devices()[0]
  if device.platform != 'cpu':
    return device.device_kind
  text = pathlib.Path('/proc/cpuinfo').read_text()
  kind = next(s for s in text.splitlines() if s.startswith('model name'))
  return f'{kind.split(": ")[1]}, {len(os.sched_getaffinity(0))} cores'
