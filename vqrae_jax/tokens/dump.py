"""A dump of tokens on disk: many shards, each written in full or not at all.

  config.json            what the dump was started with
  codebook.npy           f32[K c]; with several codes per token [q K c], or
                         [1 K c] if they share a table; absent above 2^20 codes
  shards/                what a trainer reads (`formats.py`), and nothing else
  finished/00012.json    shard 12: SHA-256, keys, labels, boxes, skipped images
  dataset.json           totals and shards, once all of them are finished
  README.md              the card: how a trainer reads it

A shard is written in a folder of its own, `.00012.*.writing`, whose files are
then moved into `shards/`. `finished/00012.json` is written last, and a shard
without it is written again. So workers need not communicate: each writes its
shards, and any worker that finds all of them finished writes the last two
files, whose bytes are the same whoever writes them.
"""

import contextlib
import dataclasses
import hashlib
import json
import operator
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vqrae_jax.errors import BAD_JSON, UserError, read_json
from vqrae_jax.files import atomic_write
from vqrae_jax.tokens.formats import FORMATS, Layout, Shard, find_format

FORMAT_VERSION = 1
CONFIG, DATASET, CARD = 'config.json', 'dataset.json', 'README.md'
CODEBOOK, SHARDS, FINISHED = 'codebook.npy', 'shards', 'finished'
# Of config.json, what may differ between the workers of one dump.
_FREE = ('data', 'versions')
_BRIEF = ('number', 'source', 'images', 'files', 'sha256')  # of a shard


def _json(value: Any) -> bytes:
  return (json.dumps(value, indent=1) + '\n').encode()


def _layout(config: Mapping) -> Layout:
  fields = {field.name for field in dataclasses.fields(Layout)}
  return Layout(**{k: v for k, v in config.items() if k in fields})


class Writer:
  """Writes shards of one dump into a folder, alongside other writers."""

  def __init__(self, folder: pathlib.Path, config: Mapping[str, Any]):
    """Starts the dump, or joins one that was started with the same config.

    Args:
      folder: made if absent.
      config: the contents of config.json: fingerprint, format, shard_count,
        the fields of `Layout`, "data" and "versions", and whatever else must
        be the same for all workers.

    Raises:
      UserError: the folder holds something else.
    """
    self.folder = folder
    self._config = {'format_version': FORMAT_VERSION, **config}
    self.layout = _layout(config)
    self._format = find_format(config['format'])
    path = folder / CONFIG
    if not path.exists():
      folder.mkdir(parents=True, exist_ok=True)
      foreign = any(p.suffix != '.writing' for p in folder.iterdir())
      # Another worker may have started the dump in between.
      if foreign and not path.exists():
        raise UserError(f'--out={folder} holds no dump; name an empty folder')
      with atomic_write(path) as file:
        file.write(_json(self._config))
    # Also when just written: another worker may have started the dump too.
    before, now = read_json(path), json.loads(_json(self._config))
    if 'shard_count' not in before:
      raise UserError(f'--out={folder} holds no dump; name an empty folder')
    if before.get('listing') != now.get('listing'):
      raise UserError(
        f'--out={folder} holds a dump of other files, of --data='
        f'{before.get("data")}; name another folder'
      )
    for name in sorted({*before, *now} - {*_FREE}):
      if before.get(name) != now.get(name):
        raise UserError(
          f'--out={folder} holds a dump with {name}='
          f'{_short(before.get(name))}, not {_short(now.get(name))}; name '
          'another folder'
        )
    for name in (SHARDS, FINISHED):
      (folder / name).mkdir(exist_ok=True)

  @property
  def finished(self) -> set[int]:
    """Numbers of the finished shards."""
    return _finished(self.folder)

  def write(
    self,
    shard: Shard,
    tokens: np.ndarray,
    source: str,
    skipped: Sequence[tuple[str, str]] = (),
  ) -> None:
    """Writes a complete shard, replacing what a killed worker left of it.

    Args:
      shard: its images.
      tokens: i32[n v *index_shape].
      source: what its images are, for dataset.json.
      skipped: (key, reason) of its images that could not be read.

    Raises:
      UserError: an index that the format cannot hold, or an image without the
        label that the format needs.
    """
    self._check(shard, tokens)
    try:
      self._write(shard, tokens, source, skipped)
    except FileNotFoundError:
      # Another worker has written the same shard and removed what was left.
      if shard.number not in self.finished:
        raise

  def _write(self, shard, tokens, source, skipped) -> None:
    with self._scratch(f'{shard.number:05}') as scratch:
      self._format.write(scratch, self.layout, shard, tokens)
      paths = self._format.paths(self.layout, shard)
      row = dict(
        number=shard.number,
        source=source,
        images=len(shard),
        files=len(paths),
        sha256=_digest(scratch, paths),
        first=shard.first,
        skipped=list(map(list, skipped)),
        keys=list(shard.keys),
        labels=list(shard.labels),
        positions=list(map(int, shard.positions)),
        boxes=shard.boxes,
      )
      (scratch / FINISHED).write_bytes((json.dumps(row) + '\n').encode())
      for path in (*paths, FINISHED):
        _to_disk(scratch / path)
      for path in paths:
        target = self.folder / SHARDS / path
        target.parent.mkdir(exist_ok=True)
        os.replace(scratch / path, target)
      last = self.folder / FINISHED / f'{shard.number:05}.json'
      os.replace(scratch / FINISHED, last)

  def _check(self, shard: Shard, tokens: np.ndarray) -> None:
    name = self._config['format']
    if not self._format.left_out and tokens.min(initial=0) < 0:
      raise UserError(
        f'--format={name} cannot hold -1, which stands for a code that is left '
        'out; --format=webdataset can'
      )
    if self._format.labelled and None in shard.labels:
      key = shard.keys[list(shard.labels).index(None)]
      raise UserError(
        f'the image {key} has no label, which --format={name} needs: a '
        'sub-folder for each class, or a member KEY.cls in a tar'
      )

  @contextlib.contextmanager
  def _scratch(self, what: str) -> Iterator[pathlib.Path]:
    folder = self.folder / f'.{what}.{uuid.uuid4().hex}.writing'
    folder.mkdir()
    try:
      yield folder
    finally:
      shutil.rmtree(folder, ignore_errors=True)

  def write_codebook(self, table: np.ndarray | None) -> None:
    """Writes codebook.npy, if there is a table and no file yet."""
    if table is not None and not (self.folder / CODEBOOK).exists():
      with atomic_write(self.folder / CODEBOOK) as file:
        np.save(file, table)

  def finish(self) -> dict | None:
    """If all shards are finished, writes dataset.json and the card, removes
    what killed workers left, and returns the dataset; else None."""
    numbers = range(self._config['shard_count'])
    if not self.finished.issuperset(numbers):
      return None
    dataset = self._dataset(numbers)
    files = {DATASET: _json(dataset), CARD: card(dataset).encode()}
    # Another worker may be here too, and sweep what this one is writing: then
    # it has written the same.
    with contextlib.suppress(FileNotFoundError):
      for name, data in files.items():
        with atomic_write(self.folder / name) as file:
          file.write(data)
    for stale in self.folder.glob('.*.writing'):
      if stale.is_dir():
        shutil.rmtree(stale, ignore_errors=True)
      else:
        stale.unlink(missing_ok=True)
    return dataset

  def _dataset(self, numbers: range) -> dict:
    shards, skipped = [], []
    for number in numbers:  # of whose images not all fit into memory
      _, row = _read(self.folder / FINISHED / f'{number:05}.json', _shard)
      shards.append({name: row[name] for name in _BRIEF})
      skipped += [[row['source'], *image] for image in row['skipped']]
    images = sum(shard['images'] for shard in shards)
    layout = self.layout
    return read_json(self.folder / CONFIG) | dict(
      pad=layout.pad if self._format.sequences else None,
      vocabulary=layout.vocabulary,
      images=images,
      rows=images * layout.views,
      dtype=self._format.dtype(layout),
      tokens=images * layout.views * int(np.prod(layout.index_shape)),
      skipped=skipped,
      shards=shards,
    )


def _finished(folder: pathlib.Path) -> set[int]:
  names = (path.stem for path in (folder / FINISHED).glob('*.json'))
  return {int(name) for name in names if name.isdecimal()}


def _short(value: Any) -> str:
  text = json.dumps(value)
  return text if len(text) <= 40 else f'{text[:37]}…'


def _digest(folder: pathlib.Path, paths: Sequence[str]) -> str:
  """The SHA-256 of a shard's files, concatenated."""
  digest = hashlib.sha256()
  for path in paths:
    with open(folder / path, 'rb') as file:
      while block := file.read(1 << 20):
        digest.update(block)
  return digest.hexdigest()


def _to_disk(path: pathlib.Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _read(path: pathlib.Path, parse: Callable[[dict], Any]) -> Any:
  """What `parse` makes of a file of ours, of any length, unlike `read_json`."""
  try:
    return parse({**json.loads(path.read_bytes())})
  except UserError:
    raise
  except (OSError, *BAD_JSON) as e:
    raise UserError(
      f'{path} is damaged: {e!r:.200}; remove it and run tokenize again'
    ) from None


def _described(info: dict) -> tuple[dict, Layout, np.ndarray]:
  """(all of it, the layout, the number of images before each shard) of
  dataset.json."""
  layout = _layout(info)
  find_format(info['format'])
  starts = np.cumsum([0, *(shard['images'] for shard in info['shards'])])
  if len(starts) != info['shard_count'] + 1:
    raise ValueError('it does not have all shards')
  if info['rows'] != starts[-1] * layout.views:
    raise ValueError('its shards do not have all rows')
  return info, layout, starts


def _shard(row: dict) -> tuple[Shard, dict]:
  """(images, all that is known) of a finished shard."""
  fields = {field.name for field in dataclasses.fields(Shard)}
  shard = Shard(**{k: v for k, v in row.items() if k in fields})
  lists = shard.keys, shard.labels, shard.positions
  if {*map(len, lists)} != {row['images']}:
    raise ValueError('its lists are not as long as it has images')
  return shard, {name: row[name] for name in (*_BRIEF, 'skipped')}


class Dump:
  """Random access to the rows of a finished dump: a source for grain.

  Row i is view i % v of image i // v. A shard is read, and verified against its
  SHA-256, when one of its rows is first read. Its indices then stay in memory,
  at 2 bytes each for up to 65,536 codes.

  Attributes:
    info: dataset.json.
    layout: what the indices are.
  """

  def __init__(self, folder: str | os.PathLike, fingerprint: str | None = None):
    """See `open_dump`."""
    self.folder = pathlib.Path(os.path.expanduser(folder))
    if not (self.folder / CONFIG).is_file():
      raise UserError(f'{folder} holds no dump of tokens: no {CONFIG}')
    config = read_json(self.folder / CONFIG)
    if 'shard_count' not in config:
      raise UserError(f'{folder} holds no dump of tokens: {CONFIG} is another')
    if config.get('format_version') != FORMAT_VERSION:
      raise UserError(
        f'{folder} has format version {config.get("format_version")}, this '
        f'package reads {FORMAT_VERSION}'
      )
    made_by = str(config.get('fingerprint'))
    if fingerprint is not None and made_by != fingerprint:
      raise UserError(
        f'{folder} holds tokens of another tokenizer: its fingerprint is '
        f'{made_by[:12]}…, and {fingerprint[:12]}… is wanted'
      )
    if not (self.folder / DATASET).is_file():
      done = len(_finished(self.folder))
      raise UserError(
        f'{folder} is not finished: {done} of {config["shard_count"]} shards '
        'are; run the same tokenize command to write the others'
      )
    found = _read(self.folder / DATASET, _described)
    self.info, self.layout, self._starts = found
    self._kept: dict[int, tuple[Sequence, Sequence, np.ndarray]] = {}

  def __len__(self) -> int:
    return self.info['rows']

  def __getitem__(self, index: int) -> dict[str, Any]:
    """One row, {"tokens": i32[*index_shape], "label": int, -1 for none,
    "key": str, "view": int}.

    Raises:
      UserError: its shard is damaged.
      IndexError: there is no such row.
      TypeError: the index is not an integer.
    """
    index = operator.index(index)
    if not -len(self) <= index < len(self):
      raise IndexError(f'row {index} of {len(self)}')
    image, view = divmod(index % len(self), self.layout.views)
    number, at = self.place(image)
    if number not in self._kept:
      shard, tokens = self.shard(number)
      if tokens.min(initial=0) >= 0:
        least = np.min_scalar_type(self.layout.codebook_size - 1)
        tokens = tokens.astype(least)
      self._kept[number] = shard.keys, shard.labels, tokens
    keys, labels, tokens = self._kept[number]
    return dict(
      tokens=tokens[at, view].astype(np.int32),
      label=-1 if labels[at] is None else labels[at],
      key=keys[at],
      view=view,
    )

  def place(self, image: int) -> tuple[int, int]:
    """(shard, index in the shard) of an image of the dump."""
    number = int(np.searchsorted(self._starts, image, 'right')) - 1
    return number, image - int(self._starts[number])

  def shard(self, number: int) -> tuple[Shard, np.ndarray]:
    """(images, their indices i32[n v gh gw], or as `index_shape` has them).

    Raises:
      UserError: it is damaged.
      IndexError: there is none of that number.
    """
    count = self.info['shard_count']
    if not 0 <= number < count:
      raise IndexError(f'shard {number} of {count}')
    shard, row = _read(self.folder / FINISHED / f'{number:05}.json', _shard)
    # Not kept: grain pickles a source for its processes, and functions cannot
    # be pickled.
    form, folder = FORMATS[self.info['format']], self.folder / SHARDS
    try:
      found = _digest(folder, form.paths(self.layout, shard))
    except OSError as e:
      raise UserError(
        f'{e.filename}: {e.strerror}; remove {FINISHED}/{number:05}.json and '
        'run tokenize again'
      ) from None
    if found != row['sha256']:
      raise UserError(
        f'shard {number} of {self.folder} is damaged: its SHA-256 is '
        f'{found[:12]}…, not {row["sha256"][:12]}…; remove '
        f'{FINISHED}/{number:05}.json and run tokenize again'
      )
    return shard, form.read(folder, self.layout, shard)

  def codebook(self) -> np.ndarray:
    """f32[K c]; with several codes per token [q K c], q = 1 if they share a
    table."""
    try:
      return np.load(self.folder / CODEBOOK)
    except (OSError, ValueError, EOFError) as e:
      raise UserError(
        f'{self.folder / CODEBOOK} cannot be read: {e}; a quantizer without a '
        'table has none'
      ) from None


def open_dump(
  folder: str | os.PathLike, fingerprint: str | None = None
) -> Dump:
  """Opens a finished dump.

  Args:
    folder: what `tokenize --out` wrote.
    fingerprint: of the tokenizer that must have made the tokens: "fingerprint"
      in its config.json. None accepts any.

  Raises:
    UserError: not a dump, an unfinished one, or one of another tokenizer.
  """
  return Dump(folder, fingerprint)


def card(dataset: Mapping[str, Any]) -> str:
  """README.md of a dump, from its dataset.json."""
  layout, form = _layout(dataset), FORMATS[dataset['format']]
  shape = ' × '.join(map(str, layout.index_shape))
  h, w = layout.image_size
  lines = [
    '# Tokens of images',
    '',
    f'{dataset["images"]:,} images, {dataset["rows"]:,} rows of '
    f'{dataset["tokens"] // max(dataset["rows"], 1):,} indices, '
    f'{len(dataset["skipped"]):,} images or files skipped (`{DATASET}` lists '
    'them).',
    '',
    f'- tokenizer: `{dataset["fingerprint"]}`',
    f'- indices of a row: {shape} in [0, {layout.codebook_size}), of '
    f'{h} × {w} pixels, flattened in C order',
    f'- views of an image: {layout.views} ({layout.crops} '
    f'crop{"s" * (layout.crops > 1)}'
    f'{", then their mirror images" * layout.flip})',
    f'- format: {form.about}',
  ]
  if form.sequences:
    ends = [
      f'{name} {value}'
      for name, value in (('bos', layout.bos), ('eod', layout.eod))
      if value is not None
    ]
    lines += [
      f'- ids: index + {layout.offset}; {", ".join(ends) or "no bos, no eod"}; '
      f'vocabulary {layout.vocabulary}',
      f'- pad id: {layout.pad}, which no row has',
    ]
    if layout.pad == layout.vocabulary:
      lines[-1] += f'; a model that pads has {layout.pad + 1} ids'
  text = form.card.format(
    pad=layout.pad, vocabulary=layout.vocabulary, eod=layout.eod, shape=shape
  )
  lines += [
    '',
    text,
    '',
    '`vqrae_jax.tokens.open_dump(DIR)` reads it in numpy and as a source of '
    'grain.',
  ]
  return '\n'.join(lines) + '\n'
