#!/usr/bin/env python3
"""`minirlhf serve` under load: what honest clients get while others do all that clients may do.

    OMP_NUM_THREADS=1 python benchmarks/serve_load.py --model REWARD_FOLDER --seconds 60 \
        --out benchmarks/results/serve_load.json

Honest clients ask for the scores of 16 texts, again and again. Beside them are clients that send a
byte a second, clients that never read their reply, and clients that send 16 MB of another form. At
the end SIGTERM comes while requests wait. The server may open 1,024 files, as is usual; it runs on
the same machine, so its times include the clients' own work.
"""

import argparse
import http.client
import json
import os
import resource
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

HONEST, SLOW, SILENT, LARGE = 8, 1000, 4, 2
ITEMS = [{"id": i, "prompt": f"question {i}", "completion": " an answer"} for i in range(16)]
HEAD = (
    "POST /score HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\n"
    "Content-Length: {}\r\n"
)


def ask(address: str, body: bytes) -> int:
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request("POST", "/score", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status


def honest(address: str, until: float, seconds: list[float], statuses: list[int]) -> None:
    body = json.dumps({"items": ITEMS}).encode()
    while time.monotonic() < until:
        started = time.monotonic()
        try:
            statuses.append(ask(address, body))
        except OSError:
            if time.monotonic() > until - 1:  # the server has been told to stop
                return
            statuses.append(0)
        seconds.append(time.monotonic() - started)


def large(address: str, until: float) -> None:
    body = json.dumps({"texts": ["a " * 1000] * 7900}).encode()
    while time.monotonic() < until:
        with suppress(OSError):
            ask(address, body)


def hold(address: str, until: float, count: int, silent: bool) -> None:
    """Keeps connections open on which a byte comes a second, or whose reply nobody reads."""
    host, port = address.split(":")
    text = json.dumps({"messages": ["a"] * 2000})
    first = HEAD.format(address, len(text)) + ("\r\n" + text if silent else "")
    open_: list[socket.socket] = []
    while time.monotonic() < until:
        for sock in list(open_):
            try:
                sock.sendall(b"" if silent else b"X")
            except OSError:
                open_.remove(sock)
        while len(open_) < count and time.monotonic() < until:
            try:
                open_.append(socket.create_connection((host, int(port)), 5))
                open_[-1].sendall(first.encode())
            except OSError:
                break
        time.sleep(1)
    for sock in open_:
        sock.close()


def peak(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line) / 1e6


def load(model: str, duration: float) -> dict[str, float]:
    limits = (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    server = subprocess.Popen(
        [sys.executable, "-m", "minirlhf", "serve", "--model", model, "--port", "0"], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limits),
    )
    address = server.stdout.readline().split("/")[2]
    before, until = peak(server.pid), time.monotonic() + duration
    seconds: list[float] = []
    statuses: list[int] = []
    threads = [threading.Thread(target=honest, args=(address, until, seconds, statuses))
               for _ in range(HONEST)]
    threads += [threading.Thread(target=large, args=(address, until)) for _ in range(LARGE)]
    threads += [threading.Thread(target=hold, args=(address, until, count, silent))
                for count, silent in ((SLOW, False), (SILENT, True))]
    for thread in threads:
        thread.start()
    time.sleep(duration - 1)  # requests still wait
    held, started = peak(server.pid), time.monotonic()
    server.send_signal(signal.SIGTERM)
    code = server.wait(60)
    stopped = time.monotonic() - started
    for thread in threads:
        thread.join()
    answered = statuses.count(200)
    ended = sum(second > duration - 1 for second in seconds)  # none waited as long as that
    return {
        "requests answered": answered, "refused or lost": len(statuses) - answered,
        "seconds, median": statistics.median(seconds), "seconds, 99 of 100":
        statistics.quantiles(seconds, n=100)[98], "seconds, longest": max(seconds),
        "waited to the end": ended, "GB at the start": before, "GB at most": held,
        "seconds from SIGTERM to the end": stopped, "exit code": code,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--out")
    options = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, most))  # of the clients
    row = load(options.model, options.seconds)
    clients = {"honest": HONEST, "a byte a second": SLOW, "never reading": SILENT, "16 MB": LARGE}
    for name, value in row.items():
        shown = f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"
        print(f"{name:<32}{shown:>10}")
    if options.out:
        facts = {"seconds": options.seconds, "clients": clients, "cores": os.cpu_count()}
        facts["load"] = row
        Path(options.out).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
