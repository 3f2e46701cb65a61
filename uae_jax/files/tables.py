"""Tables in the form of VLMEvalKit: quoted TSV, and .xlsx of one sheet, without pandas."""

import csv
import datetime
import io
import pathlib
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from uae_jax.files.whole import write_bytes

# texts that pandas reads as missing; VLMEvalKit leaves out such options and hints
MISSING = frozenset(
    (
        "",
        "#N/A",
        "#N/A N/A",
        "#NA",
        "-1.#IND",
        "-1.#QNAN",
        "-NaN",
        "-nan",
        "1.#IND",
        "1.#QNAN",
        "<NA>",
        "N/A",
        "NA",
        "NULL",
        "NaN",
        "None",
        "n/a",
        "nan",
        "null",
    )
)
LONGEST_FIELD = 2**31 - 1  # characters; a field may hold an image as base64 text
LONGEST_CELL = 32767  # characters of a workbook's cell
FIRST_DAY = datetime.datetime(1980, 1, 1)  # with a fixed date, equal tables are equal files
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")

Line = dict[str, str]


def read_tsv(path: pathlib.Path) -> Iterator[Line]:
    """Yields the rows of a TSV with a header as {column: text}.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no rows, or a row whose number of fields differs from the header (named by number; the header is 1).
    """
    if not path.is_file():
        raise FileNotFoundError(f"table {path} does not exist")
    csv.field_size_limit(LONGEST_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            lines = csv.reader(file, delimiter="\t")
            columns, number = next(lines, []), 1
            for number, fields in enumerate(lines, 2):
                if not fields:
                    continue
                if len(fields) != len(columns):
                    raise ValueError(f"{path} row {number} has {len(fields)} fields, its header {len(columns)}")
                yield dict(zip(columns, fields))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} row {number + 1} cannot be read ({error})") from error
    if number == 1:
        raise ValueError(f"{path} has no rows")


def write_tsv(path: pathlib.Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Writes a table through a temporary file, with every field in quotes."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode("utf-8"))


def write_xlsx(path: pathlib.Path, rows: Sequence[Mapping[str, str]], numbers: Sequence[str] = ()) -> None:
    """Writes a workbook of one sheet through a temporary file; missing values are empty cells.

    Text stays text: a value such as `=1+1` is no formula. Characters that XML cannot hold become spaces. A text longer
    than `LONGEST_CELL` is truncated with a warning.

    Args:
      path: the file.
      rows: all with the same columns.
      numbers: columns of integers; the other columns are text.
    """
    import openpyxl  # a slow import, which few actions need
    from openpyxl.cell import WriteOnlyCell

    workbook = openpyxl.Workbook(write_only=True)
    sheet = workbook.create_sheet("Sheet1")

    def text_cell(text: str) -> Any:
        text = _CONTROL.sub(" ", text)
        if text[:1] not in ("=", "#"):
            return text or None
        cell = WriteOnlyCell(sheet, text)  # else openpyxl reads a formula or an error
        cell.data_type = "s"
        return cell

    columns = list(rows[0])
    sheet.append([text_cell(column) for column in columns])
    for row in rows:
        sheet.append([int(row[name]) if name in numbers else text_cell(row[name]) for name in columns])
    cut = sum(len(value) > LONGEST_CELL for row in rows for value in row.values())
    if cut:
        warnings.warn(f"{path} holds the first {LONGEST_CELL} characters of {cut} longer texts", stacklevel=2)
    write_bytes(path, _workbook_bytes(workbook))


def _workbook_bytes(workbook: Any) -> bytes:
    """The file of an openpyxl workbook, with `FIRST_DAY` as every date."""
    from openpyxl.writer.excel import ExcelWriter

    workbook.properties.created = workbook.properties.modified = FIRST_DAY
    dated, data = io.BytesIO(), io.BytesIO()
    ExcelWriter(workbook, zipfile.ZipFile(dated, "w")).save()
    with zipfile.ZipFile(dated) as parts, zipfile.ZipFile(data, "w") as archive:
        for name in parts.namelist():
            part = zipfile.ZipInfo(name, FIRST_DAY.timetuple()[:6])
            archive.writestr(part, parts.read(name), zipfile.ZIP_DEFLATED)
    return data.getvalue()


def read_xlsx(path: pathlib.Path) -> list[Line]:
    """The rows of the first sheet of a workbook as {column: text}; a formula counts with its last result.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is no workbook, or has no rows.
    """
    import openpyxl

    if not path.is_file():
        raise FileNotFoundError(f"table {path} does not exist")
    try:
        workbook = openpyxl.load_workbook(io.BytesIO(path.read_bytes()), read_only=True, data_only=True)
        sheet = workbook.worksheets[0]
        sheet.reset_dimensions()  # some programs write a wrong size
        rows = [row for row in sheet.iter_rows(values_only=True) if any(cell is not None for cell in row)]
    except (zipfile.BadZipFile, ElementTree.ParseError, OSError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not an .xlsx workbook ({error})") from error
    if len(rows) < 2:
        raise ValueError(f"{path} has no rows")
    columns = {index: str(name) for index, name in enumerate(rows[0]) if name is not None}
    return [
        {name: _cell_text(row[index]) if index < len(row) else "" for index, name in columns.items()}
        for row in rows[1:]
    ]


def _cell_text(value: Any) -> str:
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, bool) else str(value)


def read_table(path: pathlib.Path) -> list[Line]:
    """The rows of a `.tsv` or `.xlsx` table.

    Raises:
      FileNotFoundError, ValueError: the table cannot be read.
    """
    if path.suffix not in (".tsv", ".xlsx"):
        raise ValueError(f"{path} is neither a .tsv nor an .xlsx table")
    return read_xlsx(path) if path.suffix == ".xlsx" else list(read_tsv(path))
