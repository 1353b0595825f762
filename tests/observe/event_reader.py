"""Event files as TensorBoard shows them: in the order of their names, without the steps that a later file purges."""

import struct
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyrefly: ignore[missing-module-attribute] - made at import
from tensorboardX.record_writer import masked_crc32c


def shown(folder: Path) -> dict[tuple[str, int], float]:
    """(tag, step) → value; fails if a step of a tag is shown twice, or a checksum is wrong."""
    values: dict[tuple[str, int], float] = {}
    for file in sorted(folder.glob("events.out.tfevents.*")):
        data, position = file.read_bytes(), 0
        while position < len(data):
            (length,) = struct.unpack_from("<Q", data, position)
            record = data[position + 12 : position + 12 + length]
            for part, at in ((data[position : position + 8], position + 8), (record, position + 12 + length)):
                assert struct.unpack_from("<I", data, at) == (masked_crc32c(part),)
            position += 16 + length
            event = Event.FromString(record)
            if event.session_log.status == SessionLog.START:
                values = {key: value for key, value in values.items() if key[1] < event.step}
            for value in event.summary.value:
                assert (value.tag, event.step) not in values, f"{value.tag} of step {event.step} is there twice"
                values[value.tag, event.step] = value.simple_value
    return values
