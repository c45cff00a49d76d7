"""T5's texts: from a row in TFDS's schema to inputs and targets.

Each builder takes the words that T5 puts in front of the inputs ('' for the
texts of prompt tuning, which has no task name in them) and returns a seqio
preprocessor. Texts equal those of T5's released checkpoints to the character,
spaces included: see Raffel et al. 2020, appendix D.

A label of -1 (test splits have no other) becomes '<unk>'.
"""

from collections.abc import Callable, Sequence
import functools

import numpy as np
import seqio
import tensorflow as tf

from prompt_tuning.data import objectives

Preprocessor = Callable[[tf.data.Dataset], tf.data.Dataset]

UNKNOWN = '<unk>'

# Two examples of WSC whose index does not point at the pronoun: how the text
# begins, a pattern of the pronoun's place, and what T5 puts there.
_MISPLACED_PRONOUNS = (
  (
    'The boy continued to whip the pony , and eventually the pony threw him',
    '"Good for him,"',
    '"Good for X ,"',
  ),
  (
    'When they had eventually calmed down a bit , and had gotten home, Mr. Far',
    'want to use it , but',
    'want to use X , but',
  ),
)


def fields(
  prefix: str, names: Sequence[str], labels: Sequence[str]
) -> Preprocessor:
  """'name: text' of each field in turn; the targets are the label's word.

  Names may be given another word in the text: ('hypothesis=sentence2',).
  """
  pairs = [name.rpartition('=') for name in names]

  def convert(row):
    texts = {f'{word or field}:': row[field] for word, _, field in pairs}
    return {
      'idx': row['idx'],
      'inputs': _joined(prefix, texts),
      'targets': _label(row['label'], labels),
    }

  return _map(convert)


def _joined(prefix: str, texts: dict) -> tf.Tensor:
  """'prefix name: text name: text', as T5 has it."""
  parts = [part for pair in texts.items() for part in pair]
  return tf.strings.join([prefix, *parts] if prefix else parts, separator=' ')


def _label(label, labels: Sequence[str]):
  words = tf.constant([UNKNOWN, *labels])
  return tf.gather(words, tf.cast(label, tf.int64) + 1)


_map = seqio.map_over_dataset


def stsb(prefix: str) -> Preprocessor:
  """The similarity rounded to a multiple of 0.2, half to even."""

  def convert(row):
    texts = {f'{name}:': row[name] for name in ('sentence1', 'sentence2')}
    return {
      'inputs': _joined(prefix, texts),
      'targets': tf.as_string(tf.round(row['label'] * 5) / 5, precision=1),
      'idx': row['idx'],
    }

  return _map(convert)


def multirc(prefix: str) -> Preprocessor:
  """Question, one answer and the paragraph without its HTML tags."""

  def convert(row):
    names = ('question', 'answer', 'paragraph')
    text = _joined(prefix, {f'{name}:': row[name] for name in names})
    text = tf.strings.regex_replace(text, '<br>', ' ')
    return {
      **{f'idx/{name}': row['idx'][name] for name in names},
      'inputs': tf.strings.regex_replace(text, '</?b>', ''),
      'targets': _label(row['label'], ('False', 'True')),
    }

  return _map(convert)


def record(prefix: str) -> Preprocessor:
  """An example for each of the answers, or one of '<unk>' without any."""

  def convert(row):
    passage = tf.strings.regex_replace(
      row['passage'], '([.?!"\'])\n@highlight\n', r'\1 '
    )
    passage = tf.strings.regex_replace(passage, '\n@highlight\n', '. ')
    entities = tf.strings.reduce_join(row['entities'], separator=', ')
    texts = {'query:': row['query'], 'entities:': entities, 'passage:': passage}
    answers = row['answers']
    targets = tf.cond(
      tf.size(answers) > 0, lambda: answers, lambda: tf.constant([UNKNOWN])
    )
    example = {
      'idx/passage': row['idx']['passage'],
      'idx/query': row['idx']['query'],
      'inputs': _joined(prefix, texts),
      'answers': answers,
    }
    return tf.data.Dataset.from_tensor_slices({'targets': targets}).map(
      lambda target: {**example, **target}
    )

  return lambda dataset: dataset.flat_map(convert)


def wsc(prefix: str, correct_only: bool) -> Preprocessor:
  """The text with its pronoun between stars; the referent is the target.

  Args:
    prefix: 'wsc:' in T5's texts.
    correct_only: leaves out examples whose candidate is not the referent, and
      those without a label, as training must.
  """

  def convert(row):
    blanked = _without_pronoun(row)
    text = tf.strings.regex_replace(
      blanked, ' X ', tf.strings.join([' *', row['span2_text'], '* '])
    )
    return {
      'inputs': tf.strings.join([prefix, text], ' ') if prefix else text,
      'targets': row['span1_text'],
      'label': row['label'],
      'idx': row['idx'],
    }

  def preprocess(dataset):
    if correct_only:
      dataset = dataset.filter(lambda row: tf.equal(row['label'], 1))
    return _map(convert)(dataset)

  return preprocess


def _without_pronoun(row):
  """The text of a row of WSC with an X for its pronoun."""
  text, pronoun = row['text'], row['span2_text']
  index = tf.cast(row['span2_index'], tf.int32)
  words = tf.strings.split(text, sep=' ')
  repaired, misplaced = text, tf.constant(False)
  for start, place, instead in _MISPLACED_PRONOUNS:
    found = tf.equal(tf.strings.substr(text, 0, len(start)), start)
    fixed = tf.strings.strip(tf.strings.regex_replace(text, place, instead))
    repaired = tf.where(found, fixed, repaired)
    misplaced = misplaced | found
  inside = (index > 0) & (index < tf.size(words))
  word = words[tf.clip_by_value(index, 0, tf.size(words) - 1)]
  check = tf.debugging.Assert(
    misplaced | (inside & tf.equal(word, pronoun)),
    ['span2_index must point at span2_text, and not at the first word:', text],
  )
  with tf.control_dependencies([check]):
    before = tf.strings.reduce_join(words[:index], separator=' ')
    after = tf.strings.reduce_join(words[index + 1 :], separator=' ')
  blanked = tf.strings.join([before, 'X', after], separator=' ')
  return tf.where(misplaced, repaired, blanked)


def definite_pronoun(prefix: str) -> Preprocessor:
  """As `wsc`, of sentences with two candidates: the first of the pronouns."""

  def convert(row):
    pattern = tf.strings.join([' (', row['pronoun'], r')( |\.|,)'])
    text = tf.strings.regex_replace(
      row['sentence'], pattern, r' *\1*\2', replace_global=False
    )
    return {
      'inputs': tf.strings.join([prefix, text], ' ') if prefix else text,
      'targets': row['candidates'][row['label']],
    }

  return _map(convert)


def _spaced_punctuation(text):
  """Spaces around ASCII punctuation, runs of white space made one space."""
  text = tf.strings.regex_replace(text, '([[:punct:]])', r' \1 ')
  return tf.strings.regex_replace(text, r'\s+', ' ')


def _answered(row, answers, **more):
  """Question, context and the first of the answers, punctuation spaced."""
  question = _spaced_punctuation(row['question'])
  context = _spaced_punctuation(row['context'])
  answers = _spaced_punctuation(answers)
  text = tf.strings.join(['question:', question, 'context:', context], ' ')
  return {
    'inputs': tf.strings.regex_replace(text, r'\s+', ' '),
    'targets': answers[0],
    'question': question,
    'context': context,
    'answers': answers,
    **more,
  }


@_map
def squad(row):
  """Question and context; the first answer is the target."""
  return _answered(row, row['answers']['text'], id=row['id'])


@_map
def mrqa(row):
  """As `squad`, of MRQA's schema."""
  found = _answered(row, row['answers'], idx=row['qid'])
  return {**found, 'answer': found['targets']}


def add_sentinel(
  dataset: tf.data.Dataset,
  output_features: dict[str, seqio.Feature],
  feature: str,
  number: int,
) -> tf.data.Dataset:
  """Puts <extra_id_number> in front of a feature's ids."""
  token = output_features[feature].vocabulary.vocab_size - 1 - number
  return dataset.map(
    lambda row: {**row, feature: tf.concat([[token], row[feature]], axis=0)}
  )


# Objectives of pre-training. All take tokenised documents in 'targets'.


def _noised(
  dataset: tf.data.Dataset,
  window: int,
  noise: Callable[
    [np.random.Generator, np.ndarray], tuple[np.ndarray, np.ndarray]
  ],
) -> tf.data.Dataset:
  """Inputs and targets, EOS left to seqio, made of windows by numpy code.

  Documents are joined a hundred at a time and cut into windows; what is left
  over of a hundred is dropped.
  """

  def cut(documents):
    ids = documents.flat_values
    windows = tf.size(ids) // window
    return tf.data.Dataset.from_tensor_slices(
      tf.reshape(ids[: windows * window], [windows, window])
    )

  def in_numpy(ids, seed):
    sides = noise(np.random.default_rng(seed.view(np.uint32)), ids)
    return [side.astype(np.int32) for side in sides]

  @functools.partial(seqio.map_over_dataset, num_seeds=1)
  def convert(ids, seed):
    inputs, targets = tf.numpy_function(in_numpy, [ids, seed], [tf.int32] * 2)
    return {
      'inputs': tf.ensure_shape(inputs, [None]),
      'targets': tf.ensure_shape(targets, [None]),
    }

  ids = dataset.map(lambda row: row['targets'])
  return convert(ids.ragged_batch(100).flat_map(cut))


def _spans(output_features: dict[str, seqio.Feature], rng, ids):
  """Both sides of span corruption, without EOS."""
  first_sentinel = output_features['inputs'].vocabulary.vocab_size - 1
  inputs, targets = objectives.span_corruption(rng, ids, first_sentinel)
  return inputs[:-1], targets[:-1]


def span_corruption(
  dataset: tf.data.Dataset,
  output_features: dict[str, seqio.Feature],
  sequence_length: dict[str, int],
) -> tf.data.Dataset:
  """T5's objective, noise density 0.15 and mean span 3 (Raffel et al. 2020)."""
  window = objectives.span_corruption_window(
    sequence_length['inputs'], sequence_length['targets']
  )
  return _noised(dataset, window, functools.partial(_spans, output_features))


def prefix_lm(
  dataset: tf.data.Dataset, sequence_length: dict[str, int]
) -> tf.data.Dataset:
  """T5's LM adaptation (Lester et al. 2021, section 3.1)."""
  inputs, targets = sequence_length['inputs'], sequence_length['targets']

  def noise(rng, ids):
    left, right = objectives.prefix_lm(rng, ids, inputs, targets)
    return left[:-1], right[:-1]

  return _noised(dataset, max(inputs, targets, 3) - 1, noise)


def token_deletion(
  dataset: tf.data.Dataset, sequence_length: dict[str, int]
) -> tf.data.Dataset:
  """BART's token deletion (Lewis et al. 2019): 15% of the inputs are gone."""

  def noise(rng, ids):
    return ids[rng.random(len(ids)) >= 0.15], ids

  return _noised(dataset, _whole_window(sequence_length), noise)


def text_infilling(
  dataset: tf.data.Dataset,
  output_features: dict[str, seqio.Feature],
  sequence_length: dict[str, int],
) -> tf.data.Dataset:
  """BART's text infilling with T5's sentinels: the targets are the whole."""

  def noise(rng, ids):
    return _spans(output_features, rng, ids)[0], ids

  return _noised(dataset, _whole_window(sequence_length), noise)


def _whole_window(sequence_length: dict[str, int]) -> int:
  """The longest window that fits both sides beside EOS."""
  return max(min(sequence_length['inputs'], sequence_length['targets']) - 1, 2)
