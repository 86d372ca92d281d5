"""Checks of the kernels on the machine at hand: against XLA in float32, each with a time limit.

`palm-haiku doctor` (`command`) runs all that can run here. `train` and `generate` run those that
they are about to use when nobody has measured such a chip (`first_use`).
"""
