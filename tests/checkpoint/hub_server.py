"""A Hugging Face Hub of one process: as much of its HTTP interface as a model's way there and back takes.

`python hub_server.py` prints its port and serves until it is killed. Files are kept in memory.
"""

import base64
import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

REPOS: dict[tuple[str, str], list[dict[str, bytes]]] = {}  # name and branch -> the files after each commit


def commit_id(repo: str, branch: str) -> str:
    return hashlib.sha1(f"{repo} {branch} {len(REPOS[repo, branch])}".encode()).hexdigest()


def open_pull_request(repo: str) -> str:
    """Its branch, which has what is in the main one."""
    branch = f"refs/pr/{sum(name == repo for name, _ in REPOS)}"
    REPOS[repo, branch] = REPOS[repo, "main"][-1:]
    return branch


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def reply(self, status: int, body=None, headers=None, raw: bytes | None = None) -> None:
        content = raw if raw is not None else json.dumps(body if body is not None else {}).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if raw is None:
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def missing(self, what: str, code: str) -> None:
        self.reply(404, {"error": what}, {"X-Error-Code": code, "X-Error-Message": what})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        address = urlsplit(self.path)
        parts = [unquote(part) for part in address.path.strip("/").split("/")]
        if parts[:3] == ["api", "repos", "create"]:
            data = json.loads(body)
            repo = f"{data.get('organization') or 'me'}/{data['name']}"
            if (repo, "main") in REPOS:
                return self.reply(409, {"error": "exists", "url": f"http://{self.headers['Host']}/{repo}"})
            REPOS[repo, "main"] = [{}]
            return self.reply(200, {"url": f"http://{self.headers['Host']}/{repo}", "name": repo, "id": repo})
        if parts[1] == "validate-yaml":  # of the model card
            return self.reply(200, {"errors": [], "warnings": []})
        repo = "/".join(parts[2:4])
        if parts[4] == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            return self.reply(200, {"files": modes})
        if parts[4] == "commit":
            wanted = parse_qs(address.query).get("create_pr") == ["1"]
            branch = open_pull_request(repo) if wanted else parts[5]
            files = dict(REPOS[repo, branch][-1])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    assert line["value"]["encoding"] == "base64"
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del files[line["value"]["path"]]
            REPOS[repo, branch].append(files)
            site, sha = f"http://{self.headers['Host']}/{repo}", commit_id(repo, branch)
            done = {"success": True, "commitOid": sha, "commitUrl": f"{site}/commit/{sha}", "hookOutput": ""}
            if wanted:
                done["pullRequestUrl"] = f"{site}/discussions/{branch.rsplit('/')[-1]}"
            return self.reply(200, done)
        return self.missing(self.path, "EntryNotFound")

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        parts = [unquote(part) for part in address.path.strip("/").split("/")]
        if parts[0] == "api" and parts[1] == "whoami-v2":
            return self.reply(200, {"name": "me", "type": "user", "orgs": []})
        repo = "/".join(parts[2:4]) if parts[0] == "api" else "/".join(parts[:2])
        if (repo, "main") not in REPOS:
            return self.missing("no such repository", "RepoNotFound")
        # /api/models/OWNER/NAME/tree/REVISION, the same with `revision`, /OWNER/NAME/resolve/REVISION/PATH
        branch = next((name for name in parts[3:6] if (repo, name) in REPOS), "main")
        files, sha = REPOS[repo, branch][-1], commit_id(repo, branch)
        if parts[0] == "api" and len(parts) > 4 and parts[4] == "tree":
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in sorted(files.items())
            ]
            return self.reply(200, [] if "cursor" in parse_qs(address.query) else entries)
        if parts[0] == "api":
            siblings = [{"rfilename": path, "size": len(data)} for path, data in sorted(files.items())]
            return self.reply(200, {"id": repo, "modelId": repo, "sha": sha, "siblings": siblings, "tags": []})
        path = "/".join(parts[4:])
        if parts[2] != "resolve" or path not in files:
            return self.missing(path, "EntryNotFound")
        etag = f'"{hashlib.sha1(files[path]).hexdigest()}"'
        return self.reply(200, headers={"X-Repo-Commit": sha, "ETag": etag}, raw=files[path])

    do_HEAD = do_GET


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    print(server.server_address[1], flush=True)
    sys.stdout.flush()
    server.serve_forever()
