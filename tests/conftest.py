"""What every test runs under: eight CPU devices and strict arithmetic."""

import os
import pathlib
import tempfile

# Before JAX is imported: tests of sharding need more than one device, and a
# machine with an accelerator must give the same numbers as one without.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
_DEVICES = '--xla_force_host_platform_device_count=8'
if 'xla_force_host_platform_device_count' not in os.environ.get(
  'XLA_FLAGS', ''
):
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_DEVICES}'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
# A program that one test has compiled is compiled for all, processes that tests
# start included.
_CACHE = tempfile.TemporaryDirectory(prefix='compiled-')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', _CACHE.name)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope='session')
def shared_dir() -> pathlib.Path:
  """The folder with the golden reference data; skips where it is absent."""
  folder = pathlib.Path(
    os.environ.get('PROMPT_TUNING_SHARED', REPOSITORY.parent / 'shared')
  )
  if not (folder / 'golden').is_dir():
    pytest.skip(
      f'no golden reference data in {folder}; PROMPT_TUNING_SHARED names its'
      ' folder'
    )
  return folder


@pytest.fixture(scope='session')
def tiny_vocabulary(tmp_path_factory) -> str:
  """Path of a SentencePiece model with T5's special ids and few pieces."""
  import sentencepiece

  folder = tmp_path_factory.mktemp('vocabulary')
  words = (
    'the film was good bad fine dull bright and i saw it twice with a friend'
    ' review text article sport sports music positive negative really so'
  ).split()
  text = folder / 'text.txt'
  text.write_text(
    '\n'.join(
      ' '.join(words[(i * k) % len(words)] for k in range(1, 9))
      for i in range(1, 60)
    )
  )
  sentencepiece.SentencePieceTrainer.train(
    input=str(text),
    model_prefix=str(folder / 'tiny'),
    vocab_size=90,
    hard_vocab_limit=False,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    minloglevel=2,
  )
  return str(folder / 'tiny.model')
