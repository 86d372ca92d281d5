"""Order between blocks of a grid, which the interpreter of Mosaic GPU lacks.

Semaphores in global memory, and reductions by TMA. It runs one block after the other, and takes
what the same warpgroup of an earlier block did for done. So whether a block may write where
another wrote is found out here: the other must have waited for its write, and have signalled a
semaphore that the block waited for.
"""

import collections
import dataclasses
import functools
import threading
from typing import Any

import jax
import numpy as np
from jax._src import callback
from jax._src.core import Literal
from jax._src.pallas import primitives
from jax._src.pallas.mosaic.interpret import race_detection_state
from jax._src.pallas.mosaic_gpu import primitives as gpu_primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret

_SEMAPHORES = gpu_primitives.semaphore_signal_p, gpu_primitives.semaphore_wait_p
_NEW = primitives.get_global_p, gpu_primitives.wgmma_accumulator_store_p, *_SEMAPHORES


@dataclasses.dataclass
class _Order:
  """Of one kernel: semaphores, and which writes by TMA are known to be over.

  A write is a number; a thread is a warpgroup of a block of the grid.
  """

  lock: Any = dataclasses.field(default_factory=threading.Lock)
  counts: Any = dataclasses.field(default_factory=collections.Counter)  # by semaphore
  signalled: Any = dataclasses.field(  # writes, by semaphore
      default_factory=lambda: collections.defaultdict(set))
  clocks: Any = dataclasses.field(default_factory=dict)  # likewise
  known: Any = dataclasses.field(default_factory=lambda: collections.defaultdict(set))  # by thread
  pending: Any = dataclasses.field(default_factory=lambda: collections.defaultdict(set))  # likewise
  writes: Any = dataclasses.field(  # (number, block, range), by array
      default_factory=lambda: collections.defaultdict(list))

  def write(self, thread, array, where):
    """Notes a write; whether one of another block there may still be under way."""
    with self.lock:
      number = sum(map(len, self.writes.values()))
      unknown = [
          other for other, block, there in self.writes[array]
          if block != thread[0] and other not in self.known[thread]
          and race_detection_state._ranges_overlap(where, there)]
      self.writes[array].append((number, thread[0], where))
      self.pending[thread].add(number)
      return bool(unknown)


def mend() -> None:
  """Changes the interpreter, from now on."""
  interpreter: Any = jaxpr_interpret.JaxprInterpreter
  interpreter.interpret = functools.partialmethod(_interpret, interpreter.interpret)
  for function in (_copy_smem_to_gmem, _wait_smem_to_gmem):
    name = function.__name__[1:]
    setattr(gpu_callbacks, name, functools.partial(function, getattr(gpu_callbacks, name)))


def _interpret(self, original, jaxpr, token, *args):
  """`JaxprInterpreter.interpret`, which knows no semaphores."""
  if not any(eqn.primitive in _NEW for eqn in jaxpr.eqns):
    return original(self, jaxpr, token, *args)
  values = dict(zip((*jaxpr.constvars, *jaxpr.invars), args, strict=True))
  read = lambda x: x.val if isinstance(x, Literal) else values[x]
  for eqn in jaxpr.eqns:
    if eqn.primitive is primitives.get_global_p:
      results = [np.int32(0)]
    elif eqn.primitive is gpu_primitives.wgmma_accumulator_store_p:
      accumulator, value = map(read, eqn.invars)
      token = callback.io_callback(
          _set, gpu_callbacks.TOKEN_SHAPE_DTYPE, token=token, mesh_location=self.mesh_location,
          thread=self.thread, accumulator=accumulator, value=value)
      results = [accumulator]  # unused
    elif eqn.primitive in _SEMAPHORES:
      token, results = _semaphore(self, eqn, token, [read(x) for x in eqn.invars]), []
    else:
      variables = list(dict.fromkeys(x for x in eqn.invars if not isinstance(x, Literal)))
      part = jaxpr.replace(
          constvars=[], invars=variables, outvars=eqn.outvars, eqns=[eqn],
          debug_info=jaxpr.debug_info.with_unknown_names())
      token, results = original(self, part, token, *map(read, variables))
    values.update(zip(eqn.outvars, results, strict=True))
  return token, [read(x) for x in jaxpr.outvars]


def _semaphore(self, eqn, token, args):
  _, transforms, value, *_ = jax.tree.unflatten(eqn.params["args_tree"], args)
  waits = eqn.primitive is gpu_primitives.semaphore_wait_p
  return callback.io_callback(
      _wait if waits else _signal, gpu_callbacks.TOKEN_SHAPE_DTYPE, token=token,
      mesh_location=self.mesh_location, thread=self.thread, index=jax.tree.leaves(transforms),
      value=value)


def _order() -> _Order:
  memory: Any = gpu_callbacks._get_shared_memory()  # of one kernel
  return memory.__dict__.setdefault("_order_of_blocks", _Order())


def _thread(mesh_location, thread):
  return tuple(int(x) for x in mesh_location.cluster_coords), str(thread)


@gpu_callbacks.fail_on_exception
def _set(*, token, mesh_location, thread, accumulator, value):
  memory, key = gpu_callbacks._get_shared_memory(), accumulator
  key = gpu_callbacks.HostAllocationKey.from_array(key)
  memory.store_buffer_content(
      key, memory.access(key, ()), value, thread,
      logging_info=gpu_callbacks.memory.GPULoggingInfo(mesh_location, thread, None))
  return token


@gpu_callbacks.fail_on_exception
def _signal(*, token, mesh_location, thread, index, value):
  memory = gpu_callbacks._get_shared_memory()
  order, index = _order(), tuple(map(int, index))
  with order.lock:
    order.counts[index] += int(value)
    order.signalled[index] |= order.known[_thread(mesh_location, thread)]
    if memory.detect_races:
      clock = memory.incr_clock(thread)
      order.clocks.setdefault(index, clock).update(clock)
  return token


@gpu_callbacks.fail_on_exception
def _wait(*, token, mesh_location, thread, index, value):
  memory = gpu_callbacks._get_shared_memory()
  order, index = _order(), tuple(map(int, index))
  with order.lock:
    if order.counts[index] < int(value):
      raise RuntimeError(f"waits for {int(value)} signals where blocks that began before send"
                         f" {order.counts[index]}: semaphore {index}")
    order.known[_thread(mesh_location, thread)] |= order.signalled[index]
    if index in order.clocks:
      memory.clocks[thread].update(order.clocks[index])
  return token


class _Reduction(gpu_callbacks.AsyncCopySmemToGmemTask):
  """An addition to global memory."""

  def __call__(self, tma_thread_id):
    memory: Any = gpu_callbacks._get_shared_memory()
    read = lambda key, access: memory.get_buffer_content(
        key, access, self.thread, logging_info=self.logging_info)[0]
    self.pre_read(tma_thread_id, memory)
    value = read(self.src_allocation_key, self.src_access)
    self.post_read(tma_thread_id, memory)
    memory.store_buffer_content(
        self.dst_allocation_key, self.dst_access,
        read(self.dst_allocation_key, self.dst_access) + value, self.thread,
        logging_info=self.logging_info)
    self.post_write(tma_thread_id, memory)


@gpu_callbacks.fail_on_exception
def _copy_smem_to_gmem(original, **rest):
  memory, thread = gpu_callbacks._get_shared_memory(), rest["thread"]
  of = lambda name: (
      gpu_callbacks.HostAllocationKey.from_array(rest[f"{name}_allocation_key_as_array"]),
      jax.tree.map(int, gpu_callbacks._remove_noop_transforms(rest[f"{name}_transforms"])))
  (source, source_transforms), (target, target_transforms) = of("src"), of("dst")
  where = memory.access(target, target_transforms)
  if memory.detect_races and _order().write(
      _thread(rest["mesh_location"], thread), target, where.range):
    races = gpu_callbacks.get_races()
    races.races_found = True
    if getattr(races, "on_race", "raise") == "raise":
      raise RuntimeError(f"RACE DETECTED\n  two blocks write to {target} at {where.range}")
  if rest["reduction_op"] is None:
    return original(**rest)
  if rest["reduction_op"] != "add":
    raise NotImplementedError(rest["reduction_op"])
  memory.execute_async_task(_Reduction(
      mesh_location=rest["mesh_location"], thread=thread, src_allocation_key=source,
      src_access=memory.access(source, source_transforms), dst_allocation_key=target,
      dst_access=where, source_info=rest["source_info"],
      clock=memory.incr_clock(thread) if memory.detect_races else None))
  return rest["token"]


@gpu_callbacks.fail_on_exception
def _wait_smem_to_gmem(original, **rest):
  token = original(**rest)
  if not rest["wait_read_only"] and not int(rest["n"]):
    order, thread = _order(), _thread(rest["mesh_location"], rest["thread"])
    with order.lock:
      order.known[thread] |= order.pending.pop(thread, set())
  return token
