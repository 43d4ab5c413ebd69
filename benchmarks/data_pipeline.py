"""python benchmarks/data_pipeline.py --data=DATA [--size=224] [--batches=40]

Images a second of the training pipeline alone, no device: reading, decoding,
cropping, batching. Beside it, from the same run, the same images and as
many threads, two ceilings of Pillow alone on bytes already in memory: a bare
loop that decodes, and one that also resizes to the size of the crop. On a
shared machine believe the CPU time.
"""

import argparse
import collections
import concurrent.futures
import functools
import io
import time

from PIL import Image

from vqrae_jax.data import pipeline, sources


def decode(data):
  with Image.open(io.BytesIO(data)) as image:
    return image.convert('RGB')


def decode_and_resize(size, data):
  image = decode(data)
  left, top = ((n - min(image.size)) // 2 for n in image.size)
  box = (left, top, left + min(image.size), top + min(image.size))
  return image.resize(size, Image.BICUBIC, box, reducing_gap=3).tobytes()


def cost(count, work, *args):
  """(seconds, CPU seconds) an image."""
  began = time.perf_counter(), time.process_time()
  work(*args)
  ended = time.perf_counter(), time.process_time()
  return tuple((b - a) / count for a, b in zip(began, ended, strict=True))


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--data', required=True, help='a folder, a glob, …')
  parser.add_argument('--size', type=int, default=224)
  parser.add_argument('--resize', type=int, help='shorter side, or --size')
  parser.add_argument('--batch_size', type=int, default=64)
  parser.add_argument('--batches', type=int, default=40)
  parser.add_argument('--rounds', type=int, default=3)
  flags = parser.parse_args()

  opened = time.perf_counter()
  source = sources.open_source(flags.data)
  opened = time.perf_counter() - opened
  size = (flags.size, flags.size)
  augment = pipeline.Augment(size, resize=flags.resize or flags.size)
  batches = pipeline.TrainBatches(
    source, augment, batch_size=flags.batch_size, seed=0
  )
  threads = pipeline.reading_threads()
  print(f'{len(source)} images, opened in {opened:.2f} s; {threads} threads')

  def read(steps):
    iterator = batches.iterate(steps.start)
    for _ in steps:
      next(iterator)

  # Another stretch of the order each round; the best one is printed, for the
  # machine may be shared. The first, unmeasured, warms the disk's cache.
  read(range(2))
  best = {}
  for r in range(flags.rounds):
    steps = range(r * flags.batches, (r + 1) * flags.batches)
    photos = [int(p) for s in steps for p in batches.batch(s)['photo']]
    encoded = []
    for photo in photos:
      with source._open(int(source._rows[photo])) as file:
        encoded.append(file.read())
    resize = functools.partial(decode_and_resize, augment.size)

    def bare(work, encoded=encoded):
      parts = [encoded[i::threads] for i in range(threads)]
      with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        drain = lambda part: collections.deque(map(work, part), 0)  # noqa: E731
        list(pool.map(drain, parts))

    found = {
      'pipeline': cost(len(encoded), read, steps),
      'bare decode': cost(len(encoded), bare, decode),
      'bare decode and resize': cost(len(encoded), bare, resize),
    }
    for name, now in found.items():
      best[name] = tuple(map(min, now, best.get(name, now)))
  for name, (wall, cpu) in best.items():
    print(f'{name:<23}{1 / wall:7.0f} images/s{cpu * 1e6:7.0f} us CPU an image')
  for name in ('bare decode', 'bare decode and resize'):
    pairs = zip(best[name], best['pipeline'], strict=True)
    wall, cpu = (b / p for b, p in pairs)
    print(f'pipeline / {name}: {wall:.2f} by the clock, {cpu:.2f} by CPU time')


if __name__ == '__main__':
  main()
