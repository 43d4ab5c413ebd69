"""Sample i is a function of seed and i, on any number of hosts."""

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from vqrae_jax.data import pipeline, sources
from vqrae_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
  rng = np.random.default_rng(0)
  for i in range(7):
    size = (40 + 3 * i, 50)
    pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    where = tmp_path / ('deep' if i % 2 else '.')
    where.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(where / f'photo{i}.png')
  (tmp_path / 'notes.txt').write_text('no image')
  return tmp_path


def batches(folder, **keys):
  keys = dict(batch_size=4, seed=3) | keys
  source = sources.open_source(str(folder))
  return pipeline.TrainBatches(source, pipeline.Augment((16, 16)), **keys)


def test_the_position_is_the_step(folder):
  whole = batches(folder).iterate(0)
  steps = [next(whole) for _ in range(9)]
  assert steps[2]['images'].dtype == np.uint8
  assert steps[2]['images'].shape == (4, 16, 16, 3)
  np.testing.assert_array_equal(steps[2]['index'], [8, 9, 10, 11])
  for start in (0, 1, 5):
    resumed = batches(folder).iterate(start)
    for step in range(start, 9):
      found = next(resumed)
      for key in found:
        np.testing.assert_array_equal(found[key], steps[step][key])
      np.testing.assert_array_equal(
        batches(folder).batch(step)['images'], steps[step]['images']
      )


@pytest.mark.parametrize('hosts', (2, 4))
def test_hosts_take_slices_of_one_global_batch(folder, hosts):
  whole = batches(folder).iterate(2)
  parts = [
    batches(folder, process_index=p, process_count=hosts).iterate(2)
    for p in range(hosts)
  ]
  for _ in range(4):
    want = next(whole)
    rows = [next(part) for part in parts]
    for key in want:
      np.testing.assert_array_equal(
        np.concatenate([r[key] for r in rows]), want[key]
      )


class Spy:
  """n photographs that note which were asked for."""

  def __init__(self, n):
    self.n, self.seen = n, []

  def __len__(self):
    return self.n

  def __getitem__(self, i):
    self.seen.append(i)
    return np.zeros((8, 8, 3), np.uint8)

  def name(self, i):
    return f'photo{i}'


@pytest.mark.parametrize('n', (7, 4096))
def test_each_epoch_sees_every_photograph_once_in_a_new_order(n):
  """Both for a small source and for one of grain's own shuffle."""
  spy = Spy(n)
  loader = pipeline.TrainBatches(
    spy, pipeline.Augment((8, 8)), batch_size=n, seed=0
  )
  epochs = set()
  for step in range(3):
    spy.seen.clear()
    loader.batch(step)
    assert sorted(spy.seen) == list(range(n))
    epochs.add(tuple(spy.seen))
  assert len(epochs) == 3


def test_seeds_differ(folder):
  a, b = batches(folder, seed=0).batch(0), batches(folder, seed=1).batch(0)
  assert (a['images'] != b['images']).any()


def test_a_batch_must_divide_over_hosts(folder):
  with pytest.raises(UserError, match='multiple of the 3 hosts'):
    batches(folder, process_count=3)


@pytest.mark.parametrize('resize', (None, 20, (20, 30)))
@pytest.mark.parametrize('size', ((16, 16), (8, 32), (64, 48)))
def test_augmented_images_have_the_size(resize, size):
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (37, 23, 3), dtype=np.uint8)
  for crop in ('random', 'center'):
    augment = pipeline.Augment(size, resize=resize, crop=crop)
    out = pipeline.augment_image(image, augment, rng)
    assert out.shape == (*size, 3) and out.dtype == np.uint8


def test_crops_are_parts_of_the_photograph_flipped_or_not():
  image = np.arange(20 * 30 * 3, dtype=np.uint32).reshape(20, 30, 3) % 251
  image = image.astype(np.uint8)
  rng = np.random.default_rng(0)
  corners = {
    image[i : i + 8, j : j + 8].tobytes() for i in range(13) for j in range(23)
  }
  flips = 0
  for _ in range(40):
    out = pipeline.augment_image(image, pipeline.Augment((8, 8)), rng)
    mirrored = np.ascontiguousarray(out[:, ::-1])
    assert out.tobytes() in corners or mirrored.tobytes() in corners
    flips += out.tobytes() not in corners
  assert 8 < flips < 32


@pytest.mark.parametrize('side', (20, 33, 60, 200))
def test_a_crop_is_a_window_of_the_resized_photograph(side):
  """One pass gives what resizing all and cropping would, but for borders."""
  image = tiny.images(1, 90, 130)[0]
  augment = pipeline.Augment((16, 16), resize=side, crop='center', flip=False)
  found = pipeline.augment_image(image, augment, np.random.default_rng(0))
  width = round(130 * side / 90)
  whole = Image.fromarray(image).resize((width, side), Image.BICUBIC)
  top, left = (side - 16) // 2, (width - 16) // 2
  want = np.asarray(whole)[top : top + 16, left : left + 16]
  inner = np.abs(found[2:-2, 2:-2].astype(int) - want[2:-2, 2:-2])
  assert inner.max() <= 6 and inner.mean() < 1, (inner.max(), inner.mean())


def test_tiles_cover_from_the_top_left():
  image = np.random.default_rng(0).integers(0, 256, (21, 34, 3), np.uint8)
  cut = pipeline.tiles(image, (8, 16))
  assert cut.shape == (4, 8, 16, 3)
  np.testing.assert_array_equal(cut[3], image[8:16, 16:32])


def test_real_photographs(shared_data):
  source = sources.open_source(str(shared_data / 'kodak'))
  loader = pipeline.TrainBatches(
    source, pipeline.Augment((64, 64), resize=96), batch_size=4, seed=0
  )
  assert len(source) == 24
  assert loader.batch(0)['images'].std() > 10
