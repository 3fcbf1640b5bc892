"""The page of a report in a real browser: nothing is asked for, nothing overflows, no complaint.

Needs Chromium (Debian: `apt-get install chromium`), and is skipped where there is none: what the
page holds is tested without one in test_report.py, how it is laid out can only be seen in one.
"""

import re
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from minirlhf.evaluation.report.page import page
from minirlhf.evaluation.report.record import read_run
from tests.tools.test_report import HOSTILE, write_run

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-logging=stderr", "--window-size=1300,900", "--dump-dom",
)
OF_THE_BROWSER = re.compile("(http://)?[a-z0-9.]+[.](google|googleapis|gvt1)[.]com[:/]")  # itself
WIDTHS = 375, 1280
# Opens all that is folded, and tells how wide each frame is and how much wider its content.
MEASURE = "<!doctype html><link rel=icon href=data:,>" + "".join(
    f'<iframe src="/{name}" style="width:{width}px;height:700px;border:0"></iframe>'
    for name in ("one", "many") for width in WIDTHS
) + """<script>onload = () => {
  const told = [...document.querySelectorAll("iframe")].map(frame => {
    const inside = frame.contentDocument, root = inside.documentElement
    const before = root.scrollWidth
    inside.querySelectorAll("details").forEach(part => part.open = true)
    return [frame.clientWidth, before, root.scrollWidth, inside.querySelectorAll("svg").length]
  })
  document.body.dataset.told = told.map(one => one.join(":")).join(" ")
}</script>"""


@pytest.fixture
def served():
    """serve(path -> text) -> (port, requests); it is the browser's proxy, too."""
    pages, requests = {}, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            text = pages.get(re.sub("^http://127.0.0.1:[0-9]+", "", self.path), "").encode()
            self.send_response(200 if text else 404)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_CONNECT = do_POST = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield pages, requests, server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
def test_browser_asks_for_nothing_else_and_no_width_overflows(served, tmp_path):
    pages, requests, port = served
    row = {"step": 0, "kind": "sample", "prompt": "w" * 3000, "response": HOSTILE + "长" * 3000,
           "score": 1.0, "finish_reason": "eos"}
    names = "objective/kl", "loss/a_name_so_long_that_no_telephone_has_room_for_all_of_it", HOSTILE
    lines = [{"step": k} | dict.fromkeys(names, 10.0 ** -k) for k in range(1, 9)]
    runs = [
        read_run(write_run(tmp_path / f"run-with-a-long-name-{k}", lines=lines, samples=[row],
                           data="/a/folder/" * 20, seed=k))
        for k in range(4)
    ]
    pages |= {"/": MEASURE, "/one": page(runs[:1], "zh"), "/many": page(runs)}
    address = f"http://127.0.0.1:{port}"
    done = subprocess.run(
        [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'browser'}", f"--proxy-server={address}",
         "--proxy-bypass-list=<-loopback>", f"{address}/"],
        capture_output=True, encoding="utf-8", timeout=60,
    )
    told = re.search('data-told="([^"]*)"', done.stdout)
    assert told, done.stderr[-2000:]
    sizes = [tuple(map(int, part.split(":"))) for part in told[1].split()]
    assert [size[0] for size in sizes] == 2 * [*WIDTHS]
    for width, folded, opened, pictures in sizes:
        assert max(folded, opened) <= width and pictures == len(names)
    assert "CONSOLE" not in done.stderr
    paths = {path.removeprefix(address) for path in requests if not OF_THE_BROWSER.match(path)}
    assert paths == {"/", "/one", "/many"}
