"""The one exception that means "the input is at fault, not the program"."""


class UserError(Exception):
  """A fault in what the user gave: a path, a name, a shape, a binding.

  The message is one line: what was required, what came, and what to do, in
  the names the user typed. The mains print it and exit with code 1; anything
  else that reaches them is a bug of ours, code 70, with its traceback in a
  file.
  """


class RestartError(UserError):
  """Nobody's fault: the run is not done, and the same command goes on.

  It was asked to stop, or another process of its job has ended. The mains exit
  with `EXIT_CODE` ("temporary failure" in sysexits.h), by which a launcher
  knows that to start all again is worth it.
  """

  EXIT_CODE = 75
