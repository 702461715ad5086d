"""The benchmark runs, and the line of its own is as slow as it says. Figures are not judged here."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from tests.bench import servers
from tests.bench.line import Line
from tests.harness import PROJECT


def test_receive_yields_figures_and_all_instances(tmp_path):
    missing = servers.missing()
    if missing and not os.environ.get("CI"):
        pytest.skip(f"peers to compare with are not installed ({', '.join(missing)}): make peers, as root on Debian")
    out = tmp_path / "out.json"
    done = subprocess.run([sys.executable, "-m", "tests.bench", "receive", "--quick", "--json", str(out), "--folder",
                           str(tmp_path)], cwd=PROJECT, capture_output=True, text=True, timeout=480, check=False)
    assert done.returncode == 0, done.stderr  # it fails when an instance did not arrive
    section = json.loads(out.read_text())["sections"][0]
    assert {run["server"] for run in section["runs"]} == set(servers.RECEIVERS)
    for run in section["runs"]:
        assert run["instances"] > 0
        assert run["seconds"] > 0
        assert run["largest"] > 0
    assert all(target["value"] >= 0 for target in section["targets"])
    assert list(tmp_path.iterdir()) == [out]  # nothing is left behind


def test_line_keeps_rate_and_delay():
    size, rate, rtt = 250_000, 8e6, 0.1
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def serve():
            connection, _ = listener.accept()
            with connection:
                left = size
                while left:
                    left -= len(connection.recv(65536))
                connection.sendall(b"!")

        server = threading.Thread(target=serve)
        server.start()
        with Line("127.0.0.1", listener.getsockname()[1], rate, rtt) as line:
            start = time.monotonic()
            with socket.create_connection(("127.0.0.1", line.port)) as client:
                client.sendall(bytes(size))
                assert client.recv(1) == b"!"
            took = time.monotonic() - start
        server.join()
    least = rtt + size * 8 / rate + rtt  # open the connection, send, hear the answer
    assert least <= took < 5 * least
    assert line.up.bytes == size
    assert line.down.bytes == 1
    assert line.down.last - line.up.first >= least - rtt - 0.01


def test_line_is_shared_also_by_connections_from_before_a_reset():
    size, rate = 250_000, 8e6
    with socket.create_server(("127.0.0.1", 0)) as listener, \
            Line("127.0.0.1", listener.getsockname()[1], rate, 0.01) as line:
        clients, servers_ = [], []
        for _ in range(2):
            clients.append(socket.create_connection(("127.0.0.1", line.port)))
            servers_.append(listener.accept()[0])
            line.reset()

        def drain(connection):
            left = size
            while left:
                left -= len(connection.recv(65536))

        threads = [threading.Thread(target=drain, args=(connection,)) for connection in servers_]
        threads += [threading.Thread(target=client.sendall, args=(bytes(size),)) for client in clients]
        start = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert time.monotonic() - start >= 2 * size * 8 / rate
        for connection in clients + servers_:
            connection.close()
