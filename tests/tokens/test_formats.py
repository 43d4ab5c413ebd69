"""Each format by the rules of the trainer that reads it, and back.

The rules are written here from the trainers' public code: MaxText's parsing,
packing and shifting (src/maxtext/input_pipeline), Megatron-LM's indexed data
set (megatron/core/datasets/indexed_dataset.py), LlamaGen's dataset/imagenet.py,
RAR's data/webdataset_reader.py, IDEAL's extract_codes_c2i.py, webdataset's
grouping of members by the name up to the first dot.
"""

import collections
import importlib.util
import io
import json
import struct
import tarfile

import grain
import numpy as np
import pytest

from vqrae_jax.errors import UserError
from vqrae_jax.tokens import FORMATS, Layout, Shard, example, find_format

K = 40
# Each with views of its own: grids, codes of several stages, scales.
SHAPES = {
  'grid': dict(index_shape=(3, 4)),
  'residual': dict(index_shape=(2, 2, 3), crops=5, flip=True),
  'scales': dict(index_shape=(7,), flip=True),
}
EXTRAS = dict(parquet='pyarrow', hdf5='h5py')


def layout_of(name, **keys):
  return Layout(K, image_size=(16, 16), **SHAPES[name], **keys)


def shard_of(layout, n=5, number=3, **keys):
  """(images of which the second and the fourth of seven were skipped, their
  indices, with index 0 and K - 1 among them)."""
  positions = [0, 2, 4, 5, 6][:n]
  shard = Shard(
    number,
    [f'class{i % 2}/image {i}.jpg' for i in positions],
    [i % 2 for i in positions],
    positions,
    [[[0.0, 1.5, 16.0, 17.5]] * layout.crops] * n,
    first=100,
    **keys,
  )
  shape = (n, layout.views, *layout.index_shape)
  tokens = np.random.default_rng(0).integers(0, K, shape, dtype=np.int32)
  if n:
    tokens[0, 0].flat[:2] = 0, K - 1
  return shard, tokens


def written(folder, name, layout, shard, tokens):
  if name in EXTRAS:
    pytest.importorskip(EXTRAS[name])
  FORMATS[name].write(folder, layout, shard, tokens)
  return folder


def sequences(layout, tokens, bos=None, eod=None):
  """What a language model must see, by its definition."""
  ends = [[x] if x is not None else [] for x in (bos, eod)]
  return [
    [*ends[0], *(code + layout.offset for code in view.flat), *ends[1]]
    for image in tokens
    for view in image
  ]


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('name', FORMATS)
def test_indices_come_back(name, shape, tmp_path):
  """With every end that a sequence may have; of no image too."""
  ends = {}
  if FORMATS[name].sequences:
    ends = dict(offset=2, bos=1, eod=K + 2)
  layout = layout_of(shape, **ends)
  for n in (5, 0):
    folder = tmp_path / str(n)
    folder.mkdir()
    shard, tokens = shard_of(layout, n)
    written(folder, name, layout, shard, tokens)
    found = FORMATS[name].read(folder, layout, shard)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, tokens)
    files = [p for p in folder.rglob('*') if p.is_file()]
    names = sorted(str(p.relative_to(folder)) for p in files)
    assert names == FORMATS[name].paths(layout, shard)


@pytest.mark.parametrize('name', FORMATS)
def test_equal_shards_are_equal_bytes(name, tmp_path):
  layout = layout_of('grid')
  shard, tokens = shard_of(layout)
  for copy in 'ab':
    (tmp_path / copy).mkdir()
    written(tmp_path / copy, name, layout, shard, tokens)
  for path in FORMATS[name].paths(layout, shard):
    a, b = ((tmp_path / copy / path).read_bytes() for copy in 'ab')
    assert a == b


# ----------------------------------------------------------------------------
# MaxText: grain over ArrayRecord, tokenize_train_data=false.


def int64_list(record, key):
  """The values of a serialized Example's int64 feature, by the wire format."""

  def varint(data, at):
    value = shift = 0
    while True:
      byte = data[at]
      value |= (byte & 0x7F) << shift
      at, shift = at + 1, shift + 7
      if byte < 0x80:
        return value, at

  def fields(data):
    at, found = 0, collections.defaultdict(list)
    while at < len(data):
      tag, at = varint(data, at)
      assert tag & 7 == 2, 'a field that has no length'
      size, at = varint(data, at)
      found[tag >> 3].append(data[at : at + size])
      at += size
    return found

  ((features,),) = fields(record).values()
  entries = [fields(entry) for entry in fields(features)[1]]
  (value,) = [entry[2][0] for entry in entries if entry[1] == [key.encode()]]
  assert len(entries) == 1, 'one feature'
  ((packed,),) = fields(fields(value)[3][0]).values()  # 3: int64_list
  at, values = 0, []
  while at < len(packed):
    value, at = varint(packed, at)
    values.append(value)
  return values


def maxtext_batch(path, length, pad, packing):
  """(targets i32[b l], their segments i32[b l]; 0 is out of the loss)."""
  source = grain.sources.ArrayRecordDataSource([str(path)])

  def parse(record):
    ids = np.array(int64_list(record, 'tokens'), np.int32)
    return dict(inputs=ids, targets=ids)

  def pad_to(element):
    segments = (element['targets'] != pad).astype(np.int32)
    widths = dict(pad_width=(0, length - len(segments)))
    return dict(
      targets=np.pad(element['targets'], **widths, constant_values=pad),
      targets_segment_ids=np.pad(segments, **widths, constant_values=pad),
    )

  data = grain.MapDataset.source(source).map(parse).to_iter_dataset()
  if packing:
    data = grain.experimental.FirstFitPackIterDataset(
      data,
      length_struct=dict(inputs=length, targets=length),
      num_packing_bins=2,
    )
  else:
    data = data.map(pad_to)
  rows = list(data)
  targets = np.stack([row['targets'] for row in rows])
  segments = np.stack([row['targets_segment_ids'] for row in rows])
  # Shifted left by one; then what equals the pad id is out of the loss.
  ends = ((0, 0), (0, 1))
  targets = np.pad(targets[:, 1:], ends, constant_values=pad)
  segments = np.pad(segments[:, 1:], ends)
  return targets, np.where(targets != pad, segments, 0)


@pytest.mark.parametrize('packing', (False, True))
@pytest.mark.parametrize(
  'ends', (dict(offset=1), dict(offset=2, bos=1, eod=42), dict(offset=0))
)
def test_maxtext_keeps_every_code_in_the_loss(tmp_path, packing, ends):
  """With the pad id that the card names; all but first ids are targets."""
  layout = layout_of('grid', **ends)
  shard, tokens = shard_of(layout)
  written(tmp_path, 'array_record', layout, shard, tokens)
  rows = sequences(layout, tokens, layout.bos, layout.eod)
  path = tmp_path / '00003.array_record'
  targets, kept = maxtext_batch(path, 2 * len(rows[0]) + 3, layout.pad, packing)
  found = collections.Counter(targets[kept > 0].tolist())
  # A packed sequence's first id is the target of the end of the one before.
  want = collections.Counter(
    code for row in rows for code in (row if packing else row[1:])
  )
  missing = want - found
  assert missing.total() <= (len(rows) if packing else 0)
  assert not missing - collections.Counter(row[0] for row in rows)
  assert not found - want
  zeros = (tokens == 0).sum() - (0 if layout.bos is not None else 1)
  assert found[layout.offset] >= zeros > 0
  # The id of index 0 as pad id would take it out.
  _, lost = maxtext_batch(path, 2 * len(rows[0]), layout.offset, packing)
  assert (lost > 0).sum() < (kept > 0).sum()


def test_the_pad_id_is_no_other():
  for ends, pad, vocabulary in (
    (dict(offset=1), 0, K + 1),
    (dict(), K, K),
    (dict(offset=1, bos=0), K + 1, K + 1),
    (dict(offset=3, bos=1, eod=K + 9), 0, K + 10),
    (dict(bos=K, eod=K), K + 1, K + 1),
  ):
    layout = layout_of('grid', **ends)
    assert (layout.pad, layout.vocabulary) == (pad, vocabulary)
  for ends in (dict(bos=0), dict(offset=5, eod=5), dict(offset=5, eod=K + 4)):
    with pytest.raises(UserError, match='bos=0|eod=5|eod=44'):
      layout_of('grid', **ends)


# ----------------------------------------------------------------------------
# Megatron-LM and MaxText's reader of its format.


def megatron(prefix):
  """The sequences, by the index; every length and number of it checked."""
  index, data = (
    prefix.with_suffix(end).read_bytes() for end in ('.idx', '.bin')
  )
  magic, version, code, count, documents = struct.unpack_from('<9sQBQQ', index)
  assert (magic, version) == (b'MMIDIDX\0\0', 1)
  dtype = np.dtype({1: 'u1', 4: '<i4', 5: '<i8', 8: '<u2'}[code])
  at = 34
  lengths = np.frombuffer(index, '<i4', count, at)
  starts = np.frombuffer(index, '<i8', count, at := at + 4 * count)
  bounds = np.frombuffer(index, '<i8', documents, at := at + 8 * count)
  assert at + 8 * documents == len(index)
  assert bounds[0] == 0 and bounds[-1] == count == len(bounds) - 1
  assert starts[-1] + lengths[-1] * dtype.itemsize == len(data)
  return dtype, [
    np.frombuffer(data, dtype, n, start).tolist()
    for start, n in zip(starts, lengths, strict=True)
  ]


@pytest.mark.parametrize('size, dtype', ((K, 'u2'), (2**16, 'i4')))
def test_megatron_reads_sequences_that_end_with_eod(tmp_path, size, dtype):
  layout = Layout(
    size, (3, 4), (16, 16), flip=True, offset=1, bos=0, eod=size + 1
  )
  shard, tokens = shard_of(layout)
  written(tmp_path, 'megatron', layout, shard, tokens)
  found, rows = megatron(tmp_path / '00003')
  assert found == np.dtype(dtype)
  assert rows == sequences(layout, tokens, 0, size + 1)


# ----------------------------------------------------------------------------
# Image models.


def test_rar_reads_a_line_a_view(tmp_path):
  layout = layout_of('residual')
  shard, tokens = shard_of(layout)
  written(tmp_path, 'jsonl', layout, shard, tokens)
  lines = (tmp_path / '00003.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert [row['tokens'] for row in rows] == sequences(layout, tokens)
  assert [row['class_id'] for row in rows] == list(np.repeat(shard.labels, 10))


def test_llamagen_reads_a_file_an_image(tmp_path):
  """Numbered through all shards, [1, views, codes]."""
  layout = layout_of('scales')
  shard, tokens = shard_of(layout)
  written(tmp_path, 'llamagen', layout, shard, tokens)
  for i, label, image in zip(
    shard.positions, shard.labels, tokens, strict=True
  ):
    codes = np.load(tmp_path / f'imagenet16_codes/{100 + i}.npy')
    assert codes.dtype == np.int64 and codes.shape == (1, 2, 7)
    for view in range(2):
      np.testing.assert_array_equal(codes[:, view], image[None, view])
    found = np.load(tmp_path / f'imagenet16_labels/{100 + i}.npy')
    np.testing.assert_array_equal(found, np.array([label], np.int64))


def test_ideal_reads_three_data_sets(tmp_path):
  h5py = pytest.importorskip('h5py')
  layout = layout_of('scales')
  shard, tokens = shard_of(layout)
  written(tmp_path, 'hdf5', layout, shard, tokens)
  with h5py.File(tmp_path / '00003.h5') as file:
    code, label, path = (file[name][...] for name in ('code', 'label', 'path'))
  assert code.dtype == np.int32 and label.dtype == np.int64
  np.testing.assert_array_equal(code, tokens.reshape(10, 7))
  np.testing.assert_array_equal(label, np.repeat(shard.labels, 2))
  assert [p.decode() for p in path] == list(np.repeat(shard.keys, 2))


def test_parquet_has_a_row_a_view(tmp_path):
  parquet = pytest.importorskip('pyarrow.parquet')
  layout = layout_of('grid', offset=1, bos=0, eod=K + 1)
  shard, tokens = shard_of(layout)
  shard = Shard(**(vars(shard) | dict(labels=[1, None, 0, 1, 0])))
  written(tmp_path, 'parquet', layout, shard, tokens)
  rows = parquet.read_table(tmp_path / '00003.parquet').to_pylist()
  assert [row['input_ids'] for row in rows] == sequences(layout, tokens, 0, 41)
  assert [row['tokens'] for row in rows] == tokens.reshape(5, -1).tolist()
  assert [row['key'] for row in rows] == shard.keys
  assert [row['label'] for row in rows] == [1, None, 0, 1, 0]
  assert {(row['h'], row['w']) for row in rows} == {(3, 4)}


def test_webdataset_groups_by_the_images_keys(tmp_path):
  """-1 is kept, in a type that has it."""
  layout = layout_of('residual')
  shard, tokens = shard_of(layout)
  shard = Shard(**(vars(shard) | dict(labels=[1, None, 0, 1, 0])))
  tokens[3, 0, 0, 0, 2] = -1
  written(tmp_path, 'webdataset', layout, shard, tokens)
  samples = collections.defaultdict(dict)
  with tarfile.open(tmp_path / '00003.tar') as file:
    for member in file:
      folder, _, base = member.name.rpartition('/')
      stem, _, end = base.partition('.')
      samples[f'{folder}/{stem}'][end] = file.extractfile(member).read()
  assert [*samples] == [key.removesuffix('.jpg') for key in shard.keys]
  for sample, label, image in zip(
    samples.values(), shard.labels, tokens, strict=True
  ):
    np.testing.assert_array_equal(np.load(io.BytesIO(sample['npy'])), image)
    assert sample.get('cls') == (None if label is None else b'%d' % label)


def test_webdatasets_keys_end_at_the_first_dot(tmp_path):
  """Two images of one key are refused, not merged."""
  layout = layout_of('grid')
  shard, tokens = shard_of(layout, n=2)
  shard = Shard(**(vars(shard) | dict(keys=['x.1/b.v1.jpg', 'x.1/c.jpg'])))
  written(tmp_path, 'webdataset', layout, shard, tokens)
  with tarfile.open(tmp_path / '00003.tar') as file:
    assert 'x.1/b.npy' in file.getnames()
  shard = Shard(**(vars(shard) | dict(keys=['x/b.v1.jpg', 'x/b.v2.jpg'])))
  with pytest.raises(UserError, match='x/b.npy'):
    written(tmp_path, 'webdataset', layout, shard, tokens)


def test_an_example_is_read_by_its_own_codec():
  features = dict(a=[0, 1, 2**40, -5], b=[7])
  assert example.decode(example.encode(features)) == features
  with pytest.raises(ValueError, match='Example'):
    example.decode(b'\xff\xff')


def test_a_missing_extra_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  for name in FORMATS:
    if name in EXTRAS:
      with pytest.raises(UserError, match=rf'{name}.*vqrae_jax\[{name}\]'):
        find_format(name)
    else:
      assert find_format(name) is FORMATS[name]
