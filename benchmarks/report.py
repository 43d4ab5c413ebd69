"""What the benchmarks share: runs, tables in docs, the machine's name, curves,
a page of images."""

import argparse
import contextlib
import fcntl
import json
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vqrae_jax.evaluate import visualize
from vqrae_jax.files import atomic_write

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCS = ROOT / 'docs'
COLOURS = (
  '#888888', '#1f77b4', '#d62728', '#2ca02c', '#ff7f0e', '#bcbd22', '#9467bd',
  '#17becf', '#8c564b', '#000000',
)  # fmt: skip


class Worker:
  """A script of a source tree in a process of its own, on one CPU device: it
  answers each line with a row of JSON."""

  def __init__(self, root: str, *command: str):
    env = os.environ | {
      'PYTHONPATH': str(pathlib.Path(root).resolve()),
      'JAX_PLATFORMS': 'cpu',
    }
    # -P: without the script's folder, whose tokenize.py hides Python's.
    self._process = subprocess.Popen(
      [sys.executable, '-P', *command], env=env, cwd=root, text=True,
      stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip

  def read(self) -> dict[str, float]:
    """The next row."""
    line = self._process.stdout.readline()
    if not line:
      raise SystemExit('a worker has failed; its error is above')
    return json.loads(line)

  def ask(self, line: str = '') -> dict[str, float]:
    """The row that answers a line."""
    self._process.stdin.write(f'{line}\n')
    self._process.stdin.flush()
    return self.read()

  def close(self) -> None:
    """Ends the process."""
    self._process.stdin.close()
    self._process.wait()


def write(document: str, benchmark: str, made: str) -> None:
  """Puts `made` between a benchmark's marks in a file of docs."""
  begin, end = f'<!-- benchmarks.{benchmark} --report -->', '<!-- end -->'
  path = DOCS / document
  before, _, rest = path.read_text().partition(begin)
  _, _, after = rest.partition(end)
  path.write_text(f'{before}{begin}\n\n{made}\n\n{end}{after}')


def wanted(
  parser: argparse.ArgumentParser,
  only: str | None,
  before: Mapping[str, str | None],
) -> list[str]:
  """Names of the runs to train: those in `only`, which has commas between, by
  default all, and those that they begin with (`before`), first."""
  names = set(only.split(',') if only else before)
  if unknown := names - before.keys():
    parser.error(
      f'--only={",".join(sorted(unknown))}: there are {", ".join(before)}'
    )
  for name in reversed(before):
    if name in names and before[name]:
      names.add(before[name])
  return [name for name in before if name in names]


def train(*flags: str) -> subprocess.CompletedProcess[str]:
  """`python -m vqrae_jax.train` from the root; its `stderr` is shown too."""
  command, log = [sys.executable, '-m', 'vqrae_jax.train', *flags], []
  with subprocess.Popen(
    command, cwd=ROOT, stderr=subprocess.PIPE, text=True
  ) as process:
    for line in process.stderr:
      print(line, end='', file=sys.stderr, flush=True)
      log.append(line)
  return subprocess.CompletedProcess(
    command, process.returncode, stderr=''.join(log)
  )


def written(workdir: pathlib.Path) -> tuple[list[dict], dict]:
  """A run's (rows of metrics.jsonl, summary.json); empty where there is none,
  as where it has not finished."""
  rows, summary = workdir / 'metrics.jsonl', workdir / 'summary.json'
  lines = rows.read_text().splitlines() if rows.exists() else []
  found = json.loads(summary.read_text()) if summary.exists() else {}
  return [json.loads(line) for line in lines], found


@contextlib.contextmanager
def updated(path: pathlib.Path, empty: Any) -> Iterator[Any]:
  """A file's JSON, `empty` where there is none, for a block that changes it;
  written back after it. Processes wait for one another."""
  folder = os.open(path.parent, os.O_RDONLY)
  try:
    fcntl.flock(folder, fcntl.LOCK_EX)
    found = json.loads(path.read_text()) if path.exists() else empty
    yield found
    with atomic_write(path) as file:
      file.write(json.dumps(found, indent=1, sort_keys=True).encode() + b'\n')
  finally:
    os.close(folder)


def spread(values: Sequence[float], digits: int) -> str:
  """The mean of seeds and how far they go."""
  low, high = (f'{x:.{digits}f}' for x in (min(values), max(values)))
  return f'{statistics.mean(values):.{digits}f} [{low}, {high}]'


def hardware() -> str:
  """The accelerator, or the CPU and how many cores may be used."""
  device = jax.devices()[0]
  if device.platform != 'cpu':
    return device.device_kind
  text = pathlib.Path('/proc/cpuinfo').read_text()
  kind = next(s for s in text.splitlines() if s.startswith('model name'))
  cores = len(os.sched_getaffinity(0))
  return f'{kind.split(": ")[1]}, {cores} core{"s" * (cores > 1)}'


def curves(
  panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]] | None]],
  names: Sequence[str],
) -> str:
  """SVG: a panel each of {title: {name: [(step, value)]}}, two a row, a line a
  name, in the order of `names`; the last place has the names. What is empty is
  left out."""
  width, height, gap = 300, 170, 76
  colours, parts = dict(zip(names, COLOURS, strict=False)), []
  shown = {
    title: given
    for title, lines in panels.items()
    if (given := {name: line for name, line in lines.items() if line})
  }
  for i, (title, lines) in enumerate(shown.items()):
    row, column = divmod(i, 2)
    values = [y for line in lines.values() for _, y in line]
    steps = max(x for line in lines.values() for x, _ in line)
    left, top = gap + column * (width + gap), 30 + row * (height + gap)
    low, high = min(values), max(values)
    scale = height / max(high - low, 1e-9)
    parts.append(
      f'<rect x="{left}" y="{top}" width="{width}" height="{height}" '
      'fill="none" stroke="#ccc"/>'
      f'<text x="{left}" y="{top - 8}">{title}</text>'
      f'<text x="{left - 6}" y="{top + 10}" text-anchor="end">'
      f'{high:.3g}</text>'
      f'<text x="{left - 6}" y="{top + height}" text-anchor="end">'
      f'{low:.3g}</text>'
      f'<text x="{left + width}" y="{top + height + 15}" text-anchor="end">'
      f'{steps} steps</text>'
    )
    for name, line in lines.items():
      at = ' '.join(
        f'{left + x * width / steps:.1f},{top + (high - y) * scale:.1f}'
        for x, y in line
      )
      parts.append(
        f'<polyline points="{at}" fill="none" stroke="{colours[name]}" '
        'stroke-width="1.5"/>'
      )
  drawn = [n for n in names if any(n in lines for lines in shown.values())]
  row, column = divmod(len(shown), 2)
  left, top = gap + column * (width + gap), 30 + row * (height + gap)
  for i, name in enumerate(drawn):
    y = top + 10 + 18 * i
    parts.append(
      f'<line x1="{left}" y1="{y}" x2="{left + 24}" y2="{y}" '
      f'stroke="{colours[name]}" stroke-width="3"/>'
      f'<text x="{left + 32}" y="{y + 4}">{name}</text>'
    )
  rows = (len(shown) + 2) // 2
  size = (
    f'width="{2 * (width + gap) + 20}" height="{rows * (height + gap) + 20}"'
  )
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" '
    'font-size="12"><rect width="100%" height="100%" fill="white"/>'
    f'{"".join(parts)}</svg>\n'
  )


def sheet(
  columns: Mapping[str, Sequence[np.ndarray]], side: int
) -> Image.Image:
  """{name: uint8 [h w 3] each}: a column a name, pixels as squares so large
  that each image is about `side` high."""
  made = []
  for images in columns.values():
    large = [visualize.enlarged(x, len(x), side) for x in images]
    made.append(np.concatenate(large))
  page = np.concatenate(made, axis=1)
  image = Image.new('RGB', (page.shape[1], page.shape[0] + 22), 'white')
  image.paste(Image.fromarray(page), (0, 22))
  draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
  for i, name in enumerate(columns):
    draw.text((i * made[0].shape[1] + 4, 4), name, 'black', font)
  return image
