"""The indices of a data set on a Ray cluster: actors of Ray Data write shards.

  pip install 'vqrae_jax[ray]'
  python examples/ray_tokenize.py --tokenizer=DIR --data=DATA --out=DIR \\
    --actors=8 --gpus=1

The flags are those of `python -m vqrae_jax.tokenize`, plus --actors, and
--cpus and --gpus of each actor. Every node of the cluster must see DIR and
DATA. Ray restarts a lost actor and gives it its shard again; if the driver is
lost, run the same command again.

Tested on a local cluster of four logical CPUs, where one of two actors is
killed while it writes (tests/test_ray.py); not on several nodes or on GPUs.
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
  flags.DEFINE_integer('actors', 2, 'number of actors', 1, None, values)
  flags.DEFINE_float('cpus', 1.0, 'CPUs per actor', 0, None, values)
  flags.DEFINE_float('gpus', 0.0, 'GPUs per actor', 0, None, values)
  flags.DEFINE_integer(
    'local', None, 'start a cluster on this machine, with this many CPUs', 1,
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
