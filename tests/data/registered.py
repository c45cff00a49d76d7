"""Registered tasks as seqio's objects."""

from prompt_tuning.data.task import Task


def get_task(name, **settings):
  return Task(name, {'inputs': 512, 'targets': 64}, **settings).seqio()
