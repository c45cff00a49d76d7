"""The console command: `prompt-tuning train | eval | infer | export | ...`."""

from collections.abc import Sequence
import difflib
import importlib
import sys

import prompt_tuning

COMMANDS = {
  'train': 'train a prompt on a frozen T5, or the T5 itself',
  'eval': "score a prompt on a task's metrics",
  'infer': 'predict for the texts of a file',
  'export': 'write what a run trained, as files',
  'compile': 'say what a run needs of devices that need not be there',
  'convert': 'write a model or a prompt in another format',
  'inspect': 'say what is in models and prompts',
  'diff': 'say how two models or prompts differ',
}


def _help() -> str:
  lines = [f'  {name:8}{text}' for name, text in COMMANDS.items()]
  return '\n'.join(
    [
      f'prompt-tuning {prompt_tuning.__version__}: soft prompts on a frozen T5',
      '',
      'Usage: prompt-tuning COMMAND --gin_file=FILE ... --gin.NAME=VALUE ...',
      '       prompt-tuning convert | inspect | diff PATH ...',
      '',
      *lines,
      '',
      'prompt-tuning COMMAND --help shows an example.',
    ]
  )


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command named first with the arguments after it.

  Returns:
    The exit code: 0, 1 (data, paths, shapes) or 2 (usage, gin).
  """
  arguments = sys.argv[1:] if arguments is None else list(arguments)
  if not arguments or arguments[0] in ('--help', '-h', 'help'):
    print(_help())
    return 0 if arguments else 2
  if arguments[0] == '--version':
    print(prompt_tuning.__version__)
    return 0
  command, *rest = arguments
  if command not in COMMANDS:
    close = difflib.get_close_matches(command, COMMANDS, n=1)
    near = f' (did you mean {close[0]}?)' if close else ''
    print(
      f'error: {command} is not a command{near}; commands are '
      f'{", ".join(COMMANDS)}',
      file=sys.stderr,
    )
    return 2
  return importlib.import_module(f'prompt_tuning.{command}').main(rest)


if __name__ == '__main__':
  sys.exit(main())
