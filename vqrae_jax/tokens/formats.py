"""Files of tokens as trainers read them: a row of `FORMATS` each.

A format writes the images of one shard and reads their indices back. Language
models read sequences of ids, [bos] index + offset … [eod], with several codes
per token or several scales flattened in C order. Image models have their own
code embeddings and read the indices unchanged.

What only some trainers read (keys, crop boxes) is not here: `dump.py` keeps it
for every format.
"""

import collections
import dataclasses
import errno
import importlib.util
import io
import itertools
import json
import math
import pathlib
import tarfile
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from vqrae_jax.errors import UserError, choose
from vqrae_jax.tokens import example

FEATURE = 'tokens'  # the int64 feature of a tf.train.Example


@dataclasses.dataclass(frozen=True)
class Layout:
  """The shape and range of a dump's indices, and how they map to ids.

  Attributes:
    codebook_size: K; indices lie in [0, K), or are -1 where a quantizer omitted
      a code.
    index_shape: of one view: (gh, gw), (gh, gw, q) or (n,).
    image_size: (h, w) in pixels at which a view was encoded.
    crops: how many unmirrored views an image has.
    flip: whether the mirror image of each follows, after all of them.
    offset: the id of index 0.
    bos, eod: ids before and after each sequence, if any.
  """

  codebook_size: int
  index_shape: tuple[int, ...]
  image_size: tuple[int, int]
  crops: int = 1
  flip: bool = False
  offset: int = 0
  bos: int | None = None
  eod: int | None = None

  def __post_init__(self):
    # JSON returns tuples as lists.
    for name in ('index_shape', 'image_size'):
      object.__setattr__(self, name, tuple(getattr(self, name)))
    last = self.offset + self.codebook_size - 1
    for name in ('bos', 'eod'):
      value = getattr(self, name)
      if value is not None and self.offset <= value <= last:
        raise UserError(
          f'--{name}={value} is the id of a code: codes have {self.offset} to '
          f'{last}; {last + 1} is free'
        )
    if self.vocabulary > 2**31:
      raise UserError(
        f'--offset={self.offset}, --bos={self.bos} and --eod={self.eod} give '
        f'ids up to {self.vocabulary - 1}, and an id has 31 bits'
      )

  @property
  def views(self) -> int:
    """How many rows an image has."""
    return self.crops * (1 + self.flip)

  @property
  def vocabulary(self) -> int:
    """Ids lie in [0, vocabulary)."""
    ids = (self.offset + self.codebook_size - 1, self.bos, self.eod)
    return 1 + max(i for i in ids if i is not None)

  @property
  def pad(self) -> int:
    """An id that no sequence has, 0 if unused, else one above the largest."""
    taken_0 = not self.offset or 0 in (self.bos, self.eod)
    return self.vocabulary if taken_0 else 0

  def rows(self, tokens: np.ndarray) -> np.ndarray:
    """[n v *index_shape] -> [n*v, codes per view], in C order."""
    return tokens.reshape(-1, math.prod(self.index_shape))

  def from_rows(self, rows: np.ndarray) -> np.ndarray:
    """The inverse of `rows`, of any shape, as i32."""
    shape = -1, self.views, *self.index_shape
    return np.asarray(rows, np.int32).reshape(shape)

  def each_view(self, values: Sequence) -> list:
    """One value per image -> the same value for each of its views."""
    return [value for value in values for _ in range(self.views)]

  def ids(self, tokens: np.ndarray) -> np.ndarray:
    """i32[n v *index_shape] in [0, K) -> i32[n*v, ids per sequence]."""
    rows = self.rows(tokens) + self.offset
    ends = [
      np.full((len(rows), int(end is not None)), end or 0)
      for end in (self.bos, self.eod)
    ]
    return np.concatenate([ends[0], rows, ends[1]], 1).astype(np.int32)

  def from_ids(self, ids: np.ndarray) -> np.ndarray:
    """The inverse of `ids`, of any shape."""
    before, after = self.bos is not None, self.eod is not None
    codes = math.prod(self.index_shape)
    rows = np.reshape(ids, (-1, before + codes + after))
    rows = rows[:, before : before + codes].astype(np.int32)
    return self.from_rows(rows - self.offset)


@dataclasses.dataclass(frozen=True)
class Shard:
  """The images of one shard, without their indices.

  Attributes:
    number: of the shard in the dump, which names its files.
    keys: n, the path of each image in its folder or tar, or its record.
    labels: n, each an int or None.
    positions: n, the position of each image in the shard, counted from 0,
      skipped images included.
    boxes: n, for each crop [top, left, bottom, right] in pixels of the upright
      image, which may be fractional.
    first: the number of images in all earlier shards; None if not counted.
  """

  number: int
  keys: Sequence[str]
  labels: Sequence[int | None]
  positions: Sequence[int]
  boxes: Sequence[Sequence[Sequence[float]]]
  first: int | None = None

  def __len__(self) -> int:
    return len(self.keys)

  def file(self, ending: str) -> str:
    """The name of this shard's file."""
    return f'{self.number:05}.{ending}'


class Format(NamedTuple):
  """How a shard is stored on disk.

  Attributes:
    about: what it is, and which project's.
    paths: (layout, shard) -> the shard's files, relative, in sorted order.
    write: (folder, layout, shard, i32[n v *index_shape]) writes them.
    read: (folder, layout, shard) -> i32[n v *index_shape].
    dtype: (layout) -> the type of a stored index or id.
    card: how to point the trainer at it; {pad}, {vocabulary}, {eod} and
      {shape} are filled in.
    sequences: whether it holds ids for a language model, so that offset, bos
      and eod apply.
    labelled: whether every image needs a label.
    numbered: whether files are named by an image's number in all of the data.
    left_out: whether it can hold -1.
    module: the module that it needs, from the extra named like the format.
  """

  about: str
  paths: Callable[[Layout, Shard], list[str]]
  write: Callable[[pathlib.Path, Layout, Shard, np.ndarray], None]
  read: Callable[[pathlib.Path, Layout, Shard], np.ndarray]
  dtype: Callable[[Layout], str]
  card: str
  sequences: bool = False
  labelled: bool = False
  numbered: bool = False
  left_out: bool = False
  module: str = ''


def _one_file(ending: str) -> Callable[[Layout, Shard], list[str]]:
  return lambda layout, shard: [shard.file(ending)]


# ----------------------------------------------------------------------------
# ArrayRecord of tf.train.Example, one record per group for random access.


def _write_array_record(folder, layout, shard, tokens):
  from array_record.python import array_record_module

  path = folder / shard.file('array_record')
  try:
    writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
    for ids in layout.ids(tokens):
      writer.write(example.encode({FEATURE: ids.tolist()}))
    writer.close()
  except RuntimeError as e:  # a full disk
    raise OSError(errno.EIO, ' '.join(str(e).split()), str(path)) from None


def _read_array_record(folder, layout, shard):
  from array_record.python import array_record_data_source

  path = str(folder / shard.file('array_record'))
  source = array_record_data_source.ArrayRecordDataSource([path])
  records = source.__getitems__(range(len(source))) if len(source) else []
  rows = [example.decode(record)[FEATURE] for record in records]
  return layout.from_ids(np.array(rows))


# ----------------------------------------------------------------------------
# Megatron's indexed data set: ids one after another in .bin, in .idx where each
# sequence begins; a document is a sequence.


def _megatron_dtype(layout):
  return np.dtype('<u2' if layout.vocabulary <= 2**16 else '<i4')


def _write_megatron(folder, layout, shard, tokens):
  ids = layout.ids(tokens).astype(_megatron_dtype(layout))
  code = {2: 8, 4: 4}[ids.itemsize]  # Megatron's of uint16 and int32
  count, length = ids.shape
  with open(folder / shard.file('idx'), 'wb') as file:
    file.write(b'MMIDIDX\0\0' + np.array(1, '<u8').tobytes() + bytes([code]))
    # Megatron counts the boundaries of documents, one more than documents.
    file.write(np.array([count, count + 1], '<u8').tobytes())
    file.write(np.full(count, length, '<i4').tobytes())
    starts = np.arange(count, dtype='<i8') * (length * ids.itemsize)
    file.write(starts.tobytes() + np.arange(count + 1, dtype='<i8').tobytes())
  (folder / shard.file('bin')).write_bytes(ids.tobytes())


def _read_megatron(folder, layout, shard):
  path = folder / shard.file('bin')
  return layout.from_ids(np.fromfile(path, _megatron_dtype(layout)))


# ----------------------------------------------------------------------------
# JSON lines, one view per line.


def _write_jsonl(folder, layout, shard, tokens):
  rows = layout.rows(tokens)
  labels = layout.each_view(shard.labels)
  with open(folder / shard.file('jsonl'), 'w') as file:
    for label, row in zip(labels, rows, strict=True):
      line = dict(class_id=label, tokens=row.tolist())
      file.write(json.dumps(line) + '\n')


def _read_jsonl(folder, layout, shard):
  lines = (folder / shard.file('jsonl')).read_text().splitlines()
  return layout.from_rows(np.array([json.loads(x)['tokens'] for x in lines]))


# ----------------------------------------------------------------------------
# LlamaGen's tree: for each image a file of codes int64 [1 v n] and one of its
# label int64 [1], numbered across all shards.


def _llamagen_names(layout, shard):
  """[(file of codes, file of the label)] of each image."""
  tree = f'imagenet{layout.image_size[0]}'
  return [
    (f'{tree}_codes/{i}.npy', f'{tree}_labels/{i}.npy')
    for i in (shard.first + position for position in shard.positions)
  ]


def _llamagen_paths(layout, shard):
  return sorted(itertools.chain(*_llamagen_names(layout, shard)))


def _write_llamagen(folder, layout, shard, tokens):
  codes = math.prod(layout.index_shape)
  rows = layout.rows(tokens).reshape(len(shard), 1, layout.views, codes)
  names = _llamagen_names(layout, shard)
  for (codes, label), row, value in zip(names, rows, shard.labels, strict=True):
    for name, array in ((codes, row), (label, [value])):
      (folder / name).parent.mkdir(exist_ok=True)
      np.save(folder / name, np.array(array, np.int64))


def _read_llamagen(folder, layout, shard):
  names = _llamagen_names(layout, shard)
  return layout.from_rows(
    np.array([np.load(folder / codes) for codes, _ in names])
  )


# ----------------------------------------------------------------------------
# Parquet, one row per view.


def _write_parquet(folder, layout, shard, tokens):
  import pyarrow
  from pyarrow import parquet

  def lists(rows):
    if rows.size >= 2**31:
      raise UserError(
        f'{rows.size:,} indices are too many for a shard of parquet; lower '
        '--shard_images'
      )
    ends = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
    flat = pyarrow.array(rows.astype(np.int32).ravel())
    return pyarrow.ListArray.from_arrays(ends, flat)

  grid = layout.index_shape[:2] if len(layout.index_shape) > 1 else (None, None)

  def column(values, kind):
    return pyarrow.array(layout.each_view(values), kind)

  table = pyarrow.table(
    {
      'key': column(shard.keys, pyarrow.string()),
      'tokens': lists(layout.rows(tokens)),
      'input_ids': lists(layout.ids(tokens)),
      'h': column([grid[0]] * len(shard), pyarrow.int32()),
      'w': column([grid[1]] * len(shard), pyarrow.int32()),
      'label': column(shard.labels, pyarrow.int64()),
    }
  )
  parquet.write_table(table, folder / shard.file('parquet'))


def _read_parquet(folder, layout, shard):
  from pyarrow import parquet

  path = folder / shard.file('parquet')
  rows = parquet.read_table(path, columns=['tokens'])['tokens']
  return layout.from_rows(rows.combine_chunks().flatten().to_numpy())


# ----------------------------------------------------------------------------
# HDF5 with the names of IDEAL's extraction, one row per view.


def _write_hdf5(folder, layout, shard, tokens):
  import h5py

  keys = np.array(layout.each_view(shard.keys), object)
  labels = layout.each_view(shard.labels)
  with h5py.File(folder / shard.file('h5'), 'w') as file:
    file.create_dataset('code', data=layout.rows(tokens).astype(np.int32))
    file.create_dataset('label', data=np.array(labels, np.int64))
    file.create_dataset('path', data=keys, dtype=h5py.string_dtype('utf-8'))


def _read_hdf5(folder, layout, shard):
  import h5py

  with h5py.File(folder / shard.file('h5'), 'r') as file:
    return layout.from_rows(file['code'][...])


# ----------------------------------------------------------------------------
# webdataset: KEY.npy and KEY.cls under the image's own key.


def _member(key: str, ending: str) -> str:
  """webdataset's key of an image ends at the first dot of its name."""
  path = pathlib.PurePosixPath(key)
  return str(path.with_name(path.name.partition('.')[0] + ending))


def _write_webdataset(folder, layout, shard, tokens):
  names = [_member(key, '.npy') for key in shard.keys]
  if twice := [
    n for n, times in collections.Counter(names).items() if times > 1
  ]:
    raise UserError(
      f'several images would become {twice[0]}: names are cut at the first '
      'dot; rename them, or choose another --format'
    )
  dtype = np.min_scalar_type(layout.codebook_size - 1)

  def members():
    for key, label, views in zip(shard.keys, shard.labels, tokens, strict=True):
      out = io.BytesIO()
      least = np.int32 if views.min(initial=0) < 0 else dtype
      np.save(out, (views if layout.views > 1 else views[0]).astype(least))
      yield _member(key, '.npy'), out.getvalue()
      if label is not None:
        yield _member(key, '.cls'), b'%d' % label

  with tarfile.open(folder / shard.file('tar'), 'w') as file:
    for name, data in members():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      file.addfile(info, io.BytesIO(data))


def _read_webdataset(folder, layout, shard):
  with tarfile.open(folder / shard.file('tar'), 'r:') as file:
    rows = [
      np.load(io.BytesIO(file.extractfile(member).read()))
      for member in file
      if member.name.endswith('.npy')
    ]
  return layout.from_rows(np.array(rows))


FORMATS = {
  'array_record': Format(
    'ArrayRecord of tf.train.Example (MaxText, grain)',
    _one_file('array_record'),
    _write_array_record,
    _read_array_record,
    lambda layout: 'int64',
    'MaxText: dataset_type=grain, grain_file_type=arrayrecord, '
    'grain_train_files=DIR/shards/*.array_record, tokenize_train_data=false, '
    f'train_data_columns=[{FEATURE}], and a tokenizer whose pad id is {{pad}}: '
    'MaxText masks the loss of every target that is the pad id.',
    sequences=True,
  ),
  'megatron': Format(
    'Megatron .bin and .idx (Megatron-LM, NeMo, MaxText)',
    lambda layout, shard: [shard.file('bin'), shard.file('idx')],
    _write_megatron,
    _read_megatron,
    lambda layout: _megatron_dtype(layout).name,
    'Megatron-LM: --data-path takes the prefixes DIR/shards/NNNNN, one a '
    'shard, with --tokenizer-type NullTokenizer and --vocab-size '
    '{vocabulary}; documents end with the id {eod}.',
    sequences=True,
  ),
  'jsonl': Format(
    'JSON lines of class_id and tokens (RAR, BAR)',
    _one_file('jsonl'),
    _write_jsonl,
    _read_jsonl,
    lambda layout: 'text',
    'RAR reads one file: cat DIR/shards/*.jsonl > pretokenized.jsonl.',
    labelled=True,
  ),
  'llamagen': Format(
    "LlamaGen's tree of .npy",
    _llamagen_paths,
    _write_llamagen,
    _read_llamagen,
    lambda layout: 'int64',
    'LlamaGen: --code-path DIR/shards. Its list of files is that of ImageNet '
    '(1,281,167 numbers): of other data, or where images were skipped, list '
    'the folder instead. It draws one of several views where the path holds '
    '"flip".',
    labelled=True,
    numbered=True,
  ),
  'parquet': Format(
    'Parquet (Hugging Face datasets, Ray Data, MaxText)',
    _one_file('parquet'),
    _write_parquet,
    _read_parquet,
    lambda layout: 'int32',
    'Columns: key, tokens (indices), input_ids (ids), h, w (the grid), label.',
    sequences=True,
    module='pyarrow',
  ),
  'hdf5': Format(
    "HDF5 by IDEAL's names",
    _one_file('h5'),
    _write_hdf5,
    _read_hdf5,
    lambda layout: 'int32',
    'Data sets: code int32 [rows, codes], label int64, path.',
    labelled=True,
    module='h5py',
  ),
  'webdataset': Format(
    "tars of KEY.npy and KEY.cls under the images' own keys (webdataset)",
    _one_file('tar'),
    _write_webdataset,
    _read_webdataset,
    lambda layout: np.min_scalar_type(layout.codebook_size - 1).name,
    'A member is [{shape}], or [views, {shape}] of several views.',
    left_out=True,
  ),
}  # fmt: skip


def find_format(name: str) -> Format:
  """The row of `FORMATS` of that name.

  Raises:
    UserError: there is no such format, or its package is not installed.
  """
  form = choose(FORMATS, name, '--format')
  if form.module and importlib.util.find_spec(form.module) is None:
    raise UserError(
      f'--format={name} needs a package that is not installed: '
      f"pip install 'vqrae_jax[{name}]'"
    )
  return form
