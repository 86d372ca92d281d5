"""Compiles a training step for a machine that is not here, and estimates how fast it would be.

    from palm_haiku import plan
    plan.plan(config, plan.Machine("v5p:4x4x4"))

The compiler runs in a process of its own (`palm_haiku.plan.child`), so that one that dies or runs
out of memory leaves a reason and takes nothing with it.
"""

from palm_haiku.plan.estimate import estimate, plan
from palm_haiku.plan.machine import Machine, PlanError, check
from palm_haiku.plan.sweep import Candidate, candidates, rank, sweep

__all__ = ["Candidate", "Machine", "PlanError", "candidates", "check", "estimate", "plan", "rank",
           "sweep"]
