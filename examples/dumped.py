"""What `examples/ar` and `examples/maskgit` read of a dump of tokens."""

import math

import grain
import numpy as np


def split(dump, batch):
  """(training rows, held-out rows), of 1 image in 20, at most 1000: datasets
  of {"tokens": i32[b n], "label": i32[b]}, the first without end."""
  images, views = len(dump) // dump.layout.views, dump.layout.views
  order = np.random.default_rng(0).permutation(images)
  held = np.isin(np.arange(images), order[: min(-(-images // 20), 1000)])

  def read(row):
    found = dump[int(row)]
    return dict(tokens=found['tokens'].ravel(), label=np.int32(found['label']))

  rows = [np.flatnonzero(np.repeat(x, views)) for x in (~held, held)]
  train, test = (grain.MapDataset.source(x) for x in rows)
  train_batches = train.shuffle(seed=0).repeat().map(read).batch(batch)
  return train.map(read), train_batches, test.map(read).batch(batch)


def statistics(rows, n, codes):
  """(how many classes there are, {model: nats a token}) of training rows: the
  uniform model, and the entropy of the histogram of all tokens (order 0) and
  of those at each position."""
  counts, classes = np.zeros((n, codes)), 0
  for row in rows:
    counts[np.arange(n), row['tokens']] += 1
    classes = max(classes, int(row['label']) + 1)

  def entropy(counts):
    p = counts / counts.sum(-1, keepdims=True)
    return float(-(p * np.log(np.where(p > 0, p, 1))).sum(-1).mean())

  return classes, dict(
    uniform=math.log(codes),
    order0=entropy(counts.sum(0)),
    order0_position=entropy(counts),
  )
