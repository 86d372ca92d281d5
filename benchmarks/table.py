"""Tables of rows, for a terminal and for a README."""


def text(columns: dict[str, str], rows: list[dict]) -> str:
  """Aligned columns; `columns` maps a row's key to its heading."""
  cells = [list(columns.values())] + [[cell(row.get(key)) for key in columns] for row in rows]
  widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
  return "\n".join("  ".join(c.ljust(w) if i == 0 else c.rjust(w) if _numeric(cells, i) else
                             c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
                             ).rstrip() for line in cells)


def markdown(columns: dict[str, str], rows: list[dict]) -> str:
  """A GitHub table; numbers to the right."""
  cells = [[cell(row.get(key)) for key in columns] for row in rows]
  head = [list(columns.values())]
  rule = ["---:" if _numeric(head + cells, i) else "---" for i in range(len(columns))]
  return "\n".join("| " + " | ".join(line) + " |" for line in [*head, rule, *cells])


def cell(value) -> str:
  if value is None:
    return ""
  if isinstance(value, bool):
    return "yes" if value else "no"
  if isinstance(value, float):
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
  return str(value)


def _numeric(cells, column):
  return all(line[column][:1].isdigit() or not line[column] for line in cells[1:])
