"""Ports of this machine for servers that are started later."""

import random
import socket
from contextlib import suppress


def free_ports(count):
    """Of 127.0.0.1: nobody listens on them, and nobody is given them who asks for any free one."""
    found = set()
    while len(found) < count:
        port = random.randrange(20_000, 32_000)  # Ray's own end below, the system's begin above
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port))
            found.add(port)
    return list(found)


def free_port():
    """One of them."""
    return free_ports(1)[0]
