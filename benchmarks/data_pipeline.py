"""python benchmarks/data_pipeline.py --data=DATA [--size=224] [--rounds=8]

Images a second of the training pipeline alone, no device: reading, decoding,
cropping, batching. Its peer is a bare loop of Pillow over the same images, in
as many threads, on bytes already in memory: decode, resize to the size of the
crop. Both run in turn, in short runs from the first batch on, where the
iterator has read nothing yet, and in long ones. On a shared machine believe
the ratios and the CPU time.
"""

import argparse
import collections
import concurrent.futures
import functools
import io
import statistics
import time

from PIL import Image

from vqrae_jax.data import pipeline, sources


def decode_and_resize(size, data):
  with Image.open(io.BytesIO(data)) as image:
    image = image.convert('RGB')
  left, top = ((n - min(image.size)) // 2 for n in image.size)
  box = (left, top, left + min(image.size), top + min(image.size))
  return image.resize(size, Image.BICUBIC, box, reducing_gap=3).tobytes()


def bare(encoded, size, threads):
  """The peer: every thread has its own share and waits for no other."""
  work = functools.partial(decode_and_resize, size)
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    parts = [encoded[i::threads] for i in range(threads)]
    list(pool.map(lambda part: collections.deque(map(work, part), 0), parts))


def read(batches, steps):
  """A run of the pipeline from its start: no batch is there before."""
  iterator = batches.iterate(steps.start)
  for _ in steps:
    next(iterator)


def cost(work, *args):
  """(seconds, CPU seconds)."""
  began = time.perf_counter(), time.process_time()
  work(*args)
  ended = time.perf_counter(), time.process_time()
  return tuple(b - a for a, b in zip(began, ended, strict=True))


def measure(
  data,
  *,
  size=224,
  resize=None,
  batch_size=64,
  batches=(4, 40),
  rounds=8,
  decoder='pil',
):
  """{batches of a run: its figures}, rounds interleaved.

  Each has `images_s` and `cpu_us` (an image's) of the pipeline, `bare_images_s`
  and `bare_cpu_us`, and of the pairs' rates, pipeline / bare, the median
  (`ratio`), its `quartiles`, that of the two fastest, and of the CPU times.
  """
  # No flips: decoding and cropping is what both do.
  augment = pipeline.Augment((size, size), resize=resize or size, flip=False)
  source = sources.open_source(data).decoded_by(decoder, augment.ample)
  loader = pipeline.TrainBatches(source, augment, batch_size=batch_size, seed=0)
  threads = pipeline.reading_threads()
  read(loader, range(1))  # imports, and the disk's cache of the first images
  times, start = {count: ([], []) for count in batches}, 0
  for r in range(rounds):
    for count, (ours, theirs) in times.items():
      steps = range(start, start + count)
      start += count  # another stretch of the order each time
      rows = [p for s in steps for p in loader._empty(s)[0]['photo']]
      encoded = [source._bytes(int(source._rows[p])) for p in rows]
      calls = [
        (ours, read, loader, steps),
        (theirs, bare, encoded, augment.size, threads),
      ]
      for kept, *call in calls[:: 1 if r % 2 else -1]:
        kept.append(cost(*call))
  return {
    count: figures(count * batch_size, *pair) for count, pair in times.items()
  }


def figures(images, ours, theirs):
  ratios = sorted(b / a for (a, _), (b, _) in zip(ours, theirs, strict=True))
  (wall, cpu), (bare_wall, bare_cpu) = (
    [[statistics.median(x), min(x)] for x in zip(*t, strict=True)]
    for t in (ours, theirs)
  )
  quarter = len(ratios) // 4
  return {
    'images_s': images / wall[0],
    'cpu_us': cpu[0] / images * 1e6,
    'bare_images_s': images / bare_wall[0],
    'bare_cpu_us': bare_cpu[0] / images * 1e6,
    'ratio': statistics.median(ratios),
    'quartiles': [ratios[quarter], ratios[-1 - quarter]],
    'fastest': bare_wall[1] / wall[1],
    'cpu': bare_cpu[0] / cpu[0],
  }


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--data', required=True, help='a folder, a glob, …')
  parser.add_argument('--size', type=int, default=224)
  parser.add_argument('--resize', type=int, help='shorter side, or --size')
  parser.add_argument('--batch_size', type=int, default=64)
  parser.add_argument('--batches', type=int, nargs='+', default=[4, 40])
  parser.add_argument('--rounds', type=int, default=8)
  parser.add_argument('--decoder', default='pil')
  options = vars(parser.parse_args())
  print(f'{pipeline.reading_threads()} threads')
  for count, found in measure(options.pop('data'), **options).items():
    print(
      f'{count} batches from the first on: {found["images_s"]:.0f} images/s, '
      f'{found["cpu_us"]:.0f} us CPU an image; bare Pillow '
      f'{found["bare_images_s"]:.0f} images/s, {found["bare_cpu_us"]:.0f} us\n'
      f'  pipeline / bare: {found["ratio"]:.3f} by the clock '
      f'[{found["quartiles"][0]:.3f} {found["quartiles"][1]:.3f}], fastest '
      f'{found["fastest"]:.3f}, CPU {found["cpu"]:.3f}', flush=True,
    )  # fmt: skip


if __name__ == '__main__':
  main()
