"""A study's files: Markdown, CSV, figures, and one HTML page with all of it."""

import base64
from collections.abc import Iterable, Sequence
import csv
import html
import io
import pathlib
import re

from prompt_tuning import files
from prompt_tuning.study.views import Section

_PAGE = """\
<!doctype html>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto;
  padding: 0 1rem; max-width: 72rem; color: #222; background: #fff }}
table {{ border-collapse: collapse; display: block; overflow-x: auto }}
th, td {{ padding: .2rem .8rem; border-bottom: 1px solid #ddd;
  text-align: right; white-space: nowrap }}
th:first-child, td:first-child {{ text-align: left }}
svg, img {{ max-width: 100%; height: auto }}
p {{ max-width: 48rem }}
</style>
<h1>{title}</h1>
{body}
"""


def write(
  folder: pathlib.Path, title: str, text: str, sections: Sequence[Section]
) -> list[pathlib.Path]:
  """Writes report.md, report.html, and of each section its CSV and figures.

  Args:
    folder: gets them; files of earlier reports are replaced.
    title: of the report.
    text: below it.
    sections: in their order.

  Returns:
    The files.
  """
  folder.mkdir(parents=True, exist_ok=True)
  names = _names(sections)
  written = []
  markdown, page = [f'# {title}', text], [f'<p>{html.escape(text)}</p>']
  for name, section in zip(names, sections):
    markdown += [f'## {section.title}', section.text]
    page += [f'<h2>{html.escape(section.title)}</h2>']
    page += [f'<p>{html.escape(section.text)}</p>'] if section.text else []
    if section.figure is not None:
      for ending in ('png', 'svg'):
        path = folder / f'{name}.{ending}'
        with files.replacing(path, 'wb') as file:
          section.figure.savefig(file, format=ending, dpi=120)
        written.append(path)
      markdown.append(f'![{section.title}]({name}.png)')
      page.append(_inline(folder / f'{name}.svg', section.title))
    if section.rows:
      markdown.append(markdown_table(section.header, section.rows))
      page.append(_html_table(section.header, section.rows))
      path = folder / f'{name}.csv'
      with files.replacing(path) as file:
        file.write(_csv([section.header, *section.rows]))
      written.append(path)
  for path, content in (
    (folder / 'report.md', '\n\n'.join(filter(None, markdown)) + '\n'),
    (
      folder / 'report.html',
      _PAGE.format(title=html.escape(title), body='\n'.join(page)),
    ),
  ):
    with files.replacing(path) as file:
      file.write(content)
    written.append(path)
  return written


def markdown_table(header: Sequence, rows: Iterable[Sequence]) -> str:
  """A table of Markdown, its columns as wide as what is in them."""
  titles, *lines = [
    [str(cell).replace('|', '\\|') for cell in row] for row in (header, *rows)
  ]
  widths = [max(map(len, column)) for column in zip(titles, *lines)]
  rule = ['-' * width for width in widths]
  return '\n'.join(
    '| ' + ' | '.join(c.ljust(w) for c, w in zip(row, widths)) + ' |'
    for row in [titles, rule, *lines]
  )


def _html_table(header: Sequence, rows: Iterable[Sequence]) -> str:
  def line(cells: Sequence, tag: str) -> str:
    inner = ''.join(f'<{tag}>{html.escape(str(c))}</{tag}>' for c in cells)
    return f'<tr>{inner}</tr>'

  body = '\n'.join(line(row, 'td') for row in rows)
  return f'<table>\n{line(header, "th")}\n{body}\n</table>'


def _inline(svg: pathlib.Path, title: str) -> str:
  """A figure within the page, so that the page is all there is."""
  data = base64.b64encode(svg.read_bytes()).decode()
  alt = html.escape(title, quote=True)
  return f'<img alt="{alt}" src="data:image/svg+xml;base64,{data}">'


def _csv(rows: Iterable[Sequence]) -> str:
  text = io.StringIO()
  csv.writer(text, lineterminator='\n').writerows(rows)
  return text.getvalue()


def _names(sections: Sequence[Section]) -> list[str]:
  """A file's name for each section, each once."""
  found: list[str] = []
  for section in sections:
    name = re.sub(r'[^a-z0-9]+', '_', section.title.lower()).strip('_')
    while name in found:
      name += '_'
    found.append(name)
  return found
