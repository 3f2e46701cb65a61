"""Tables as VLMEvalKit exchanges them: TSV with quotes, and plain .xlsx, without pandas."""

import csv
import io
import pathlib
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from uae_jax.files.whole import write_bytes

# what pandas reads as a missing value; VLMEvalKit leaves out options and hints of these texts
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
LONGEST_FIELD = 2**31 - 1  # images are base64 text in a field
_SHEET = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
_PARTS = {
    "[Content_Types].xml": '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
    '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    '<Override PartName="/xl/workbook.xml" '
    'ContentType="application/vnd.openxmlformats-officedocument.spreadsheetml.sheet.main+xml"/>'
    '<Override PartName="/xl/worksheets/sheet1.xml" '
    'ContentType="application/vnd.openxmlformats-officedocument.spreadsheetml.worksheet+xml"/></Types>',
    "_rels/.rels": "<Relationships "
    'xmlns="http://schemas.openxmlformats.org/package/2006/relationships"><Relationship Id="rId1" '
    'Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument" '
    'Target="xl/workbook.xml"/></Relationships>',
    "xl/workbook.xml": '<workbook xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main" '
    'xmlns:r="http://schemas.openxmlformats.org/officeDocument/2006/relationships"><sheets><sheet name="Sheet1" '
    'sheetId="1" r:id="rId1"/>'
    "</sheets></workbook>",
    "xl/_rels/workbook.xml.rels": "<Relationships "
    'xmlns="http://schemas.openxmlformats.org/package/2006/relationships"><Relationship '
    'Id="rId1" Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/worksheet" '
    'Target="worksheets/sheet1.xml"/>'
    "</Relationships>",
}

Line = dict[str, str]


def read_tsv(path: pathlib.Path) -> Iterator[Line]:
    """The lines of a TSV with a header, one after the other, as {column: text}.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no header or no lines, or a line with another number of fields (named by number, the header being 1).
    """
    if not path.is_file():
        raise FileNotFoundError(f"table {path} does not exist")
    csv.field_size_limit(LONGEST_FIELD)
    with path.open(encoding="utf-8", newline="") as file:
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
    """Writes a table through a temporary file, every field in quotes."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode("utf-8"))


def _column_name(number: int) -> str:
    name = ""
    while number >= 0:
        number, letter = divmod(number, 26)
        name, number = chr(65 + letter) + name, number - 1
    return name


def write_xlsx(path: pathlib.Path, rows: Sequence[Mapping[str, str]], numbers: Sequence[str] = ()) -> None:
    """Writes a workbook of one sheet through a temporary file; missing values are empty cells.

    Args:
      path: the file.
      rows: all with the same columns.
      numbers: columns of integers, which become numbers; all others are text. Characters that XML cannot hold become
        spaces.
    """
    columns = list(rows[0])
    sheet = ['<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData>']
    for line, row in enumerate([dict(zip(columns, columns)), *rows], 1):
        cells = []
        for index, column in enumerate(columns):
            value, cell = row[column], f"{_column_name(index)}{line}"
            if column in numbers and line > 1:
                cells.append(f'<c r="{cell}"><v>{int(value)}</v></c>')
            elif value != "":
                cells.append(
                    f'<c r="{cell}" t="inlineStr"><is><t '
                    f'xml:space="preserve">{escape(_CONTROL.sub(" ", value))}</t></is></c>'
                )
        sheet.append(f'<row r="{line}">{"".join(cells)}</row>')
    sheet.append("</sheetData></worksheet>")
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in (*_PARTS.items(), ("xl/worksheets/sheet1.xml", "".join(sheet))):
            # a fixed date makes equal tables equal files
            part = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            part.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(part, '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n' + text)
    write_bytes(path, data.getvalue())


def read_xlsx(path: pathlib.Path) -> list[Line]:
    """The rows of the first sheet of a workbook as {column: text}; numbers are written as they are stored.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is not a workbook, or has no rows.
    """
    if not path.is_file():
        raise FileNotFoundError(f"table {path} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            strings = _shared_strings(archive)
            sheet = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml"))
    except (zipfile.BadZipFile, KeyError, ElementTree.ParseError) as error:
        raise ValueError(f"{path} is not an .xlsx workbook ({error})") from error
    rows = [
        {re.match("[A-Z]+", cell.get("r", "A"))[0]: _cell_text(cell, strings) for cell in row.iter(f"{_SHEET}c")}
        for row in sheet.iter(f"{_SHEET}row")
    ]
    if len(rows) < 2:
        raise ValueError(f"{path} has no rows")
    header, *rows = rows
    return [{name: row.get(letter, "") for letter, name in header.items()} for row in rows]


def _shared_strings(archive: zipfile.ZipFile) -> list[str]:
    if "xl/sharedStrings.xml" not in archive.namelist():
        return []
    root = ElementTree.fromstring(archive.read("xl/sharedStrings.xml"))
    return ["".join(text.text or "" for text in item.iter(f"{_SHEET}t")) for item in root.iter(f"{_SHEET}si")]


def _cell_text(cell: ElementTree.Element, strings: Sequence[str]) -> str:
    if cell.get("t") == "inlineStr":
        return "".join(text.text or "" for text in cell.iter(f"{_SHEET}t"))
    value = cell.findtext(f"{_SHEET}v") or ""
    return strings[int(value)] if cell.get("t") == "s" else value


def read_table(path: pathlib.Path) -> list[Line]:
    """The rows of a `.tsv` or `.xlsx` table.

    Raises:
      FileNotFoundError, ValueError: it cannot be read.
    """
    if path.suffix not in (".tsv", ".xlsx"):
        raise ValueError(f"{path} is neither a .tsv nor an .xlsx table")
    return read_xlsx(path) if path.suffix == ".xlsx" else list(read_tsv(path))
