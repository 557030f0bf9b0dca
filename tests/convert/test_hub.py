"""`export --push` against a local server with the part of the Hub's API that it uses."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Hub(ThreadingHTTPServer):
    """Accepts repositories and commits for one token."""

    token = "hf_right"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.created: list[dict] = []
        self.files: dict[str, bytes] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self.answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            request = json.loads(body)
            self.server.created.append(request)
            name = f"{request.get('organization', 'me')}/{request['name']}"
            kind = "spaces/" if request.get("type") == "space" else ""
            self.answer(200, {"url": f"{self.server.address}/{kind}{name}", "name": name})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif "/commit/" in self.path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.server.files[entry["value"]["path"]] = content
            sha = "0" * 40
            url = self.server.address + self.path.removeprefix("/api").replace("models/", "")
            url = url.replace("/commit/main", f"/commit/{sha}")
            self.answer(200, {"commitUrl": url, "commitOid": sha, "success": True})
        else:
            self.answer(200, {})

    def do_GET(self) -> None:
        self.answer(404 if "/revision/" not in self.path else 200, {"sha": "0" * 40, "id": "x"})

    def answer(self, status: int, record: dict) -> None:
        body = json.dumps(record).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", server.token)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(("kind", "repo_type"), [("hf", "model"), ("space", "space")])
def test_a_push_uploads_the_folder(run, program, hub, tmp_path, kind, repo_type) -> None:
    done = program("export", run, "--to", kind, "out", "--push", "me/model")
    assert done.code == 0, done.err
    assert "me/model" in done.out
    [created] = hub.created
    assert (created.get("type") or "model", created["name"]) == (repo_type, "model")
    folder = tmp_path / "out"
    exported = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(hub.files) == {name for name in exported if "__pycache__" not in name}
    assert hub.files["README.md"] == (folder / "README.md").read_bytes()
    assert any(name.endswith("model.safetensors") for name in hub.files)


def test_a_refused_token_keeps_the_folder(run, program, hub, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    done = program("export", run, "--to", "space", "out", "--push", "me/model")
    assert done.code == 2
    assert "hf auth login" in done.err
    assert "hf upload me/model out --repo-type space" in done.err
    assert (tmp_path / "out/app.py").is_file()


def test_a_failed_upload_keeps_the_folder_and_says_how_to_upload_it(
    run, program, hub, monkeypatch, tmp_path
) -> None:
    # Regression: an error of the Hub's client ended in a traceback.
    hub.server_close()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    done = program("export", run, "--to", "space", "out", "--push", "me/model")
    note, error = done.err.splitlines()
    assert done.code == 1
    assert note.startswith("out: ")
    assert error.startswith("error: --push me/model: the upload failed (")
    assert "out is complete and kept; to upload it: hf upload me/model out" in error
    assert (tmp_path / "out/app.py").is_file()


@pytest.mark.parametrize("name", ["model", "a/b/c", "/x", "me/my model"])
def test_the_repository_name_is_checked_first(program, tmp_path, name) -> None:
    pytest.importorskip("huggingface_hub")
    done = program("export", "run", "--to", "hf", "out", "--push", name)
    assert (done.code, f"--push {name}: " in done.err) == (2, True)
    assert not (tmp_path / "out").exists()
