"""Ports that stay free from their choice until they are used."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tidegate.stack import ports
from tidegate.stack.ports import free_ports

pytestmark = pytest.mark.integration


def test_a_free_port_is_given_to_no_client_and_no_later_call():
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    found = [port for _ in range(20) for port in free_ports(5)]
    assert len(set(found)) == 100
    assert not [port for port in found if low <= port <= high], "any client's socket may have these"


def test_a_port_in_use_is_left_out(monkeypatch: pytest.MonkeyPatch):
    (port,) = free_ports(1)
    monkeypatch.setattr(ports, "_ports", iter([port, *free_ports(2)]))
    with socket.create_server(("127.0.0.1", port)):
        assert port not in free_ports(2)


def test_processes_that_start_together_choose_different_ports():
    code = "from tidegate.stack.ports import free_ports; print(*free_ports(200))"
    begun = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    found = [port for each in begun for port in each.communicate()[0].split()]
    assert len(found) == len(set(found)) == 800
