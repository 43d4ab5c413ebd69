"""Sample i is a function of seed and i, on any number of hosts."""

import itertools
import threading
import time
import tracemalloc

import jax
import numpy as np
import pytest
from PIL import Image

from tests import tiny
from tests.data import makers
from vqrae_jax.data import pipeline
from vqrae_jax.data.decode import ImageDecodeError
from vqrae_jax.errors import UserError


class Flawed:
  """n images of several sizes, noise but for a red of their own; those in
  `bad` are unreadable."""

  def __init__(self, n=50, bad=()):
    self.n, self.bad, self.seen = n, bad, []

  def __len__(self):
    return self.n

  def __getitem__(self, i):
    return np.asarray(self.picture(i))

  def picture(self, i):
    self.seen.append(i)
    if i in self.bad:
      raise ImageDecodeError(f'/data/{self.name(i)}', 'torn')
    image = makers.photo(i, 8 + 3 * (i % 7), 12)
    image[..., 0] = i % 256
    return Image.fromarray(image)

  def name(self, i):
    return f'photo{i}'


THIRDS = range(0, 50, 3)


def batches(source, sizes=((8, 8),), **keys):
  keys = dict(batch_size=8, seed=5) | keys
  augments = [pipeline.Augment(size) for size in sizes]
  return pipeline.TrainBatches(source, augments, **keys)


@pytest.mark.parametrize('sizes', (((8, 8),), ((4, 6), (8, 8), (8, 12))))
def test_hosts_take_slices_of_one_global_batch(sizes):
  """Wherever they start: the position is the step. Of several sizes each step
  has one."""
  whole = batches(Flawed(bad=THIRDS), sizes=sizes)
  for hosts, start in ((1, 0), (1, 5), (2, 2), (4, 5)):
    parts = [
      batches(
        Flawed(bad=THIRDS), sizes=sizes, process_index=p, process_count=hosts
      )
      for p in range(hosts)
    ]
    parts = [part.iterate(start) for part in parts]
    for step in range(start, 12):
      rows = [next(part) for part in parts]
      found = {k: np.concatenate([r[k] for r in rows]) for k in rows[0]}
      jax.tree.map(np.testing.assert_array_equal, found, whole.batch(step))
      assert found['index'].tolist() == [*range(8 * step, 8 * step + 8)]
  shapes = {whole.batch(step)['images'].shape[1:3] for step in range(12)}
  assert shapes == set(sizes)


def test_unreadable_images_are_replaced_and_change_no_other():
  good, flawed = batches(Flawed()), batches(Flawed(bad=THIRDS))
  for step in range(12):
    want, found = good.batch(step), flawed.batch(step)
    assert found['images'].shape == (8, 8, 8, 3)
    assert found['images'].dtype == np.uint8
    np.testing.assert_array_equal(found['images'][:, 0, 0, 0], found['photo'])
    assert (found['photo'] % 3 != 0).all()
    lost = want['photo'] % 3 == 0
    np.testing.assert_array_equal(found['skipped'] > 0, lost)
    for key in want:
      np.testing.assert_array_equal(found[key][~lost], want[key][~lost], key)
  assert good.unreadable == {}
  assert flawed.unreadable == {f'photo{i}': 'torn' for i in THIRDS}


def test_too_many_unreadable_draws_in_a_row_stop_the_run():
  stream = batches(Flawed(bad=range(50))).iterate(3)
  with pytest.raises(UserError, match=r'16 .* row are .*photo\d+: torn') as e:
    next(stream)
  assert '\n' not in str(e.value) and not isinstance(e.value, ImageDecodeError)


@pytest.mark.parametrize(
  'n, photo, skipped',
  [
    (50, [21, 17, 35, 11], [1, 0, 1, 1]),
    (5000, [2685, 3631, 3555, 1131], [1, 1, 1, 1]),
  ],
)
def test_the_order_is_pinned(n, photo, skipped):
  """A run goes on where it stopped also after an upgrade of grain or numpy.

  Renew these when the order is changed on purpose: no older run can then be
  continued. The contract pins crops.
  """
  batch = batches(Flawed(n, bad=range(0, n, 2)), batch_size=4).batch(2_000_000)
  assert batch['photo'].tolist() == photo
  assert batch['skipped'].tolist() == skipped


class Slow(Flawed):
  """Flawed, whose images take their time, the first rows of a batch most."""

  def picture(self, i):
    time.sleep(0.02 * (i % 3 == 0))
    return super().picture(i)


def test_batches_come_in_order_however_long_an_image_takes(monkeypatch):
  monkeypatch.setattr(pipeline, 'reading_threads', lambda: 4)
  stream, want = batches(Slow()).iterate(3), batches(Flawed())
  for step in range(3, 8):
    jax.tree.map(np.testing.assert_array_equal, next(stream), want.batch(step))


def test_no_batch_waits_for_one_thread(monkeypatch):
  """All threads read the first batch: each waits there for all others."""
  monkeypatch.setattr(pipeline, 'reading_threads', lambda: 4)
  together = threading.Barrier(4)

  class Meeting(Flawed):
    def picture(self, i):
      together.wait(timeout=20)
      return super().picture(i)

  assert next(batches(Meeting(), batch_size=4).iterate())['index'].size == 4


def test_few_batches_are_read_ahead(monkeypatch):
  """However many threads there are, and none once nobody asks for more."""
  monkeypatch.setattr(pipeline, 'reading_threads', lambda: 16)
  source = Flawed()
  stream = batches(source).iterate()
  for _ in range(3):
    next(stream)
  time.sleep(0.2)
  assert len(source.seen) == 8 * (3 + 2)
  stream.close()
  threads = threading.active_count()
  stream = batches(slow := Slow(), batch_size=48).iterate()
  next(stream)
  stream.close()
  assert threading.active_count() == threads
  read = len(slow.seen)
  time.sleep(0.2)
  assert len(slow.seen) == read


def test_a_far_step_of_a_huge_source_costs_no_walk_to_it():
  source = Flawed(10_000_000)
  loader, far = batches(source), 5 * 10_000_000 // 8
  want = loader.batch(far)['photo']
  assert len(source.seen) == 8
  np.testing.assert_array_equal(next(loader.iterate(far))['photo'], want)
  assert len(source.seen) < 500, 'the iterator reads what lies before its start'


@pytest.mark.parametrize('n', (7, 4096))
def test_each_epoch_sees_every_image_once_in_a_new_order(n):
  """Both for a small source and for one of grain's own shuffle."""
  orders = set()
  for seed, step in ((0, 0), (0, 1), (0, 2), (1, 0)):
    order = batches(Flawed(n), batch_size=n, seed=seed).batch(step)['photo']
    assert sorted(order) == list(range(n))
    orders.add(tuple(order))
  assert len(orders) == 4


@pytest.mark.parametrize('shape', ((1, 20_000), (20_000, 1), (1, 1)))
@pytest.mark.parametrize('resize', (None, 256, (256, 400)))
def test_slivers_take_no_memory(shape, resize):
  """Only the crop's window is resized: the whole would have 4e9 pixels."""
  image = np.full((*shape, 3), 9, np.uint8)
  augment = pipeline.Augment((224, 224), resize=resize)
  tracemalloc.start()
  out = pipeline.augment_image(image, augment, np.random.default_rng(0))
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert out.shape == (224, 224, 3) and (out == 9).all()
  assert peak < 10e6


@pytest.mark.parametrize('size', ((16, 16), (8, 32), (64, 48)))
def test_augmented_images_have_the_size(size):
  rng = np.random.default_rng(0)
  for crop, resize in itertools.product(pipeline.CROPS, (None, 20, (20, 30))):
    augment = pipeline.Augment(size, resize=resize, crop=crop)
    out = pipeline.augment_image(makers.photo(0, 37, 23), augment, rng)
    assert out.shape == (*size, 3) and out.dtype == np.uint8


def test_crops_are_parts_of_the_image_flipped_or_not():
  image, rng = makers.photo(0, 20, 30), np.random.default_rng(0)
  windows = {
    image[i : i + 8, j : j + 8].tobytes() for i in range(13) for j in range(23)
  }
  flips = 0
  for _ in range(40):
    out = pipeline.augment_image(image, pipeline.Augment((8, 8)), rng)
    if out.tobytes() not in windows:
      assert out[:, ::-1].tobytes() in windows
      flips += 1
  assert 8 < flips < 32


def test_squashed_images_are_whole():
  image = Image.fromarray(makers.photo(0, 30, 50))
  augment = pipeline.Augment((16, 24), crop='squash', flip=False)
  found = pipeline.augment_image(image, augment, np.random.default_rng(0))
  want = image.resize((24, 16), Image.BICUBIC, reducing_gap=3)
  np.testing.assert_array_equal(found, np.asarray(want))


@pytest.mark.parametrize('resize', (None, 20, 90, (20, 90)))
def test_an_ample_image_covers_what_is_resized_to(resize):
  size = (16, 64)
  ample = pipeline.Augment(size, resize=resize).ample
  assert ample >= 2 * max(64, np.max(resize or 0))
  if resize is None:  # the image's own size must not change
    assert ample > 10_000
  squashed = pipeline.Augment(size, resize=resize, crop='squash')
  assert squashed.ample == 128  # whatever `resize` is


@pytest.mark.parametrize('side', (20, 33, 60, 200))
def test_a_crop_is_a_window_of_the_resized_image(side):
  """One pass gives what resizing all and cropping would, but for borders."""
  image = tiny.images(1, 90, 130)[0]
  augment = pipeline.Augment((16, 16), resize=side, crop='center', flip=False)
  found = pipeline.augment_image(image, augment, np.random.default_rng(0))
  width = round(130 * side / 90)
  whole = Image.fromarray(image).resize((width, side), Image.BICUBIC)
  top, left = (side - 16) // 2, (width - 16) // 2
  want = np.asarray(whole)[top : top + 16, left : left + 16]
  off = np.abs(found.astype(int) - want)[2:-2, 2:-2]
  assert off.max() <= 6 and off.mean() < 1


def test_tiles_cover_from_the_top_left():
  image = makers.photo(0, 21, 34)
  cut = pipeline.tiles(image, (8, 16))
  assert cut.shape == (4, 8, 16, 3)
  np.testing.assert_array_equal(cut[3], image[8:16, 16:32])


def pieces(image):
  """As many rows of one pixel as the image's number, modulo 4."""
  return np.repeat(image[:1, :1], image[0, 0, 0] % 4, 0)[:, None]


@pytest.mark.parametrize('batch_size', (1, 3, 100))
def test_evaluation_takes_every_image_once_in_order(batch_size):
  source, met = Flawed(20, bad=(3, 6)), []
  found = pipeline.eval_batches(
    source, pieces, batch_size, range(1, 20, 2), lambda *lost: met.append(lost)
  )
  *full, (last, owners) = found
  assert [(i, e.reason) for i, e in met] == [(3, 'torn')]
  assert all(len(rows) == len(of) == batch_size for rows, of in full)
  assert len(last) == batch_size and not last[len(owners) :].any()
  rows = np.concatenate([*(rows for rows, _ in full), last[: len(owners)]])
  owners = [i for _, of in full for i in of] + owners
  want = [i for i in range(1, 20, 2) if i != 3 for _ in range(i % 4)]
  assert rows[:, 0, 0, 0].tolist() == owners == want


def test_an_unreadable_image_stops_an_evaluation():
  with pytest.raises(ImageDecodeError, match='photo6'):
    list(pipeline.eval_batches(Flawed(20, bad=(6,)), pieces, 4))
  assert list(pipeline.eval_batches(Flawed(0), pieces, 4)) == []
