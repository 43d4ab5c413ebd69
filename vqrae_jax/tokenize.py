"""python -m vqrae_jax.tokenize --tokenizer=DIR --data=DATA --out=DIR

The indices of all images, in files that trainers read (docs/tokens.md).

The unit of work is a shard: a tar or an ArrayRecord file of the data, or a
range of `--shard_images` images of a folder, becomes one shard of the dump.
`--shards=I/N` takes its share of them, and no worker waits for another: each
may be killed, started again, or started elsewhere at any time. Finished shards
are skipped, the others written from the start. With `--distributed` the
processes of one pod divide them among themselves.

Images that cannot be read are skipped and listed. Batches never hold images of
two shards, so a shard that is written again has the same bytes, with the same
`--batch_size` on the same devices.
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags, logging

from vqrae_jax import cli
from vqrae_jax.errors import UserError
from vqrae_jax.tokens import FORMATS, Dump, Layout, Shard, Writer, find_format

MODULE = 'vqrae_jax.tokenize'
EXAMPLE = (
  f'python -m {MODULE} --tokenizer=runs/quickstart/tokenizer '
  '--data=bundled:photos --out=tokens'
)
CROPS = (1, 5)
_WIDER = 1.1  # the shorter side that five crops lie in, in sizes of one
_LISTED = 2**20  # the most codes of a codebook.npy
_SAMPLE = 32  # images that --verify encodes again
_AGREE = 0.9  # of their indices; rounding may move some


@dataclasses.dataclass(frozen=True)
class Job:
  """A dump as the flags of the same names ask for it."""

  tokenizer: str
  data: str
  out: str
  format: str = 'array_record'
  size: int | None = None
  crops: int = 1
  flip: bool = False
  resize: int | None = None
  offset: int | None = None
  bos: int | None = None
  eod: int | None = None
  shard_images: int = 10_000
  batch_size: int = 32
  trusted: Sequence[str] = ()

  @classmethod
  def of(cls, values: flags.FlagValues) -> 'Job':
    """Of the flags that `define_job` defines, once they are parsed."""
    cli.required(values, 'tokenizer', 'data', 'out')
    names = [field.name for field in dataclasses.fields(cls)]
    return cls(**{name: getattr(values, name) for name in names})


class Views:
  """The views of a source's images, uint8 [v h w 3], at random.

  One crop is the centre. Five are the corners, from the top left by rows, and
  the centre of the image's centre, a square of `side`, as LlamaGen has them.
  Mirror images follow, in the same order. `boxes[i]` is there once image i was
  read: [top, left, bottom, right] of each crop.
  """

  def __init__(self, source: Any, layout: Layout, side: int):
    """`side`: what an image's shorter side becomes before it is cropped."""
    self._source, self._layout, self._side = source, layout, side
    self.boxes: dict[int, list[list[float]]] = {}

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> np.ndarray:
    from PIL import Image

    from vqrae_jax.data import pipeline

    image, size = self._source.picture(index), self._layout.image_size
    w, h = image.size
    wider = self._side / min(size) if self._layout.crops == 5 else 1
    frame = tuple(max(n, round(n * wider)) for n in size)
    full = pipeline.resized(h, w, self._side, frame)
    top, left = ((a - b) // 2 for a, b in zip(full, size, strict=True))
    corners = [(top, left)]
    if self._layout.crops == 5:
      above, before = ((a - b) // 2 for a, b in zip(full, frame, strict=True))
      below = above + frame[0] - size[0]
      after = before + frame[1] - size[1]
      corners = [
        *((y, x) for y in (above, below) for x in (before, after)),
        *corners,
      ]
    crops, boxes = zip(
      *(pipeline.window(image, full, corner, size) for corner in corners),
      strict=True,
    )
    if self._layout.flip:
      mirror = Image.Transpose.FLIP_LEFT_RIGHT
      crops += tuple(crop.transpose(mirror) for crop in crops)
    self.boxes[index] = [
      [round(x, 3) for x in (top, left, bottom, right)]
      for left, top, right, bottom in boxes
    ]
    return np.stack([np.asarray(crop) for crop in crops])


class Worker:
  """Writes shards of one dump; what it compiles and opens, it keeps."""

  def __init__(self, job: Job):
    """Opens the tokenizer, lists the data, and starts or joins the dump.

    Raises:
      UserError: a flag that does not fit, nothing to read, or another dump in
        the folder.
    """
    from vqrae_jax import export
    from vqrae_jax.data import sources

    self._job = job
    form = find_format(job.format)
    _check_flags(job, form)
    out = cli.new_folder(job.out)
    self._listing = sources.list_source(job.data)
    self._of_files = self._listing.kind != 'image'
    self._opened = None if self._of_files else self._open(self._listing)
    if form.labelled and self._opened and not self._opened.classes:
      raise UserError(
        f'--format={job.format} needs labels, and "{job.data}" has no '
        'sub-folder for each class'
      )
    self._firsts = None
    if form.numbered and self._of_files:
      counts = [len(self._open(self._one(i))) for i in range(self.count)]
      self._firsts = [0, *np.cumsum(counts).tolist()]
    self._tokenizer, self._variables = export.load_tokenizer(
      job.tokenizer, trusted=job.trusted
    )
    if not self._tokenizer.codebook_size:
      raise UserError(
        f'--tokenizer={job.tokenizer} is continuous (model.quantizer.name='
        '"none"): it has no indices'
      )
    self._layout, self._side = _layout(job, form, self._tokenizer)
    self._writer = Writer(out, self._config())
    self._writer.write_codebook(_codebook(self._tokenizer, self._variables))
    self._encode = None

  def _config(self) -> dict[str, Any]:
    """config.json of the dump."""
    from vqrae_jax import export

    job, listing = self._job, self._listing
    names = b'\n'.join(map(os.fsencode, listing.names))
    sizes = [p.stat().st_size for p in listing.paths] if self._of_files else []
    return dict(
      fingerprint=export.fingerprint_of(self._tokenizer, self._variables),
      format=job.format,
      **dataclasses.asdict(self._layout),
      resize=self._side,
      kind=listing.kind,
      shard_count=self.count,
      shard_images=None if self._of_files else job.shard_images,
      listing=hashlib.sha256(names + repr(sizes).encode()).hexdigest(),
      classes=self._opened and self._opened.classes,
      data=job.data,
      versions=cli.versions(),
    )

  @property
  def count(self) -> int:
    """How many shards the dump has."""
    if self._of_files:
      return len(self._listing.names)
    return -(-len(self._opened) // self._job.shard_images)

  @property
  def finished(self) -> set[int]:
    """Numbers of the shards that are finished, by whomever."""
    return self._writer.finished

  def _one(self, number: int) -> Any:
    """The listing of one tar or ArrayRecord file."""
    names = [self._listing.names[number]]
    return dataclasses.replace(self._listing, names=names)

  def _open(self, listing: Any) -> Any:
    """The images of some files; none where there is none to read."""
    from vqrae_jax.data import sources
    from vqrae_jax.data.decode import NoImageError

    try:
      return sources.open_listing(listing)
    except NoImageError as e:
      logging.warning('%s', e)
      return []

  def _images(self, number: int) -> tuple[Any, range, int | None, str]:
    """(source, which of its images, how many are before them, what they are)
    of a shard."""
    if self._of_files:
      listing = self._one(number)
      source = self._open(listing)
      first = self._firsts and self._firsts[number]
      return source, range(len(source)), first, listing.names[0]
    each = self._job.shard_images
    first = number * each
    last = min(first + each, len(self._opened))
    what = f'images {first} to {last - 1}'
    return self._opened, range(first, last), first, what

  def write(
    self, number: int, progress: Callable[[int], Any] = lambda n: None
  ) -> tuple[int, int]:
    """Encodes a shard and writes it, unless it is finished.

    Args:
      number: in [0, count).
      progress: called with the views of each batch.

    Returns:
      (images written, images skipped); of a finished one (0, 0).
    """
    if number in self.finished:
      return 0, 0
    from vqrae_jax.data.decode import ImageDecodeError
    from vqrae_jax.data.pipeline import MAX_DRAWS, eval_batches, one_ahead

    source, indices, first, what = self._images(number)
    views, skipped = Views(source, self._layout, self._side), {}

    def skip(index: int, error: ImageDecodeError) -> None:
      skipped[index] = error.reason
      logging.warning('%s is skipped: %s', source.name(index), error.reason)

    batches = eval_batches(
      views, lambda rows: rows, self._batch_size, indices, skip
    )
    rows = [np.zeros((0, *self._layout.index_shape), np.int32)]
    for part in one_ahead(self.encode, batches):
      progress(len(part))
      rows.append(part)
    least = MAX_DRAWS if self.count > 1 else 1
    if len(skipped) == len(indices) >= least:
      name, reason = source.name(indices[0]), skipped[indices[0]]
      raise UserError(
        f'none of the {len(indices)} images of shard {number} ({what}) can be '
        f'read: {name}: {reason}'
      )
    kept = [i for i in indices if i not in skipped]
    shard = Shard(
      number,
      [_key(source, i) for i in kept],
      [source.label(i) for i in kept],
      [i - indices.start for i in kept],
      [views.boxes[i] for i in kept],
      first,
    )
    why = [(_key(source, i), reason) for i, reason in sorted(skipped.items())]
    if self._of_files and not source:
      why.append((what, 'no image of it can be read'))
    elif self._of_files:
      why += [*source.damaged.items()]
    tokens = self._layout.from_rows(np.concatenate(rows))
    self._writer.write(shard, tokens, what, why)
    return len(kept), len(why)

  @property
  def _batch_size(self) -> int:
    import jax

    devices = jax.local_device_count()
    return -(-self._job.batch_size // devices) * devices

  def encode(self, images: np.ndarray) -> Any:
    """uint8 [b h w 3] -> i32[b gh gw] (or as `index_shape` says), b a multiple
    of the devices that this process has."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from vqrae_jax import inference, sharding

    if self._encode is None:
      mesh = sharding.make_mesh('dp', jax.local_devices())
      everywhere = NamedSharding(mesh, PartitionSpec())
      rows = sharding.batch_sharding(mesh)
      variables = jax.device_put(self._variables, everywhere)
      run = jax.jit(inference.encode_to_indices, static_argnums=0)

      def encode(x):
        with jax.set_mesh(mesh):  # each device searches for its own tokens
          return run(self._tokenizer, variables, jax.device_put(x, rows))

      self._encode = encode
    return self._encode(images)

  def finish(self) -> dict | None:
    """dataset.json, written if all shards are finished; else None."""
    return self._writer.finish()

  def verify(self) -> str:
    """Reads images of the finished dump and encodes and decodes them again.

    Returns:
      What was found, as a line.

    Raises:
      UserError: a shard that is damaged, or indices that are not those of the
        images.
    """
    import jax

    from vqrae_jax import inference
    from vqrae_jax.data import pipeline, sources
    from vqrae_jax.evaluate import metrics

    dump, originals, stored = Dump(self._writer.folder), [], []
    count = len(dump) // self._layout.views
    opened = None
    for image in sources.spread(count, min(_SAMPLE, count)):
      number, at = dump.place(image)
      if number != opened:
        source, indices, *_ = self._images(number)
        shard, tokens = dump.shard(number)
        opened = number
      index = indices[shard.positions[at]]
      originals.append(Views(source, self._layout, self._side)[index])
      stored.append(tokens[at])
    if not originals:
      return 'no image to verify'
    batches = pipeline.eval_batches(
      originals, lambda rows: rows, self._batch_size
    )
    images, stored = np.concatenate(originals), np.concatenate(stored)
    fresh = np.concatenate([*pipeline.one_ahead(self.encode, batches)])
    same = float((fresh == stored).mean())
    decode = jax.jit(inference.decode_from_indices, static_argnums=0)
    recons = [
      decode(self._tokenizer, self._variables, part)
      for part in np.split(stored, len(originals))
    ]
    sums = metrics.compare(np.concatenate(recons), images, len(images))
    if same < _AGREE:
      raise UserError(
        f'only {same:.1%} of the indices of {len(originals)} images in '
        f'{self._job.out} match those that the images encode to now'
      )
    return (
      f'verified {len(originals)} images: {same:.2%} of their indices match '
      f'when encoded again; PSNR {sums.results()["psnr"]:.2f} dB'
    )


def _key(source: Any, index: int) -> str:
  """The key of an image as text: bytes of its name that are no UTF-8 are
  written as escapes."""
  name = source.key(index).encode('utf-8', 'surrogateescape')
  return name.decode('utf-8', 'backslashreplace')


def _check_flags(job: Job, form: Any) -> None:
  if job.crops not in CROPS:
    raise UserError(
      f'--crops={job.crops} must be 1 (the centre) or 5 (corners and centre)'
    )
  ends = {n: getattr(job, n) for n in ('offset', 'bos', 'eod')}
  for name, value in ends.items():
    if value is None:
      continue
    if not form.sequences:
      kinds = [n for n, f in FORMATS.items() if f.sequences]
      raise UserError(
        f'--{name} is for language-model ids, but --format={job.format} '
        f'stores plain indices; formats with ids: {", ".join(kinds)}'
      )
    if value < 0:
      raise UserError(f'--{name}={value} must be an id, 0 or above')
  if job.format == 'megatron' and job.eod is None:
    raise UserError(
      '--format=megatron needs --eod, the id that ends a document: its readers '
      'split documents at that id; for example --offset=1 --eod=0'
    )


def _layout(job: Job, form: Any, tokenizer: Any) -> tuple[Layout, int]:
  """(what the indices are, the shorter side before cropping)."""
  from vqrae_jax.models import latents

  size = (job.size, job.size) if job.size else tokenizer.native_size
  shape = tokenizer.index_shape(*size)
  latents.check_grid(tokenizer.latents_spec, tokenizer.grid(*size), '--size')
  side = job.resize or int(min(size) * (_WIDER if job.crops == 5 else 1))
  if side < min(size):
    raise UserError(
      f'--resize={side} is less than the {min(size)} pixels of a crop'
    )
  offset = job.offset
  if offset is None:
    offset = int(form.sequences)  # id 0 is left for padding
  layout = Layout(
    tokenizer.codebook_size, shape, size, job.crops, job.flip, offset, job.bos,
    job.eod,
  )  # fmt: skip
  return layout, side


def _codebook(tokenizer: Any, variables: Any) -> np.ndarray | None:
  """The codes f32[K c], or [q K c] of several codes a token; None of too
  many."""
  if tokenizer.codebook_size > _LISTED:
    return None
  codes = tokenizer.apply(variables, method=lambda t: t.quantizer.all_codes())
  return np.asarray(codes, np.float32)


def share(text: str, count: int) -> range:
  """The shards that "I/N" takes of `count`: I, I + N, …

  Raises:
    UserError: no such share.
  """
  match = re.fullmatch(r'(\d+)/(\d+)', text)
  if not match or not int(match[1]) < int(match[2]):
    raise UserError(
      f'--shards={text} must be I/N, worker I of N, counted from 0: 0/4, 1/4, '
      '2/4, 3/4'
    )
  return range(int(match[1]), count, int(match[2]))


def define(values: flags.FlagValues) -> None:
  """The command's flags."""
  define_job(values)
  text = 'worker I of N, counted from 0, which takes shards I, I + N, …'
  flags.DEFINE_string('shards', '0/1', text, values)
  text = (
    'when all shards are finished, encode some images again and compare indices'
  )
  flags.DEFINE_bool('verify', False, text, values)
  cli.define_hosts(values)


def main(argv: list[str]) -> None:
  """Parses flags, writes this worker's shards, finishes the dump."""
  from tqdm import tqdm

  values = flags.FlagValues()
  define(values)
  cli.parse(values, argv, MODULE, EXAMPLE)
  job = Job.of(values)
  cli.join_hosts(values)
  import jax

  from vqrae_jax import hosts, sharding

  sharding.compile_afresh_on_cpu()
  if jax.process_count() > 1 and values.shards != '0/1':
    raise UserError(
      '--shards and --distributed each share out the shards; leave one out'
    )
  mine = values.shards
  if jax.process_count() > 1:
    mine = f'{jax.process_index()}/{jax.process_count()}'
  share(mine, 0)
  worker = Worker(job)
  numbers = share(mine, worker.count)
  done = worker.finished.intersection(numbers)
  images = lost = 0
  with tqdm(unit='view', disable=None) as bar:
    for number in numbers:
      written, skipped = worker.write(number, bar.update)
      images, lost = images + written, lost + skipped
  skipped = f' ({lost} skipped)' * bool(lost)
  before = f', {len(done)} already finished' * bool(done)
  print(
    f'{values.out}: wrote {len(numbers) - len(done)} shards of {images} images'
    f'{skipped}{before}'
  )
  dataset = worker.finish()
  if dataset is None:
    left = worker.count - len(worker.finished)
    print(f'{left} of {worker.count} shards are not finished')
  else:
    print(
      f'finished: {dataset["images"]} images, {dataset["tokens"]} tokens, '
      f'{len(dataset["skipped"])} skipped'
    )
  if values.verify and dataset is not None:
    print(worker.verify())
  hosts.wait_for_all('the end of the work')
  if dataset is not None and not dataset['images']:
    raise UserError(
      f'no image of "{values.data}" can be read; remove {values.out} before '
      'another try'
    )


def define_job(values: flags.FlagValues) -> None:
  """The flags that a `Job` has fields for."""
  keys = dict(flag_values=values)
  cli.define_tokenizer(values)
  cli.define_data(values)
  flags.DEFINE_string('out', None, "the dump's folder", **keys)
  text = f'the files to write: {", ".join(FORMATS)}'
  flags.DEFINE_string('format', 'array_record', text, **keys)
  text = (
    'side of a crop in pixels; default: the size the tokenizer was made for'
  )
  flags.DEFINE_integer('size', None, text, lower_bound=1, **keys)
  text = 'crops of an image: 1 (the centre) or 5 (corners and centre)'
  flags.DEFINE_integer('crops', 1, text, **keys)
  flags.DEFINE_bool('flip', False, 'the mirror image of each crop too', **keys)
  text = (
    'the shorter side before cropping, in pixels; default: --size, or 1.1 '
    'times that for 5 crops'
  )
  flags.DEFINE_integer('resize', None, text, lower_bound=1, **keys)
  text = 'the id of index 0; default: 1, which leaves 0 for padding'
  flags.DEFINE_integer('offset', None, text, **keys)
  flags.DEFINE_integer('bos', None, 'an id before each sequence', **keys)
  flags.DEFINE_integer('eod', None, 'an id after each sequence', **keys)
  text = 'images per shard, for data other than tars or ArrayRecord files'
  flags.DEFINE_integer('shard_images', 10_000, text, lower_bound=1, **keys)
  text = 'views at once on each host'
  flags.DEFINE_integer('batch_size', 32, text, lower_bound=1, **keys)


if __name__ == '__main__':
  cli.run(main)
