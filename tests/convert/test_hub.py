"""--push against a server on this machine that speaks the Hub's protocol as far as it goes."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.train.runs import build


class Hub(ThreadingHTTPServer):
    """Takes repositories and commits for one token."""

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
            asked = json.loads(body)
            self.server.created.append(asked)
            name = f"{asked.get('organization', 'me')}/{asked['name']}"
            kind = "spaces/" if asked.get("type") == "space" else ""
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
            where = self.server.address + self.path.removeprefix("/api").replace("models/", "")
            where = where.replace("/commit/main", f"/commit/{sha}")
            self.answer(200, {"commitUrl": where, "commitOid": sha, "success": True})
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


@pytest.mark.parametrize(("kind", "told"), [("hf", "model"), ("space", "space")])
def test_a_push_uploads_the_folder(config, program, hub, tmp_path, kind, told) -> None:
    build(config).fit()
    done = program("export", config.out_dir, "--to", kind, "out", "--push", "me/model")
    assert done.code == 0, done.err
    assert "me/model" in done.out
    [created] = hub.created
    assert (created.get("type") or "model", created["name"]) == (told, "model")
    folder = tmp_path / "out"
    sent = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(hub.files) == {name for name in sent if "__pycache__" not in name}
    assert hub.files["README.md"] == (folder / "README.md").read_bytes()
    assert any(name.endswith("model.safetensors") for name in hub.files)


def test_a_refused_account_is_a_plain_mistake_and_the_folder_is_kept(
    config, program, hub, monkeypatch, tmp_path
) -> None:
    build(config).fit()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    done = program("export", config.out_dir, "--to", "space", "out", "--push", "me/model")
    assert done.code == 2
    assert "hf auth login" in done.err
    assert "hf upload me/model out --repo-type space" in done.err
    assert (tmp_path / "out/app.py").is_file()


def test_without_a_network_it_says_what_is_kept_and_how_to_send_it(
    config, program, hub, monkeypatch, tmp_path
) -> None:
    # The Hub's client once raised an error of its own, which came out as a traceback.
    build(config).fit()
    hub.server_close()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    done = program("export", config.out_dir, "--to", "space", "out", "--push", "me/model")
    told, error = done.err.splitlines()
    assert done.code == 1
    assert told.startswith("out: ")
    assert error.startswith("error: --push me/model: it did not get to the Hub (")
    assert "out is whole and kept; to send it: hf upload me/model out" in error
    assert (tmp_path / "out/app.py").is_file()


@pytest.mark.parametrize("name", ["model", "a/b/c", "/x", "me/my model"])
def test_a_name_is_checked_before_anything_is_written(program, tmp_path, name) -> None:
    pytest.importorskip("huggingface_hub")
    done = program("export", "run", "--to", "hf", "out", "--push", name)
    assert (done.code, f"--push {name}: " in done.err) == (2, True)
    assert not (tmp_path / "out").exists()
