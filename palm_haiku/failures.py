"""Errors that end a command, as one line that names the way out."""

from palm_haiku import terminal

_NO_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "bad_alloc", "unable to allocate",
              "failed to allocate", "cannot allocate memory")
_LESS_MEMORY = {
    "train": "--accumulate, --remat full, or a smaller --batch-size, --seq-len or model needs "
             "less, and --mesh divides it over chips",
    "generate": "--weights int8, --cache-dtype int8, --dtype bfloat16 or a shorter --length needs "
                "less",
    "eval": "--weights int8, --dtype bfloat16, a smaller --batch-tokens or a shorter --seq-len "
            "needs less",
    "plan": "--workers 1 needs less",
}


def line(error: Exception, command: str) -> str | None:
  """The fault and the way out, for errors that a command's caller can mend.

  Args:
    error: that ended the command.
    command: its name.

  Returns:
    One line, or None for what may be a mistake of this project: its traceback tells more.
  """
  import jax

  from palm_haiku.checkpoint import CheckpointError
  from palm_haiku.distributed import StartError
  from palm_haiku.kernels.aot import AotError
  from palm_haiku.plan import PlanError

  text = terminal.one_line(error)
  if isinstance(error, (MemoryError, RuntimeError, OSError)) and (
      isinstance(error, MemoryError) or any(sign.lower() in text.lower() for sign in _NO_MEMORY)):
    way = _LESS_MEMORY.get(command, "it needs a machine with more")
    return f"out of memory ({text[:200] or 'Python has none left'}): {way}"
  if isinstance(error, OSError) and error.strerror and error.filename is not None:
    return f"{error.filename}: {error.strerror}"
  if isinstance(error, (ValueError, OSError, FloatingPointError, CheckpointError, StartError,
                        PlanError, AotError)):
    return text
  if isinstance(error, OverflowError):
    return f"a number is too large: {text}"
  if isinstance(error, jax.errors.JaxRuntimeError):
    return text[:300]
  if isinstance(error, ImportError):
    return f"{text}; a package that this needs is missing or broken"
  return None
