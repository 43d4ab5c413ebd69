"""Packaging of vqrae_jax; tool settings live in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(
  r"__version__ = '(.+)'", (HERE / 'vqrae_jax/__init__.py').read_text()
).group(1)

# All that the tests need beside torch, with which parity is measured.
UNIT = [
  'beartype',
  'hypothesis',
  'pytest',
  'pytest-xdist',
  'ruff',
  'scikit-image',
  'scikit-learn',
]

setup(
  name='vqrae_jax',
  version=VERSION,
  description='Images to discrete tokens and back, in JAX',
  long_description=(HERE / 'README.md').read_text(encoding='utf8'),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  python_requires='>=3.11',
  # `configs` is installed beside the package, so that
  # --config=configs/NAME.py is found without a checkout.
  packages=find_packages(include=['vqrae_jax', 'vqrae_jax.*', 'configs']),
  entry_points={'console_scripts': ['vqrae=vqrae_jax.cli:vqrae']},
  install_requires=[
    'absl-py',
    'array_record',  # data in ArrayRecord files
    'flatbuffers',  # jax.export's serialisation
    'dm-pix',  # PSNR and SSIM
    'etils',  # paths that may be in a bucket
    'filelock',  # one run a workdir
    'flax>=0.12',
    'grain>=0.2.18',
    'huggingface_hub',
    'jax>=0.10',
    'jaxtyping',  # shapes in signatures
    'ml_collections',
    'ml_dtypes',  # bfloat16 of weight files
    'numpy',
    'optax>=0.2.6',
    'orbax-checkpoint>=0.11',
    'pillow>=10',
    'pooch',  # single files of weights from the web
    'protobuf',  # tf.train.Example in ArrayRecord files
    'safetensors',
    'tensorboardX',  # scalars and pictures without tensorflow
    'tqdm',  # progress bar
    'transformers>=5',
  ],
  extras_require={
    'cpu': ['jax[cpu]'],
    'cuda12': ['jax[cuda12]'],
    'cuda13': ['jax[cuda13]'],
    'tpu': ['jax[tpu]'],
    # The photographs of `bundled:photos`, and so of the quick-start.
    'demo': ['scikit-image', 'scikit-learn'],
    'gradio': ['gradio>=6'],  # the page of `demo`
    'fast_jpeg': ['simplejpeg'],  # data.decoder="simplejpeg"
    'hdf5': ['h5py'],  # tokenize --format=hdf5
    'parquet': ['pyarrow'],  # tokenize --format=parquet
    'ray': ['ray[data]>=2.60,<2.61'],  # examples/ray_tokenize.py
    'wandb': ['wandb'],  # log.wandb
    'unit': UNIT,
    'test': [
      *UNIT,
      'diffusers>=0.42,<0.43',  # its AutoencoderRAE is a format of `convert`
      'h5py',
      'pyarrow',
      'simplejpeg',
      'torch',
      'vector-quantize-pytorch',
    ],
  },
  classifiers=[
    'Programming Language :: Python :: 3.11',
    'Programming Language :: Python :: 3.12',
    'Programming Language :: Python :: 3.13',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
  ],
)
