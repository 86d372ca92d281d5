"""Compile for a chip that is not here, and judge the kernels: registers, spills, static cycles.

    from palm_haiku.kernels import aot
    print(aot.report(step, *shapes, target="v6e", square=(T, S)))

or from a shell, for a function of arrays or one that returns (function, arguments):

    python -m palm_haiku.kernels.aot h200 package.module:function 'bf16[1,2048,16,128]' ...
    python -m palm_haiku.kernels.aot v6e path/to/file.py:build seq=2048
"""

from ..core.chips import Gpu, Tpu
from .build import compile
from .errors import AotError, UnknownDump
from .llo import Steps
from .report import GpuKernel, Report, TpuKernel
from .targets import chip, devices, environment

# isort: split
from .jobs import Job, job, report, run, run_all  # last: `report` is the function, not its module

__all__ = ["AotError", "Gpu", "GpuKernel", "Job", "Report", "Steps", "Tpu", "TpuKernel",
           "UnknownDump", "chip", "compile", "devices", "environment", "job", "report", "run",
           "run_all"]
