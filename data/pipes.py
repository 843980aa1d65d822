"""Messages with large arrays through a pipe, whose bytes are copied once on either side.

`Connection.send` copies an array into its pickle, that into packets, and `recv` the packets together
again: 18 ms where this takes 2.4 ms, for a clip of 10 MB.
"""

from __future__ import annotations

import os
import pickle
from multiprocessing.connection import Connection
from typing import Any


def send(pipe: Connection, message: Any) -> None:
    """Sends what `receive` returns at the other end.

    Raises:
        pickle.PicklingError, TypeError, AttributeError: it cannot be pickled; nothing was sent.
        OSError: the other end is closed.
    """
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(message, 5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    pipe.send_bytes(pickle.dumps((head, [view.nbytes for view in views])))
    for view in views:
        while hasattr(os, "readv") and view.nbytes:
            view = view[os.write(pipe.fileno(), view) :]
        if view.nbytes:  # Windows
            pipe.send_bytes(view)


def receive(pipe: Connection) -> Any:
    """What was sent; waits for it.

    Raises:
        EOFError, OSError: the other end is closed.
        Exception: what the message raises where it is put together again.
    """
    head, sizes = pickle.loads(pipe.recv_bytes())
    buffers = [bytearray(size) for size in sizes]
    for buffer in buffers:
        view = memoryview(buffer)
        while hasattr(os, "readv") and view.nbytes:
            count = os.readv(pipe.fileno(), [view])
            if not count:
                raise EOFError
            view = view[count:]
        if view.nbytes:  # Windows
            pipe.recv_bytes_into(view)
    return pickle.loads(head, buffers=buffers)
