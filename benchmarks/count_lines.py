"""python -m benchmarks.count_lines [FOLDER …]

Lines of code by `tokenize`: docstrings, comments and blank lines are left out.
Without folders: the package, its tests, configs and benchmarks.
"""

import ast
import io
import pathlib
import sys
import tokenize

FOLDERS = ('vqrae_jax', 'tests', 'configs', 'benchmarks')
NOT_CODE = {
  tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT,
  tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER,
}  # fmt: skip


def code_lines(text: str) -> int:
  """Lines of a module that hold code."""
  lines = set()
  for token in tokenize.generate_tokens(io.StringIO(text).readline):
    if token.type not in NOT_CODE:
      lines.update(range(token.start[0], token.end[0] + 1))
  holders = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, holders) and ast.get_docstring(node) is not None:
      docstring = node.body[0]
      lines -= set(range(docstring.lineno, docstring.end_lineno + 1))
  return len(lines)


def main(folders: list[str]) -> None:
  """Prints a row for each folder."""
  print(f'{"":<12}{"files":>6}{"code":>8}{"lines":>8}')
  for folder in folders or FOLDERS:
    texts = [p.read_text() for p in sorted(pathlib.Path(folder).rglob('*.py'))]
    code = sum(map(code_lines, texts))
    total = sum(text.count('\n') for text in texts)
    print(f'{folder:<12}{len(texts):>6}{code:>8}{total:>8}')


if __name__ == '__main__':
  main(sys.argv[1:])
