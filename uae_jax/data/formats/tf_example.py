"""Reads and writes tf.train.Example messages without TensorFlow: the few field numbers of its protocol buffer.

Example { Features features = 1 }   Features { map<string, Feature> feature = 1 }
Feature { BytesList bytes_list = 1, FloatList float_list = 2, Int64List int64_list = 3 }
"""

from collections.abc import Iterator, Mapping

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def bytes_features(message: bytes) -> dict[str, list[bytes]]:
    """{name: values} of the features that hold bytes; those of numbers are left out.

    Raises:
      ValueError: not such a message, or one that is cut short.
    """
    found: dict[str, list[bytes]] = {}
    for features in _values(message, 1):
        for entry in _values(features, 1):
            names, values = list(_values(entry, 1)), list(_values(entry, 2))
            if not names or not values:
                continue
            listed = [item for feature in values for items in _values(feature, 1) for item in _values(items, 1)]
            if listed:
                found[names[0].decode("utf-8")] = listed
    if not found:
        raise ValueError("it is not a tf.train.Example with features of bytes")
    return found


def bytes_message(features: Mapping[str, bytes]) -> bytes:
    """The message of features with one value of bytes each, in their order; `bytes_features` reads it."""
    entries = []
    for name, value in features.items():
        feature = _field(1, _field(1, value))
        entries.append(_field(1, _field(1, name.encode("utf-8")) + _field(2, feature)))
    return _field(1, b"".join(entries))


def _field(number: int, content: bytes) -> bytes:
    """A field that holds bytes: its number and kind, the size, the content."""
    return bytes([number << 3 | BYTES]) + _varint_of(len(content)) + content


def _varint_of(value: int) -> bytes:
    """A number of at least 0 as seven bits a byte, the lowest first."""
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*digits, value])


def _values(message: bytes, wanted: int) -> Iterator[bytes]:
    """The contents of all fields of a number that hold bytes."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        if kind == BYTES:
            size, at = _varint(message, at)
        elif kind == VARINT:
            _, at = _varint(message, at)
            continue
        elif kind in (FIXED64, FIXED32):
            size = 8 if kind == FIXED64 else 4
        else:
            raise ValueError(f"it is not a tf.train.Example (field of type {kind})")
        if at + size > len(message):
            raise ValueError("it is cut short")
        if number == wanted and kind == BYTES:
            yield message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """(number, position after it) of seven bits a byte, the lowest first."""
    value = 0
    for count in range(10):
        if at + count >= len(message):
            raise ValueError("it is cut short")
        byte = message[at + count]
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value, at + count + 1
    raise ValueError("it is not a tf.train.Example (a number of more than ten bytes)")
