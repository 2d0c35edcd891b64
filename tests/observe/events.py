"""Reads TensorBoard's event files from their formats alone (TFRecord, CRC-32C, protocol buffers), with no library of theirs."""

import struct
from pathlib import Path


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def records(content: bytes) -> list[bytes]:
    """Whole records; checks both checksums of each and that nothing is left over."""
    found, at = [], 0
    while at < len(content):
        (length,) = struct.unpack_from('<Q', content, at)
        data = content[at + 12 : at + 12 + length]
        assert struct.unpack_from('<I', content, at + 8)[0] == masked(content[at : at + 8])
        assert struct.unpack_from('<I', content, at + 12 + length)[0] == masked(data)
        found.append(data)
        at += 16 + length
    return found


def fields(message: bytes) -> list[tuple[int, bytes | int]]:
    """(field number, value) of a protocol buffer: integers of varints, else the bytes."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            value |= (message[at] & 0x7F) << shift
            shift, at = shift + 7, at + 1
            if not message[at - 1] & 0x80:
                return value, at

    found, at = [], 0
    while at < len(message):
        key, at = varint(at)
        if key & 7 == 0:
            value, at = varint(at)
        else:
            size, at = varint(at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
            value, at = message[at : at + size], at + size
        found.append((key >> 3, value))
    return found


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> [(step, value)] of all event files in the order in which TensorBoard reads them. Each says its version first."""
    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(Path(folder).glob('*tfevents*')):
        events = [dict(fields(record)) for record in records(path.read_bytes())]
        assert events[0][3] == b'brain.Event:2'  # Event.file_version
        for event in events:
            assert struct.unpack('<d', event[1])[0] > 1.7e9  # Event.wall_time
            for number, value in fields(event.get(5, b'')):  # Event.summary: repeated Value value = 1
                assert number == 1
                own = dict(fields(value))  # Value: tag = 1, simple_value = 2
                found.setdefault(own[1].decode(), []).append((event.get(2, 0), struct.unpack('<f', own[2])[0]))
    return found
