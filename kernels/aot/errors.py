"""Errors before there is a report."""


class AotError(Exception):
  """Something that the caller can act on: a wheel, a name, a program that does not compile."""


class UnknownDump(AotError):
  """A compiler's dump is not in the form that this package reads, so it reports nothing."""


def missing_wheel(what: str, wheels: str) -> AotError:
  return AotError(f"{what} is not installed here: pip install {wheels}")
