"""A stand-in of the Hugging Face hub on this machine: what its client asks of
it to make a repository, to commit and to download, kept in memory."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator

LARGE = '.safetensors'  # stored as LFS objects, as the hub does


class Handler(http.server.BaseHTTPRequestHandler):
  def log_message(self, *_):
    pass

  def answer(self, code: int, body=b'', **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    self.send_response(code)
    for name, value in headers.items():
      self.send_header(name.replace('_', '-'), value)
    self.send_header('Content-Length', str(len(data)))
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(data)

  def missing(self, what: str):
    self.answer(404, {'error': what}, X_Error_Code=what)

  def body(self) -> bytes:
    return self.rfile.read(int(self.headers['Content-Length'] or 0))

  def commit_of(self, repo: str, revision: str) -> str | None:
    """The SHA that a branch, tag or SHA is; None after an answer of 404."""
    commits = self.server.repos.get(repo)
    if commits is None:
      self.missing('RepoNotFound')
      return None
    found = [*commits][-1] if revision == 'main' else revision
    if found not in commits:
      self.missing('RevisionNotFound')
      return None
    return found

  def do_GET(self):
    self.server.asked.append(f'{self.command} {self.path}')
    path = self.path.partition('?')[0]
    if match := re.fullmatch(r'/api/models/([^/]+/[^/]+)(?:/(.*))?', path):
      repo, rest = match.groups()
      kind, _, revision = (rest or 'revision/main').partition('/')
      if sha := self.commit_of(repo, revision or 'main'):
        files = self.server.repos[repo][sha]
        if kind == 'tree':
          self.answer(200, [entry(n, data) for n, data in files.items()])
        else:
          siblings = [{'rfilename': n} for n in files]
          self.answer(200, dict(id=repo, sha=sha, siblings=siblings))
    elif match := re.fullmatch(r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', path):
      repo, revision, name = match.groups()
      if sha := self.commit_of(repo, revision):
        if name not in (files := self.server.repos[repo][sha]):
          return self.missing('EntryNotFound')
        etag = f'"{hashlib.sha256(files[name]).hexdigest()}"'
        self.answer(200, files[name], ETag=etag, X_Repo_Commit=sha)
    else:
      self.missing('EntryNotFound')

  do_HEAD = do_GET

  def do_PUT(self):
    data = self.body()
    self.server.objects[hashlib.sha256(data).hexdigest()] = data
    self.answer(200)

  def do_POST(self):
    self.server.asked.append(f'{self.command} {self.path}')
    path, body = self.path.partition('?')[0], self.body()
    repos = self.server.repos
    if path == '/api/validate-yaml':
      return self.answer(200, dict(errors=[], warnings=[]))
    if path == '/api/repos/create':
      given = json.loads(body)
      repo = f'{given["organization"]}/{given["name"]}'
      if self.headers['Authorization'] != 'Bearer hf_owner':
        return self.answer(401, {'error': 'Invalid credentials'})
      code = 409 if repo in repos else 200
      repos.setdefault(repo, {'0' * 40: {'.gitattributes': b''}})
      self.server.private[repo] = given.get('visibility') == 'private'
      return self.answer(code, dict(url=f'{self.server.url}/{repo}'))
    if match := re.fullmatch(r'/api/models/(.+)/preupload/main', path):
      return self.answer(200, dict(files=[
        dict(path=f['path'], shouldIgnore=False,
             uploadMode='lfs' if f['path'].endswith(LARGE) else 'regular')
        for f in json.loads(body)['files']
      ]))  # fmt: skip
    if path.endswith('.git/info/lfs/objects/batch'):
      return self.answer(200, dict(objects=[
        dict(oid=x['oid'], size=x['size'], actions=dict(
          upload=dict(href=f'{self.server.url}/put/{x["oid"]}')))
        for x in json.loads(body)['objects']
      ]))  # fmt: skip
    if match := re.fullmatch(r'/api/models/(.+)/commit/main', path):
      files = dict([*repos[match[1]].values()][-1])
      for line in map(json.loads, body.splitlines()):
        value = line['value']
        if line['key'] == 'file':
          files[value['path']] = base64.b64decode(value['content'])
        elif line['key'] == 'lfsFile':
          files[value['path']] = self.server.objects[value['oid']]
      sha = hashlib.sha1(body).hexdigest()
      repos[match[1]][sha] = files
      url = f'{self.server.url}/{match[1]}/commit/{sha}'
      return self.answer(200, dict(commitUrl=url, commitOid=sha))
    self.missing('EntryNotFound')


def entry(name: str, data: bytes) -> dict:
  return dict(
    type='file', path=name, size=len(data), oid=hashlib.sha1(data).hexdigest()
  )


@contextlib.contextmanager
def serving() -> Iterator[http.server.ThreadingHTTPServer]:
  """The hub; `url` is its own, `repos` {ORG/NAME: {commit: {file: bytes}}},
  the last commit "main", `asked` what was. "hf_owner" may write."""
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
    server.repos, server.objects, server.private = {}, {}, {}
    server.asked = []
    server.url = f'http://127.0.0.1:{server.server_address[1]}'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
