"""The indices of a data set on a Ray cluster: actors of Ray Data write shards.

  pip install 'vqrae_jax[ray]'
  python examples/ray_tokenize.py --tokenizer=DIR --data=DATA --out=DIR \\
    --actors=8 --gpus=1

The flags are those of `python -m vqrae_jax.tokenize`, --actors, and the
processors and GPUs of each. DIR and DATA lie where every node of the cluster
sees them. Ray starts an actor that is lost again and gives it its shard again;
a driver that is lost is started again by the same command.

Tried on a local cluster of four logical processors, where one of two actors is
killed as it writes (tests/test_ray.py); not on several nodes, nor on GPUs.
"""

from absl import flags

from vqrae_jax import cli, tokenize


class Shards:
  """An actor: {"id": numbers of shards} -> what it wrote of each."""

  def __init__(self, job: tokenize.Job):
    self._worker = tokenize.Worker(job)

  def __call__(self, batch: dict) -> dict:
    """As Ray Data calls it, with numpy columns."""
    done = [self._worker.write(int(number)) for number in batch['id']]
    images, skipped = zip(*done, strict=True)
    return dict(shard=batch['id'], images=[*images], skipped=[*skipped])


def main(argv: list[str]) -> None:
  """Parses flags, lists the shards, lets the actors write them, finishes."""
  import ray
  import ray.data

  values = flags.FlagValues()
  tokenize.define_job(values)
  flags.DEFINE_integer('actors', 2, 'workers at once', 1, None, values)
  flags.DEFINE_float('cpus', 1.0, 'processors of an actor', 0, None, values)
  flags.DEFINE_float('gpus', 0.0, 'GPUs of an actor', 0, None, values)
  flags.DEFINE_integer(
    'local', None, 'a cluster of this machine alone, of so many processors', 1,
    None, values,
  )  # fmt: skip
  example = tokenize.EXAMPLE.replace(f'-m {tokenize.MODULE}', __file__)
  cli.parse(values, argv, tokenize.MODULE, example)
  job = tokenize.Job.of(values)
  driver = tokenize.Worker(job)  # what is wrong with the job is said here
  ray.init(num_cpus=values.local)
  shards = ray.data.range(driver.count, override_num_blocks=driver.count)
  wrote = shards.map_batches(
    Shards,
    fn_constructor_args=(job,),
    batch_size=1,
    concurrency=values.actors,
    num_cpus=values.cpus,
    num_gpus=values.gpus,
  )
  images = sum(row['images'] for row in wrote.iter_rows())
  dataset = driver.finish()
  print(
    f'{job.out}: wrote {images} images now; finished with '
    f'{dataset["images"]} images, {len(dataset["skipped"])} skipped'
  )


if __name__ == '__main__':
  cli.run(main)
