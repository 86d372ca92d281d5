"""The cubins inside a serialized XLA executable.

The executable is protocol buffers in a Riegeli file, which may lie in another Riegeli file. See
riegeli/records_file_format.md of google/riegeli and format_description.txt of google/snappy.
"""

import struct

from .errors import UnknownDump

_MAGIC = bytes.fromhex("83af70d10d884a3f")  # how every Riegeli file begins
_BLOCK = 1 << 16
_BLOCK_HEADER = 24
_CHUNK_HEADER = 40
_CUDA = 190  # e_machine


def cubins(executable: bytes) -> list[bytes]:
  """Every CUDA ELF in a serialized executable, in order.

  Raises:
    UnknownDump: the container is not of the known form.
  """
  return [elf for payload in _payloads(executable) for elf in _elfs(payload)]


def _elfs(data):
  at = 0
  while (at := data.find(b"\x7fELF", at)) >= 0:
    machine, = struct.unpack_from("<H", data, at + 18)
    program, sections = struct.unpack_from("<QQ", data, at + 32)
    program_size, programs, section_size, section_count = struct.unpack_from("<HHHH", data, at + 54)
    end = max(sections + section_size * section_count, program + program_size * programs)
    if machine == _CUDA:
      if at + end > len(data):
        raise UnknownDump("a cubin runs over the end of the executable")
      yield data[at:at + end]
    at += 4


def _payloads(data):
  for records in _chunks(data):
    if _MAGIC in records:
      yield from _payloads(records)
    else:
      yield records


def _chunks(data):
  """The records of each chunk, joined."""
  start = data.find(_MAGIC)
  if start < 0:
    raise UnknownDump("the serialized executable holds no Riegeli file")
  # Each 64 KiB block begins with a header in the middle of whatever lies there.
  data = b"".join(data[at + _BLOCK_HEADER:at + _BLOCK] for at in range(start, len(data), _BLOCK))
  at, found = 0, False
  while at + _CHUNK_HEADER <= len(data):
    size, _, kind_and_count, decoded = struct.unpack_from("<QQQQ", data, at + 8)
    kind = chr(kind_and_count & 0xFF)
    if kind not in "smprt" or max(size, decoded) >> 40:
      break  # no chunk, but what follows the file in the message around it
    chunk = data[at + _CHUNK_HEADER:at + _CHUNK_HEADER + size]
    if len(chunk) < size:
      raise UnknownDump(f"the executable ends in the middle of a chunk of {size} bytes")
    if kind == "r":
      found = True
      yield _records(chunk, decoded)
    elif kind == "t":
      raise UnknownDump("the executable's records are transposed, which is not read here")
    # Else signature, metadata or padding.
    at += _CHUNK_HEADER + size
  if not found:
    raise UnknownDump("the serialized executable holds no records")


def _records(chunk, decoded):
  compression = chunk[0]
  sizes, at = _varint(chunk, 1)
  records = chunk[at + sizes:]
  if compression == ord("s"):
    _, at = _varint(records, 0)
    records = _snappy(records[at:])
  elif compression:
    raise UnknownDump(f"the executable is compressed with {chr(compression)!r}, not with snappy")
  if len(records) != decoded:
    raise UnknownDump(f"a chunk of the executable has {len(records)} bytes, not {decoded}")
  return records


def _varint(data, at):
  value = shift = 0
  while True:
    byte = data[at]
    at += 1
    value |= (byte & 127) << shift
    shift += 7
    if byte < 128:
      return value, at


def _snappy(data):
  size, at = _varint(data, 0)
  out = bytearray()
  while at < len(data) and len(out) < size:
    tag, at = data[at], at + 1
    kind = tag & 3
    if kind == 0:  # literal
      length = tag >> 2
      if length >= 60:
        width = length - 59
        length = int.from_bytes(data[at:at + width], "little")
        at += width
      out += data[at:at + length + 1]
      at += length + 1
      continue
    if kind == 1:
      length, offset, at = (tag >> 2 & 7) + 4, tag >> 5 << 8 | data[at], at + 1
    else:
      width = 2 if kind == 2 else 4
      length, offset = (tag >> 2) + 1, int.from_bytes(data[at:at + width], "little")
      at += width
    if not 0 < offset <= len(out):
      raise UnknownDump("the executable's snappy stream is broken")
    while length:  # a copy may run into what it writes
      step = bytes(out[-offset:][:length])
      out += step
      length -= len(step)
  if len(out) != size:
    raise UnknownDump("the executable's snappy stream ends early")
  return bytes(out)
