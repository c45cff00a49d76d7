#!/usr/bin/env python3
"""TFDS data sets out of raw files, for machines without internet.

Reads GLUE, SuperGLUE, SQuAD, MRQA and DPR as their authors publish them (the
layouts stand in prompt_tuning/data/local_files.py) and writes TFDS data sets of
the name, config, version, features and order that TFDS itself would, so that
every program that reads them by TFDS finds them.

  scripts/prepare_data.py --local_data_dir raw \
      --tfds_data_dir ~/tensorflow_datasets
  scripts/prepare_data.py --local_data_dir raw --tfds_data_dir data \
      --data_sets glue/mrpc super_glue/boolq
"""

import argparse
import os
import pathlib
import sys

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

import numpy as np  # noqa: E402
import tensorflow_datasets as tfds  # noqa: E402

from prompt_tuning.data import local_files  # noqa: E402
from prompt_tuning.data.task import register_tasks  # noqa: E402
from prompt_tuning.errors import UserError  # noqa: E402

_LEAVES = {str: tfds.features.Text, int: np.int32, float: np.float32}


def versions() -> dict[str, list[str]]:
  """{data set: the versions that registered tasks read}."""
  import seqio

  register_tasks()
  found = {}
  for name in seqio.TaskRegistry.names():
    source = seqio.TaskRegistry.get(name).source
    if isinstance(source, seqio.TfdsDataSource):
      data_set, _, version = source.tfds_dataset.name.partition(':')
      if version not in found.setdefault(data_set, []):
        found[data_set].append(version)
  return found


def features(
  schema: local_files.Schema, labels: tuple[str, ...] = ()
) -> tfds.features.FeaturesDict:
  """TFDS's features of a schema."""
  result = {}
  for name, kind in schema.items():
    if name == 'label' and labels:
      result[name] = tfds.features.ClassLabel(names=labels)
    elif isinstance(kind, dict):
      result[name] = features(kind)
    elif isinstance(kind, list):
      result[name] = tfds.features.Sequence(_leaf(kind[0]))
    else:
      result[name] = _leaf(kind)
  return tfds.features.FeaturesDict(result)


def _leaf(kind):
  return _LEAVES[kind]() if kind is str else _LEAVES[kind]


def write(
  data_set: str, version: str, local_data_dir: str, tfds_data_dir: str
) -> str:
  """Writes one data set; returns a line that says what it holds."""
  data = local_files.DATA[data_set]
  folder = pathlib.Path(local_data_dir)
  present = data.present(folder)
  name, _, config = data_set.partition('/')
  target = pathlib.Path(tfds_data_dir).expanduser() / name / config / version
  if (target / 'dataset_info.json').exists():
    return f'{data_set}:{version} is there already'
  rows = {split: data.rows(folder, split) for split in present}
  tfds.dataset_builders.store_as_tfds_dataset(
    name=name,
    version=version,
    config=config or None,
    features=features(data.schema, data.labels),
    split_datasets={split: list(enumerate(rows[split])) for split in rows},
    data_dir=str(pathlib.Path(tfds_data_dir).expanduser()),
    description=f'Written by prompt_tuning from the raw files in {folder}.',
    # Files keep their order; TFDS alone shuffles by a hash of the keys.
    disable_shuffling=True,
  )
  counts = ', '.join(f'{split} {len(found):,}' for split, found in rows.items())
  return f'{data_set}:{version}: {counts}'


def main(argv: list[str] | None = None) -> int:
  """Parses the command line and writes the data sets whose files are there."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--local_data_dir', required=True, help='folder of the raw files')
  add('--tfds_data_dir', required=True, help='where TFDS data sets are')
  add(
    '--data_sets',
    nargs='+',
    help='such as glue/mrpc (default: all whose files are there)',
  )
  arguments = parser.parse_args(argv)
  folder = pathlib.Path(arguments.local_data_dir)
  tfds.disable_progress_bar()
  try:
    if not folder.is_dir():
      raise UserError(f'--local_data_dir {folder} is no folder')
    names = arguments.data_sets or [
      name for name, data in local_files.DATA.items() if data.present(folder)
    ]
    for name in names:
      if name not in local_files.DATA:
        raise UserError(
          f'--data_sets has {name!r}; known are '
          f'{", ".join(sorted(local_files.DATA))}'
        )
      if not local_files.DATA[name].present(folder):
        local_files.source(name, str(folder))  # says what is missing
    if not names:
      raise UserError(
        f'--local_data_dir {folder} has no file of '
        f'{", ".join(sorted(local_files.DATA))}'
      )
    known = versions()
    for name in names:
      for version in known[name]:
        print(
          write(name, version, str(folder), arguments.tfds_data_dir),
          flush=True,
        )
  except (UserError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  sys.exit(main())
