"""A hub on loopback, as the real library asks it: a repository `them/open`, and one that is gated, `them/gated`."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "1" * 40


class Handler(BaseHTTPRequestHandler):
    """Lists and gives the files of `folder`, and notes in `fetched` which were."""

    def __init__(self, folder: Path, fetched: set[str], *rest: Any) -> None:
        self.folder, self.fetched = folder, fetched
        super().__init__(*rest)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/api/models/them/open/revision/main":
            self._json({"id": "them/open", "sha": COMMIT, "siblings": [{"rfilename": p.name} for p in self._files()]})
        elif path == f"/api/models/them/open/tree/{COMMIT}":
            self._json([self._entry(p) for p in self._files()])
        elif path.startswith(f"/them/open/resolve/{COMMIT}/"):
            content = (self.folder / path.rpartition("/")[2]).read_bytes()
            if self.command == "GET":
                self.fetched.add(path.rpartition("/")[2])
            self._give(200, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT})
        elif path.startswith("/api/models/them/gated"):
            self._give(403, b"{}", {"X-Error-Code": "GatedRepo"})
        else:
            self._give(401, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def log_message(self, *words: object) -> None:
        pass

    def _files(self) -> list[Path]:
        return sorted(self.folder.iterdir())

    def _entry(self, path: Path) -> dict[str, object]:
        content = path.read_bytes()
        return {"type": "file", "path": path.name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _json(self, content: object) -> None:
        self._give(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _give(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@contextmanager
def serving(folder: Path, home: Path) -> Iterator[tuple[dict[str, str], set[str]]]:
    """What a process must have in its environment to find this hub, its cache being in `home`; and what was fetched."""
    fetched: set[str] = set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, folder, fetched))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield (
            {
                "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                "HF_HOME": str(home),
                "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "NO_PROXY": "127.0.0.1",
            },
            fetched,
        )
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
