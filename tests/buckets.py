"""A bucket in this process: a server that speaks the part of Google Cloud Storage's JSON API that its clients use.

TensorStore (which Orbax writes by), the reader of array_record and gcsfs talk to it as to the store itself. As there,
an object is written whole, is never renamed or appended to, and a folder is only the beginning of names. The server
counts what is read of each object. `StoreFiles` is a file system of fsspec that asks the server, for machines without
gcsfs; other processes reach it by the address in the environment.
"""

import collections
import contextlib
import http.client
import http.server
import importlib.util
import itertools
import json
import os
import re
import sys
import threading
import types
import urllib.parse

import fsspec
from fsspec.registry import _registry

from uae_jax.files import buckets

ADDRESS = "STORAGE_EMULATOR_HOST"
PAGE = 1000  # entries of a listing
HERE = {}  # stores of this process by address and process


class Store:
    """Objects by bucket and name, and what was asked for."""

    def __init__(self, *names):
        self.buckets, self.objects = set(names), {}
        self.lock, self.generations = threading.Lock(), itertools.count(1_700_000_000_000_000)
        self.read = collections.Counter()  # bytes by object
        self.requests = collections.Counter()  # by kind and object
        self.refused = set()  # kinds of request that this account may not make: "read", "write", "list"
        self.sessions = {}  # uploads that are under way

    def put(self, bucket, name, data, match=None):
        with self.lock:
            there = (bucket, name) in self.objects
            if match is not None and match != (self.objects[bucket, name][1] if there else 0):
                return None
            self.objects[bucket, name] = data, next(self.generations)
            return self.meta(bucket, name)

    def meta(self, bucket, name):
        data, generation = self.objects[bucket, name]
        seconds = f"2026-01-01T00:00:00.{generation % 10**6:06d}Z"
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(len(data)),
            "generation": str(generation),
            "metageneration": "1",
            "updated": seconds,
            "timeCreated": seconds,
        }

    def names(self, bucket, prefix=""):
        with self.lock:
            return sorted(name for place, name in self.objects if place == bucket and name.startswith(prefix))

    def contents(self, bucket, prefix=""):
        """The bytes of every object below a prefix, by the rest of its name."""
        return {name[len(prefix) :]: self.objects[bucket, name][0] for name in self.names(bucket, prefix)}

    def upload_folder(self, folder, bucket, prefix):
        for file in sorted(folder.rglob("*")):
            if file.is_file() and not file.name.startswith("."):
                self.put(bucket, f"{prefix}/{file.relative_to(folder).as_posix()}", file.read_bytes())

    def forget(self):
        self.read.clear()
        self.requests.clear()


class Request:
    """One request of the JSON API, or of the XML form /BUCKET/OBJECT, and its answer: code, body and headers."""

    def __init__(self, store, command, path, headers, body):
        self.store, self.command, self.headers, self.code = store, command, headers, 0
        self.handle(urllib.parse.urlsplit(path), body)

    def answer(self, code, body=b"", headers=()):
        self.code, self.headers = code, headers
        self.body = json.dumps(body).encode() if isinstance(body, dict) else body

    def fail(self, code, message):
        self.answer(code, {"error": {"code": code, "message": message}}, [("Content-Type", "application/json")])

    def handle(self, url, body):
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        path = re.sub(r"^/(download/|upload/)?storage/v1/b/", "", url.path)
        uploads = url.path.startswith("/upload/")
        if path == url.path:
            bucket, _, name = url.path[1:].partition("/")
            query.setdefault("alt", "media")
        elif match := re.fullmatch(r"([^/]+)/o/(.+)/rewriteTo/b/([^/]+)/o/(.+)", path):
            source, target = ([urllib.parse.unquote(part) for part in match.groups()[at : at + 2]] for at in (0, 2))
            return self.copy(source, target)
        else:
            bucket, _, name = path.partition("/o")
            name = name.removeprefix("/")
        bucket, name = urllib.parse.unquote(bucket), urllib.parse.unquote(name)
        if bucket not in self.store.buckets:
            return self.fail(404, "The specified bucket does not exist.")
        if uploads or self.command == "PUT":
            return self.upload(bucket, query, body)
        if self.command == "DELETE":
            return self.delete(bucket, name)
        if name:
            return self.media(bucket, name) if query.get("alt") == "media" else self.about(bucket, name)
        if path.endswith("/o"):
            return self.list(bucket, query)
        return self.answer(200, {"kind": "storage#bucket", "name": bucket})

    def may(self, kind, name):
        self.store.requests[kind, name] += 1
        if kind in self.store.refused:
            self.fail(403, f"the account does not have storage.objects.{kind} access to the bucket")
            return False
        return True

    def about(self, bucket, name):
        if self.may("about", name):
            known = (bucket, name) in self.store.objects
            self.answer(200, self.store.meta(bucket, name)) if known else self.fail(404, f"No such object: {name}")

    def media(self, bucket, name):
        if not self.may("read", name):
            return
        if (bucket, name) not in self.store.objects:
            return self.fail(404, f"No such object: {name}")
        data, generation = self.store.objects[bucket, name]
        headers = [("x-goog-generation", str(generation)), ("ETag", f'"{generation}"'), ("x-goog-metageneration", "1")]
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            self.store.read[name] += len(data)
            return self.answer(200, data, headers)
        first, last = asked.groups()
        start = int(first) if first else max(len(data) - int(last), 0)
        stop = min(int(last) + 1, len(data)) if first and last else len(data)
        if start >= len(data):
            return self.fail(416, "the range is not satisfiable")
        self.store.read[name] += stop - start
        self.answer(206, data[start:stop], [*headers, ("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")])

    def list(self, bucket, query):
        prefix, delimiter, after = query.get("prefix", ""), query.get("delimiter", ""), query.get("pageToken", "")
        if not self.may("list", prefix):
            return
        items, prefixes, most = [], set(), int(query.get("maxResults", PAGE))
        answer = {"kind": "storage#objects"}
        for name in self.store.names(bucket, prefix):
            start, stop = query.get("startOffset", ""), query.get("endOffset", "")
            if name <= after or name < start or (stop and name >= stop):
                continue
            inner = name[len(prefix) :]
            if delimiter and delimiter in inner:
                prefixes.add(prefix + inner.split(delimiter)[0] + delimiter)
            else:
                items.append(self.store.meta(bucket, name))
            if len(items) == most:
                answer["nextPageToken"] = name
                break
        self.answer(200, answer | {"items": items, "prefixes": sorted(prefixes)})

    def upload(self, bucket, query, body):
        kind, name = query.get("uploadType"), query.get("name", "")
        if "upload_id" in query:
            return self.resume(query["upload_id"], body)
        if kind == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            _, about, data = body.split(b"--" + boundary, 3)[:3]
            split = re.compile(rb"\r?\n\r?\n")
            name = json.loads(split.split(about, 1)[1])["name"]
            body = split.split(data, 1)[1].removesuffix(b"\n").removesuffix(b"\r")
        if kind == "resumable":
            name = name or json.loads(body)["name"]
        if not self.may("write", name):
            return
        match = int(query["ifGenerationMatch"]) if "ifGenerationMatch" in query else None
        if kind == "resumable":
            session = str(len(self.store.sessions))
            self.store.sessions[session] = bucket, name, bytearray(), match
            host = self.headers["Host"]
            where = f"http://{host}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={session}"
            return self.answer(200, {}, [("Location", where)])
        self.written(self.store.put(bucket, name, body, match))

    def resume(self, session, body):
        bucket, name, data, match = self.store.sessions[session]
        data += body
        last, _, size = self.headers.get("Content-Range", "").rpartition("/")
        if size in ("*", "") and last:
            return self.answer(308, headers=[("Range", f"bytes=0-{len(data) - 1}")])
        self.written(self.store.put(bucket, name, bytes(data), match)) if not size or len(data) >= int(
            size
        ) else self.answer(308, headers=[("Range", f"bytes=0-{len(data) - 1}")])

    def written(self, meta):
        self.answer(200, meta) if meta else self.fail(412, "At least one of the pre-conditions did not hold.")

    def copy(self, source, target):
        if not self.may("write", target[1]):
            return
        if tuple(source) not in self.store.objects:
            return self.fail(404, f"No such object: {source[1]}")
        meta = self.store.put(*target, self.store.objects[tuple(source)][0])
        self.answer(200, {"kind": "storage#rewriteResponse", "done": True, "resource": meta})

    def delete(self, bucket, name):
        if self.may("write", name):
            with self.store.lock:
                found = self.store.objects.pop((bucket, name), None)
            self.answer(204) if found else self.fail(404, f"No such object: {name}")


class Handler(http.server.BaseHTTPRequestHandler):
    """Requests that come by HTTP."""

    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, *_):
        pass

    def handle_request(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self.chunk, b""))
        made = Request(self.store, self.command, self.path, self.headers, body)
        self.send_response(made.code)
        for name, value in (("Content-Length", str(len(made.body))), *made.headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(made.body)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = handle_request

    def chunk(self):
        data = self.rfile.read(int(self.rfile.readline().strip() or b"0", 16))
        self.rfile.readline()
        return data


class StoreFiles(fsspec.AbstractFileSystem):
    """fsspec's file system of the server in the environment; a store of this process is asked at once."""

    protocol = ("gs", "gcs")
    local = threading.local()

    def ask(self, method, path, data=b"", headers=None, **query):
        url = f"{path}?{urllib.parse.urlencode(query)}" if query else path
        if store := HERE.get((os.environ[ADDRESS], os.getpid())):
            made = Request(store, method, url, headers or {}, data)
            code, found = made.code, made.body
        else:
            code, found = self.ask_server(method, url, data, headers or {})
        if code == 404:
            raise FileNotFoundError(path)
        if code == 403:
            raise OSError(f"Forbidden: {path}\n{json.loads(found)['error']['message']}")
        if code == 412:
            raise FileExistsError(path)
        if code == 416:
            return b""
        assert code < 300, (code, found)
        return found

    def ask_server(self, method, url, data, headers):
        address = urllib.parse.urlsplit(os.environ[ADDRESS]).netloc
        for attempt in (0, 1):
            kept = getattr(self.local, "kept", None)
            if kept is None or kept[0] != (address, os.getpid()):
                kept = self.local.kept = (address, os.getpid()), http.client.HTTPConnection(address, timeout=60)
            try:
                kept[1].request(method, url, data, headers)
                answer = kept[1].getresponse()
                return answer.status, answer.read()
            except (http.client.HTTPException, OSError):
                self.local.kept = None
                if attempt:
                    raise
        raise AssertionError

    def place(self, path):
        bucket, _, name = self._strip_protocol(path).partition("/")
        return f"/storage/v1/b/{bucket}", urllib.parse.quote(name.rstrip("/"), safe="")

    def info(self, path, **_):
        bucket, name = self.place(path)
        if not name:
            return json.loads(self.ask("GET", bucket)) | {"size": 0, "type": "directory"}
        with contextlib.suppress(FileNotFoundError):
            return self.entry(json.loads(self.ask("GET", f"{bucket}/o/{name}")))
        if not self.listing(path, maxResults=1)[0]:
            raise FileNotFoundError(path)
        return {"name": self._strip_protocol(path).rstrip("/"), "size": 0, "type": "directory"}

    def entry(self, meta):
        return meta | {"name": f"{meta['bucket']}/{meta['name']}", "size": int(meta["size"]), "type": "file"}

    def listing(self, path, **query):
        bucket, name = self.place(path)
        prefix = urllib.parse.unquote(name)
        items, folders, token = [], [], ""
        while True:
            page = json.loads(
                self.ask("GET", f"{bucket}/o", prefix=f"{prefix}/" if prefix else "", pageToken=token, **query)
            )
            items += [self.entry(meta) for meta in page["items"]]
            folders += page["prefixes"]
            token = page.get("nextPageToken", "")
            if not token or "maxResults" in query:
                return items, folders

    def ls(self, path, detail=True, **_):
        items, folders = self.listing(path, delimiter="/")
        place = self._strip_protocol(path).partition("/")[0]
        items += [
            {"name": f"{place}/{name.rstrip('/')}", "size": 0, "type": "directory"} for name in dict.fromkeys(folders)
        ]
        if not items:
            items = [self.info(path)]
            if items[0]["type"] == "directory" and self.place(path)[1]:
                raise FileNotFoundError(path)
            items = [item for item in items if item["type"] == "file"]
        return items if detail else [item["name"] for item in items]

    def find(self, path, maxdepth=None, withdirs=False, detail=False, **_):
        items = self.listing(path)[0] or [item for item in [self.info(path)] if item["type"] == "file"]
        found = {item["name"]: item for item in items}
        return found if detail else sorted(found)

    def cat_file(self, path, start=None, end=None, **_):
        bucket, name = self.place(path)
        if start is not None and end is not None and start >= end:
            return b""
        span = {} if start is None else {"Range": f"bytes={start}-{'' if end is None else end - 1}"}
        return self.ask("GET", f"{bucket}/o/{name}", headers=span, alt="media")

    def pipe_file(self, path, value, mode="overwrite", **_):
        bucket, name = self.place(path)
        match = {"ifGenerationMatch": "0"} if mode == "create" else {}
        query = {"uploadType": "media", "name": urllib.parse.unquote(name), **match}
        self.ask("POST", f"/upload{bucket}/o", value, **query)

    def put_file(self, lpath, rpath, **_):
        with open(lpath, "rb") as file:
            self.pipe_file(rpath, file.read())

    def get_file(self, rpath, lpath, **_):
        data = self.cat_file(rpath)
        with open(lpath, "wb") as file:
            file.write(data)

    def cp_file(self, path1, path2, **_):
        (bucket, name), (other, goal) = self.place(path1), self.place(path2)
        self.ask("POST", f"{bucket}/o/{name}/rewriteTo/{other.removeprefix('/storage/v1/')}/o/{goal}")

    def rm_file(self, path):
        bucket, name = self.place(path)
        self.ask("DELETE", f"{bucket}/o/{name}")

    def mkdir(self, path, create_parents=True, **_):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def rmdir(self, path):
        pass

    def rm(self, path, recursive=False, maxdepth=None):
        for name in self.find(path) if recursive else [path]:
            self.rm_file(name)

    def _open(self, path, mode="rb", block_size=2**20, cache_type="readahead", **_):
        return StoreFile(self, path, mode, block_size, cache_type=cache_type)


class StoreFile(fsspec.spec.AbstractBufferedFile):
    def _fetch_range(self, start, end):
        return self.fs.cat_file(self.path, start, end)

    def _initiate_upload(self):
        self.parts = []

    def _upload_chunk(self, final=False):
        self.parts.append(self.buffer.getvalue())
        if final:
            self.fs.pipe_file(self.path, b"".join(self.parts))
        return True


class S3Files(StoreFiles):
    """The same objects by `s3://`."""

    protocol = ("s3", "s3a")


def _kind_of_buckets():
    """What Orbax asks before it deletes, of a package that comes with gcsfs: whether the bucket has real folders."""
    stands_in = types.ModuleType("google.cloud.storage")
    kind = types.SimpleNamespace(hierarchical_namespace_enabled=False)
    stands_in.Client = lambda: types.SimpleNamespace(get_bucket=lambda name: kind)
    return stands_in


@contextlib.contextmanager
def served(*names):
    """A store with these buckets, which `gs://` and `s3://` mean in the block."""
    store = Store(*names)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("StoreHandler", (Handler,), {"store": store}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    HERE[address, os.getpid()] = store
    own = {
        ADDRESS: address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    registered, module = dict(_registry), "google.cloud.storage"
    stands_in = _kind_of_buckets() if importlib.util.find_spec(module) is None else None
    if stands_in:
        sys.modules[module] = stands_in
    if os.environ.get("BUCKETS_BY") != "gcsfs":
        fsspec.register_implementation("gcs", StoreFiles, clobber=True)
    fsspec.register_implementation("s3", S3Files, clobber=True)
    buckets._file_system.cache_clear()
    try:
        yield store
    finally:
        buckets._file_system.cache_clear()
        if stands_in:
            del sys.modules[module]
        _registry.clear()
        _registry.update(registered)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        server.shutdown()
        server.server_close()
