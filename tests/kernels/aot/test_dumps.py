"""Every parser on recorded dumps, and on dumps that are not what they should be."""

import gzip
import pathlib
import re

import pytest

from palm_haiku.kernels.aot import child, elf, hlo, llo, ptxas, sass, targets, times
from palm_haiku.kernels.aot.errors import AotError, UnknownDump
from palm_haiku.kernels.aot.report import Report, TpuKernel
from palm_haiku.kernels.core import chips

_DATA = pathlib.Path(__file__).parent / "data"


def recorded(name):
  data = gzip.decompress((_DATA / f"{name}.gz").read_bytes())
  return data if name.endswith("executable") else data.decode()


# ---- SASS


def test_the_main_loop_of_a_hopper_matmul():
  function, = sass.parse(recorded("hopper_matmul.sass"))
  assert function.name == "anonymous_mosaic_gpu_kernel"
  main = function.main_loop
  assert (main.instructions, main.mix["HGMMA"]) == (64, 8)
  assert function.local_stores == function.local_loads == 0
  assert sum(function.mix.values()) == function.instructions


def test_sass_with_control_columns_and_spills():
  function, = sass.parse(recorded("spilling_attention.sass_ctrl"))
  assert (function.main_loop.instructions, function.main_loop.mix["HGMMA"]) == (1183, 32)
  # ptxas' report of the same kernel.
  resources = ptxas.parse((_DATA / "spilling_attention.ptxas").read_text())
  assert (function.local_stores, function.local_loads) == (736, 784)
  assert (resources.spill_stores, resources.spill_loads) == (736, 784)


def _listing(*lines):
  return "\n".join([".text.f:", *lines])


def _instruction(address, text):
  return f"        /*{address:04x}*/                   {text} ;"


def test_loops_are_natural_loops():
  work = [_instruction(16 * i, "FADD R0, R0, R1") for i in range(1, 20)]
  function, = sass.parse(_listing(
      _instruction(0, "MOV R0, RZ"), ".L_x_0:", *work,
      _instruction(0x200, "@P0 BRA `(.L_x_1)"),  # a wait, out of line
      ".L_x_2:", _instruction(0x210, "@P1 BRA `(.L_x_0)"), _instruction(0x220, "EXIT"),
      ".L_x_1:", _instruction(0x230, "NOP"), _instruction(0x240, "BRA `(.L_x_2)")))
  loop, = function.loops
  assert (loop.start, loop.instructions) == (16, 19 + 1 + 1 + 2)
  assert loop.innermost and loop.mix["FADD"] == 19
  # Without the branch back there is none.
  function, = sass.parse(_listing(_instruction(0, "MOV R0, RZ"), ".L_x_0:", *work,
                                  _instruction(0x210, "EXIT")))
  assert function.loops == ()


@pytest.mark.parametrize("opcode, kind", [
    ("HGMMA.64x128x16.F32", "HGMMA"), ("HMMA.16816.F32.BF16", "HMMA"), ("UTCHMMA", "UTCMMA"),
    ("IMAD.MOV.U32", "MOV"), ("IMAD", "INT"), ("MUFU.EX2", "MUFU"), ("STL.64", "STL"),
    ("F2FP.BF16.F32.PACK_AB", "F2F"), ("UTMALDG.4D", "TMA"), ("UIADD3", "UNIFORM"),
    ("WARPGROUP.ARRIVE", "WARPGROUP"),
    ("I2FP.F32.S32", "I2F"), ("TOMORROW", "other")])
def test_instruction_classes(opcode, kind):
  assert sass.classify(opcode) == kind


@pytest.mark.parametrize("change", [
    lambda text: "",
    lambda text: text.replace(".text.", ".code."),
    lambda text: text.replace("/*0040*/", "0040:", 1),  # another way to write addresses
    lambda text: text.replace("/*", "").replace("*/", ":")])
def test_unknown_sass_is_refused(change):
  with pytest.raises(UnknownDump):
    sass.parse(change(recorded("hopper_matmul.sass")))


# ---- ptxas


def test_ptxas_report():
  clean = ptxas.parse((_DATA / "hopper_matmul.ptxas").read_text())
  # It has a note about wgmma (C7519), but one that costs nothing.
  assert clean == ptxas.Resources(168, 0, 0, 0, 16, serialized=False)
  waiting = (_DATA / "hopper_matmul.ptxas").read_text().replace(
      "(C7519) warpgroup.arrive is injected in around line 804 by compiler to allow use of registers in",
      "(C7517) warpgroup.wait is injected in around line 1206 by compiler to allow use of registers "
      "defined by")
  assert ptxas.parse(waiting) == ptxas.Resources(168, 0, 0, 0, 16, serialized=False, waits=True)
  spilling = ptxas.parse((_DATA / "spilling_attention.ptxas").read_text())
  assert spilling == ptxas.Resources(168, 736, 784, 440, 16, serialized=True)


@pytest.mark.parametrize("change", [
    lambda text: "",
    lambda text: text.replace("registers", "regs"),
    lambda text: text.replace("bytes spill stores", "B spilled"),
    lambda text: text + text])  # two kernels: whose figures?
def test_unknown_ptxas_report_is_refused(change):
  with pytest.raises(UnknownDump):
    ptxas.parse(change((_DATA / "hopper_matmul.ptxas").read_text()))


# ---- TPU


def _loop_schedule(bundles=None, utilization=None, chip="v5e"):
  return llo.parse("loop", bundles or recorded("loop.bundles"),
                   utilization or recorded("loop.utilization"), chips.CHIPS[chip])


def test_bundles_loops_and_trips():
  schedule = _loop_schedule()
  schedule.set_runs(llo.Steps())
  kernel, grid, step, inner = list(schedule.root)
  assert [r.kind for r in schedule.root] == ["kernel", "loop", "if", "loop"]
  # 8 steps of the grid and 2 to fill and drain; the loop inside runs from 3 to 70.
  assert (grid.trips, grid.runs, step.runs, inner.trips, inner.runs) == (10, 10, 0.8, 67, 67)
  assert schedule.cycles == pytest.approx(
      kernel.bundles + 10 * grid.bundles + 8 * (step.bundles + 67 * inner.bundles))
  assert sum(r.bundles for r in schedule.root) == kernel.end == 554
  assert schedule.body is inner and not schedule.unknown
  # 256 x 256 x 256 products, 67 in each of 8 steps, on four units of 128 x 128.
  assert schedule.matmul_cycles == pytest.approx(8 * 67 * 256**3 / (4 * 128**2), rel=0.01)


def test_steps_that_are_given_count():
  def cycles(steps, text=None):
    schedule = _loop_schedule(text)
    schedule.set_runs(steps)
    return schedule.cycles, bool(schedule.unknown)

  everything, unknown = cycles(llo.Steps())
  assert not unknown
  assert cycles(llo.Steps(active=0.5))[0] < everything
  # The program's own settings are not overridden; others come from the caller.
  assert cycles(llo.Steps(inner=5, grid=3)) == (everything, False)
  dynamic = recorded("loop.bundles").replace("%s209_s17 = sadd.s32 1, ",
                                             "%s209_s17 = sadd.s32 %s7, ")
  assert cycles(llo.Steps(), dynamic)[1]
  assert cycles(llo.Steps(inner=67), dynamic) == (everything, False)
  assert cycles(llo.Steps(inner=[67]), dynamic) == (everything, False)
  assert cycles(llo.Steps(inner=[0]), dynamic)[0] < everything / 10


def test_each_guard_without_matrix_work_may_have_its_own_fraction():
  def region(kind, first, end, *parts, matrix=0, trips=None):
    slots = [0] * len(llo.SLOTS)
    slots[llo.SLOTS.index("MATMUL")] = matrix
    return llo.Region(kind, first, end, list(parts), end - first, tuple(slots), trips)

  begin, short, end = (region("if", first, first + size)
                       for first, size in ((0, 200), (200, 30), (300, 300)))
  work = region("if", 600, 900, matrix=1)
  root = region("kernel", 0, 1000, region("loop", 0, 1000, begin, short, end, work, trips=12))
  schedule = llo.Schedule("guards", root, (1,) * len(llo.SLOTS))
  for edge, want in ((0.5, [0.5, 0.5, 0.5]), ([0, 0.25], [0, 1, 0.25]), ([0.5], [0.5, 1, 1])):
    schedule.set_runs(llo.Steps(edge=edge))
    assert [r.runs for r in (begin, short, end)] == pytest.approx([w * 10 / 12 for w in want])
    assert work.runs == pytest.approx(10 / 12)


def test_a_guard_around_guards_has_a_fraction_of_its_own():
  slots = tuple(int(name == "MATMUL") for name in llo.SLOTS)
  one, other = (llo.Region("if", first, first + 100, [], 100, slots) for first in (300, 500))
  around = llo.Region("if", 200, 800, [one, other], 400, (0,) * len(llo.SLOTS))
  step = llo.Region("if", 100, 900, [around], 200, (0,) * len(llo.SLOTS))
  grid = llo.Region("loop", 0, 1000, [step], 200, (0,) * len(llo.SLOTS), 12)
  root = llo.Region("kernel", 0, 1000, [grid], 0, (0,) * len(llo.SLOTS))
  llo.Schedule("guards", root, (1,) * len(llo.SLOTS)).set_runs(
      llo.Steps(active=(0.5, 1), visited=0.25))
  assert [r.runs for r in (around, one, other)] == [0.25, 0.5, 1]
  assert step.runs == pytest.approx(10 / 12)
  around.parts = [llo.Region("if", 250, 700, [one, other], 200, (0,) * len(llo.SLOTS))]
  fits = lambda active, visited: llo.Schedule("guards", root, (1,) * len(llo.SLOTS)).set_runs(
      llo.Steps(active=active, visited=visited))
  assert not fits((0.5,), (0.25, 0.75)) and not fits((0.5, 1, 1), (0.25, 0.75))
  assert not fits((0.5, 1), (0.25,)) and not fits((0.5, 1), (0.25, 0.75, 1))
  assert fits((0.5, 1), (0.25, 0.75))
  assert [r.runs for r in (around, *around.parts, one, other)] == [0.25, 0.75, 0.5, 1]


def _spilled(text, begin="%s1705_s17", written="%s209_s17"):
  """The loop with its counter in a spill slot: read when a turn begins, written when it ends."""
  slot = "[smem:[#a_spill]]"
  for old, new in (
      ("%s1705_s17 = smov.u32 ", f"%2 = sst {slot} {begin}  ;;  %s1705_s17 = smov.u32 "),
      ("%s1462_s17 = sphi %s1705_s17, %s209_s17", f"%s1462_s17 = sld {slot}"),
      ("%p206_p6 = scmp", f"%3 = sst {slot} {written}  ;;  %p206_p6 = scmp")):
    assert text.count(old) == 1
    text = text.replace(old, new)
  return text


@pytest.mark.parametrize("change, trips", [
    (_spilled, 67),
    (lambda text: _spilled(text, begin="%s7_s7"), None),
    (lambda text: _spilled(text, written="(%p1_p1), %s209_s17"), None),
    (lambda text: _spilled(text, written="%s7_s7"), None),
    (lambda text: re.sub(r"%s209_s17 = sadd.s32 1, ", "%s209_s17 = sadd.s32 2, ", text), 34),
    (lambda text: re.sub(r"%s209_s17 = sadd.s32 1, ", "%s209_s17 = sadd.s32 %s7, ", text), None),
    (lambda text: re.sub(r"(%s209_s17), 70 /", r"\1, %s9 /", text), None),
    # The counter goes through a spill slot; then through one that is written twice.
    (lambda text: text.replace("%s209_s17 = sadd.s32 1, %s1462_s17",
                               "%s1_s1 = sld [smem:[#a_spill]]  ;;  %2 = sst [smem:[#a_spill]] "
                               "%s1462_s17  ;;  %s209_s17 = sadd.s32 1, %s1_s1"), 67),
    (lambda text: text.replace("%s209_s17 = sadd.s32 1, %s1462_s17",
                               "%s1_s1 = sld [smem:[#a_spill]]  ;;  %2 = sst [smem:[#a_spill]] "
                               "%s1462_s17  ;;  %3 = sst [smem:[#a_spill]] %s7_s7  ;;  "
                               "%s209_s17 = sadd.s32 1, %s1_s1"), None)])
def test_trips_are_found_or_unknown(change, trips):
  text = recorded("loop.bundles")
  assert change(text) != text
  schedule = _loop_schedule(change(text))
  schedule.set_runs(llo.Steps())
  inner = list(schedule.root)[3]
  assert inner.trips == trips
  assert (inner in schedule.unknown) == (trips is None)


@pytest.mark.parametrize("bundles, utilization", [
    (lambda text: "", None),
    (lambda text: text.replace("0x3 ", "0x4 ", 1), None),  # a bundle is missing
    (None, lambda text: text.replace("MATMUL", "MXU0")),
    (None, lambda text: text.replace("MATMUL, MATPUSH", "MATPUSH, MATMUL")),
    (None, lambda text: text.rstrip() + " 1\n"),
    (None, lambda text: "\n".join(text.splitlines()[:-1])),  # of another kernel
    (None, lambda text: "")])
def test_unknown_bundles_are_refused(bundles, utilization):
  with pytest.raises(UnknownDump):
    _loop_schedule(
        bundles and (bundles(recorded("loop.bundles")) or "\n"),
        utilization and (utilization(recorded("loop.utilization")) or "\n"))


def test_a_folder_without_kernels_is_refused(tmp_path):
  with pytest.raises(UnknownDump, match="dumped no"):
    llo.read(tmp_path, chips.CHIPS["v5e"])
  (tmp_path / "1-loop-66-packed-bundles-post-ra.txt").write_text(recorded("loop.bundles"))
  with pytest.raises(UnknownDump, match="no utilization"):
    llo.read(tmp_path, chips.CHIPS["v5e"])
  (tmp_path / "1-loop-69-pre-delay_hlo-static-per-bundle-utilization.txt").write_text(
      recorded("loop.utilization"))
  schedule, = llo.read(tmp_path, chips.CHIPS["v5e"])
  assert schedule.name == "loop"


# ---- HLO


@pytest.mark.parametrize("target", ["h200", "v5e"])
def test_scores_in_memory_are_found(target):
  buffers = hlo.buffers(recorded(f"scores.{target}.hlo"))
  found = hlo.square(buffers, 1920, 1920)
  assert found and all(buffer.bytes == 16 * 1920**2 * 2 for buffer in found)
  assert not hlo.square(buffers, 1792, 1792)


def test_what_is_inside_a_fusion_takes_no_memory():
  text = recorded("scores.h200.hlo")
  inside = re.search(r"%fused_computation\S* .*?\n}", text, re.DOTALL)[0]
  assert "f32[1,1920,1920,16]" in text or "1920,30720" in text
  names = {buffer.name for buffer in hlo.buffers(text)}
  assert not names & set(re.findall(r"^\s+(?:ROOT )?%(\S+) =", inside, re.MULTILINE))


@pytest.mark.parametrize("shape, flagged", [
    ((1, 16, 1920, 1920), True), ((16 * 1920, 1920), True), ((1920 * 1920,), True),
    ((2, 1920, 16, 128), False), ((1920, 4096), False), ((1920,), False), ((), False)])
def test_square_shapes(shape, flagged):
  buffer = hlo.Buffer("x", "bf16", shape, "fusion")
  assert bool(hlo.square([buffer], 1920, 1920)) == flagged


def test_padded_squares():
  buffer = hlo.Buffer("x", "f32", (8, 1024, 1024), "fusion")
  assert hlo.square([buffer], 1000, 1000)


MOVED = """HloModule jit_f

%inside (a: bf16[256,16], b: bf16[16]) -> bf16[256,16] {
  %a = bf16[256,16]{1,0} parameter(0)
  %b = bf16[16]{0} parameter(1)
  ROOT %c = bf16[256,16]{1,0} custom(%a, %b)
}

ENTRY %main (x: bf16[256,16], w: bf16[16]) -> bf16[256,16] {
  %x = bf16[256,16]{1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[16]{0} parameter(1)
  %start = (bf16[16]{0:T(256)S(1)}, bf16[16]{0}, u32[]{:S(2)}) copy-start(%w)
  %fast = bf16[16]{0:T(256)S(1)} copy-done(%start)
  %part = ((bf16[256,16]{1,0}), bf16[32,16]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:32]}
  %slice = bf16[32,16]{1,0:S(1)} slice-done(%part)
  %fused = bf16[256,16]{1,0} fusion(%x, %fast), kind=kLoop, calls=%inside
  %kernel = (bf16[256,16]{1,0}, f32[4]{0}) custom-call(%fused, %slice), custom_call_target="k", frontend_attributes={names={
}}, metadata={op_name="kernel"}
  ROOT %y = bf16[256,16]{1,0} get-tuple-element(%kernel), index=0
}
"""


def test_traffic_is_what_crosses_the_devices_memory():
  # w, a slice of x, x and the fusion's result, which the kernel reads, and its two results.
  assert hlo.traffic(MOVED) == 32 + 1024 + 2 * 8192 + 2 * 8192 + 16
  # 35 times product and addition; the loop's test; the copy of its start.
  assert hlo.traffic(LOOP) == 35 * (64 + 12) + 9 + 8


@pytest.mark.parametrize("change", [
    lambda text: "", lambda text: text.replace("ENTRY ", ""),
    lambda text: text.replace(" fusion(", " fusion ")])
def test_unknown_hlo_is_refused(change):
  with pytest.raises(UnknownDump):
    hlo.buffers(change(recorded("scores.h200.hlo")))


# ---- cubins


def test_cubins_of_an_executable():
  cubin, = elf.cubins(recorded("softmax.executable"))
  assert cubin.startswith(b"\x7fELF") and b".text." in cubin


@pytest.mark.parametrize("change", [
    lambda data: b"", lambda data: data[:200], lambda data: data[:-3000],
    lambda data: data.replace(bytes.fromhex("83af70d10d884a3f"), b"12345678")])
def test_unknown_executables_are_refused(change):
  with pytest.raises(UnknownDump):
    elf.cubins(change(recorded("softmax.executable")))


# ---- targets


def test_unknown_targets_are_named():
  with pytest.raises(AotError, match="no target is called 'h900'.*v5e:16x16"):
    targets.chip("h900")
  # A dimension of 0 would end libtpu, and with it this process, by a division.
  for target in ("v5e:big", "v5e:", "v5e:0x1", "v5e:1x0", "v5e:3", "v5e:2x2*0", "v5e:2x2*",
                 "v5e:2x2x2", "v4:2x2x1*-1", "v5e:99999999x1"):
    with pytest.raises(AotError, match="a TPU pod is written like v[54]"):
      targets.devices(target)
  with pytest.raises(AotError, match="several GPUs are CHIP:COUNT, such as h100:8; got 'a100:2x2'"):
    targets.devices("a100:2x2")
  assert len(targets.devices("v5e:8")) == len(targets.devices("h100:8")) == 8
  for chip in chips.TPUS.values():
    assert "x".join(map(str, targets.slice_shape(chip, "4"))) == chip.topology.partition(":")[2]


@pytest.mark.parametrize("target", ["h200", "v5e"])
def test_a_missing_compiler_is_named(target, monkeypatch):
  monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(AotError, match="not installed here: pip install "):
    targets.devices(target)


@pytest.mark.parametrize("name, wheel", [
    ("ptxas", "nvidia-cuda-nvcc"), ("nvdisasm", "nvidia-cuda-nvdisasm"),
    ("cuobjdump", "nvidia-cuda-cuobjdump")])
def test_a_missing_tool_is_named(name, wheel, monkeypatch):
  monkeypatch.setattr(ptxas.glob, "glob", lambda pattern: [])
  monkeypatch.setattr(ptxas.shutil, "which", lambda name: None)
  with pytest.raises(AotError, match=rf"{name} is not installed here: pip install {wheel}"):
    ptxas.tool.__wrapped__(name)


@pytest.mark.parametrize("name, flops, clock", [("v6e", 524288, 1.751e9), ("v4", 131072, 1.049e9)])
def test_peaks(name, flops, clock):
  chip = chips.CHIPS[name]
  assert chip.flops_per_cycle == flops
  assert chip.clock == pytest.approx(clock, rel=1e-3)


def test_shared_memory_belongs_to_a_name(tmp_path):
  for name, size in (("dq_1", 7), ("dkv_2", 8), ("dkv_old_4", 9), ("twice_5", 1), ("twice_6", 2)):
    (tmp_path / f"{name}.resources.txt").write_text(f"Resources(smem_scratch_bytes={size}, ...)")
  found = {name: child._scratch(tmp_path / f"{name}.ptx")
           for name in ("dq_2", "dkv_1", "dkv_old_3", "twice_5", "none_0")}
  # The numbers are of another order; where kernels of one name differ, nothing is said.
  assert found == {"dq_2": 7, "dkv_1": 8, "dkv_old_3": 9, "twice_5": None, "none_0": None}


LOOP = """HloModule jit_f

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %count = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %product.1 = f32[8]{0} fusion(%x), kind=kOutput, calls=%inside, backend_config={CONFIG}
  %one = s32[] constant(1)
  %next = s32[] add(%count, %one), metadata={op_name="add"}
  ROOT %out = (s32[], f32[8]{0}) tuple(%next, %product.1)
}

%inside (a: f32[8]) -> f32[8] {
  ROOT %a = f32[8]{0} parameter(0)
}

%condition (p.1: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[], f32[8]{0}) parameter(0)
  %limit = s32[]{:T(128)} constant(35)
  %now = s32[] get-tuple-element(%p.1), index=0
  ROOT %lt = pred[] compare(%now, %limit), direction=LT
}

ENTRY %main (arg: f32[8]) -> f32[8] {
  %arg = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %copied = s32[] copy(%zero)
  %start = (s32[], f32[8]{0}) tuple(%copied, /*index=1*/%arg)
  %loop = (s32[], f32[8]{0}) while(%start), condition=%condition, body=%body
  ROOT %result = f32[8]{0} get-tuple-element(%loop), index=1
}
""".replace("CONFIG", '"kernel_window_bounds":["80","8"],"iteration_bounds":["4","27","10"]')


def test_fusions_that_are_alike_are_one_kernel():
  twice = MOVED.replace("  %kernel =", """  %again = bf16[256,16]{1,0} fusion(%fused, %fast), kind=kLoop, calls=%inside, metadata={op="b"}
  %other = bf16[256,16]{1,0} fusion(%fused, %fast), kind=kLoop, calls=%inside, config={1}
  %kernel =""")
  assert hlo.calls_of(["fused", "kernel"], MOVED) == {"fused": 1, "kernel": 1}
  assert hlo.calls_of(["fused", "other", "kernel"], twice) == {"fused": 2, "other": 1, "kernel": 1}
  assert hlo.calls_of(["product.1"], LOOP) == {"product.1": 35}


def test_what_is_in_a_loop_runs_as_often_as_the_loop():
  calls, known = hlo.calls(LOOP)
  assert known and calls["product.1"] == 35 and calls["loop"] == calls["arg"] == 1
  assert hlo.product_steps(LOOP) == {"product.1": 10}
  calls, known = hlo.calls(LOOP.replace("constant(0)", "constant(1)"))  # a peeled first turn
  assert known and calls["product.1"] == 34
  calls, known = hlo.calls(LOOP.replace("%one = s32[] constant(1)", "%one = s32[] constant(2)"))
  assert known and calls["product.1"] == 18
  for change in (("direction=LT", "direction=NE"),
                 ("s32[]{:T(128)} constant(35)", "s32[] copy(%now)"),
                 ("%one = s32[] constant(1)", "%one = s32[] copy(%count)")):
    calls, known = hlo.calls(LOOP.replace(*change))
    assert not known and calls["product.1"] == 1


# ---- predicted times


def test_a_prediction_is_of_kinds_of_kernels_that_were_calibrated(monkeypatch):
  monkeypatch.setattr(times, "MODELS", {("v5e", "loss"): times.Model(2e9, 1e-6, 5e-6, 0.01, 0.03)})

  def predicted(name="cross_entropy_forward", calls=1, bundles=None):
    schedule = _loop_schedule(bundles)
    schedule.set_runs(llo.Steps())
    return Report("v5e", {}, (TpuKernel(name, schedule, calls),), {}, ())

  schedule = predicted().kernels[0].schedule
  expected = 5e-6 + schedule.cycles / 2e9 + 10 * 1e-6  # 8 steps, and 2 to fill and drain
  assert predicted().predicted().seconds == pytest.approx(expected)
  turns, cycles = schedule.grid
  assert turns == 10 and schedule.cycles - cycles == schedule.root.bundles
  assert predicted(calls=3).predicted().seconds == pytest.approx(3 * expected)
  assert f"{expected * 1e6:.1f} us +- 3.0%" in str(predicted())
  unknown = recorded("loop.bundles").replace("%s209_s17 = sadd.s32 1, ",
                                             "%s209_s17 = sadd.s32 %s7, ")
  for other in (predicted("attention_forward"), predicted(bundles=unknown)):
    assert other.predicted() is None and "predicted" not in str(other)
