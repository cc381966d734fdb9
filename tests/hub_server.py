"""A stand-in for the Hugging Face hub on 127.0.0.1: the requests of downloads and uploads with its client."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

MODEL_ID = "CompVis/stable-diffusion-v1-4"
RENAMED = "CompVis/old-name"  # to MODEL_ID
UNKNOWN = 401, {"X-Error-Code": "RepoNotFound"}  # what the hub answers to a user who is not logged in
REFUSED = {  # owner → status and headers
    "gated": (403, {"X-Error-Code": "GatedRepo"}),
    "disabled": (403, {"X-Error-Message": "Access to this resource is disabled."}),
    "down": (503, {}),
}
TOKENS = {"hf_write": "write", "hf_read": "read"}  # of the user `user`
# Environment of a client
SETTINGS = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}

Answer = tuple[int, dict[str, str], bytes]


class Hub:
    """Serves one model repository, and repositories that a client uploads. Others are refused as on the hub."""

    commit = "1" * 40

    def __init__(self, files: dict[str, bytes]):
        self.files, self.fetched = files, []
        self.repositories = {MODEL_ID: files}
        self.private: set[str] = set()
        self.requests: list[str] = []
        self.objects: dict[str, bytes] = {}  # of large files, by their SHA-256
        self.fault: Callable[[str], Answer | None] = lambda request: None  # answers in place of the hub
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = unquote(urlsplit(self.path).path)
                hub.requests.append(f"{self.command} {path}")
                answer = hub.fault(hub.requests[-1])
                if answer is None and self.command in ("GET", "HEAD") and path != "/api/whoami-v2":
                    answer = hub.respond(path, self.command == "GET")
                token = self.headers.get("Authorization", "").removeprefix("Bearer ")
                status, headers, content = answer or hub.respond_to_user(path, data, token)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_HEAD = do_GET = do_POST = do_PUT = answer  # noqa: N815

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def respond(self, path: str, body: bool) -> Answer:
        """Status, headers and content of a request to read."""
        if RENAMED in path:
            return 307, {"Location": path.replace(RENAMED, MODEL_ID)}, b""
        match = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+)(/.*)?", path)
        name, rest = (match[1], match[2] or "") if match else ("", "")
        files = self.repositories.get(name)
        if files is None:
            owner = path.removeprefix("/api/models").split("/")[1]
            return *REFUSED.get(owner, UNKNOWN), b""
        if path.startswith("/api/") and rest in ("", "/revision/main"):
            siblings = [{"rfilename": file} for file in files]
            private = name in self.private
            return self.json(
                {"id": name, "modelId": name, "sha": self.commit, "private": private, "siblings": siblings}
            )
        if path.startswith("/api/") and rest.startswith("/tree/"):
            return self.json(
                [
                    {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for file, content in files.items()
                ]
            )
        match = re.fullmatch(rf"/resolve/(?:main|{self.commit})/(.+)", rest)
        if match and (content := files.get(match[1])) is not None:
            if body:
                self.fetched.append(match[1])
            return 200, {"X-Repo-Commit": self.commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}, content
        return 404, {"X-Error-Code": "EntryNotFound"}, b""

    def respond_to_user(self, path: str, data: bytes, token: str) -> Answer:
        """Status, headers and content of a request that needs a token, or of the transfer of a large file."""
        if path.startswith("/large/"):
            self.objects[path.removeprefix("/large/")] = data
            return 200, {}, b""
        if token not in TOKENS:
            return 401, {}, b'{"error": "Invalid credentials in Authorization header"}'
        if path == "/api/whoami-v2":
            return self.json({"type": "user", "name": "user", "auth": {"accessToken": {"role": TOKENS[token]}}})
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if TOKENS[token] == "read":
            return 403, {}, b'{"error": "You don\'t have the rights"}'
        if path == "/api/repos/create":
            wanted = json.loads(data)
            name = f"{wanted['organization']}/{wanted['name']}"
            if wanted["organization"] != "user":
                return 403, {}, b'{"error": "You don\'t have the rights to create a model under this namespace"}'
            if name in self.repositories:
                return 409, {}, json.dumps({"error": "exists", "url": f"{self.endpoint}/{name}"}).encode()
            self.repositories[name] = {}
            if wanted.get("visibility") == "private":
                self.private.add(name)
            return self.json({"url": f"{self.endpoint}/{name}", "id": name, "name": name})
        match = re.fullmatch(r"/(?:api/models/)?(user/[^/.]+)(/preupload/main|\.git/info/lfs/.*|/commit/main)", path)
        assert match, path
        files, action = self.repositories[match[1]], match[2]
        if action == "/preupload/main":
            modes = {True: "lfs", False: "regular"}
            paths = [file["path"] for file in json.loads(data)["files"]]
            infos = [{"path": p, "uploadMode": modes[p.endswith(".safetensors")], "shouldIgnore": False} for p in paths]
            return self.json({"files": infos})
        if action == "/commit/main":
            for line in data.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    content = self.objects[value["oid"]]
                    assert hashlib.sha256(content).hexdigest() == value["oid"]
                    files[value["path"]] = content
            url = f"{self.endpoint}/{match[1]}/commit/{self.commit}"
            return self.json({"success": True, "commitOid": self.commit, "commitUrl": url})
        objects = [
            {**o, "actions": {"upload": {"href": f"{self.endpoint}/large/{o['oid']}"}}}
            for o in json.loads(data)["objects"]
        ]
        return self.json({"transfer": "basic", "objects": objects})

    @staticmethod
    def json(value) -> Answer:
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
