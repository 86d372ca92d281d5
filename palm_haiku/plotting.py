"""Matplotlib for pictures in files, whatever a notebook or a matplotlibrc has set."""

import contextlib
import os


@contextlib.contextmanager
def defaults():
  """Matplotlib's own settings, and its `Figure` to draw with.

  Matplotlib refuses to be imported where MPLBACKEND names a backend that is not installed, as in a
  notebook's subprocess, though no file needs that backend.
  """
  backend = os.environ.get("MPLBACKEND")
  os.environ["MPLBACKEND"] = "agg"
  try:
    import matplotlib
    from matplotlib.figure import Figure
  finally:
    os.environ.pop("MPLBACKEND")
    if backend is not None:
      os.environ["MPLBACKEND"] = backend
  with matplotlib.rc_context():
    matplotlib.rcdefaults()
    yield Figure
