"""Files that visitors might upload, by mistake or not: name, content, and a word of the answer; "" = it is read."""

import gzip
import io
import zipfile
import zlib


def pdf(stream=b"BT /F1 12 Tf 20 100 Td (Hello from a page) Tj ET", *, pages=1, more=b"", page_more=b""):
    """A PDF file whose pages all show one content stream."""
    kids = b" ".join(b"%d 0 R" % (5 + i) for i in range(pages))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [" + kids + b"] /Count %d >>" % pages,
        b"<< /Length %d %s>>\nstream\n" % (len(stream), more) + stream + b"\nendstream",
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    page = (
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 200 200] /Contents 3 0 R /Resources << /Font << /F1 4 0 R >> >>"
    )
    objects += [page + page_more + b" >>"] * pages
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n" % number + body + b"\nendobj\n"
    start, size = len(out), len(objects) + 1
    out += b"xref\n0 %d\n0000000000 65535 f \n" % size + b"".join(b"%010d 00000 n \n" % place for place in places)
    return out + b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (size, start)


def zipped(**files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


GOOD = pdf()
BOMB = zlib.compress(bytes(80_000_000), 1)
NESTED = zlib.compress(BOMB, 9)
SCRIPT = b" /AA << /O << /S /JavaScript /JS (app.alert\\(1\\)) >> >>"

PLAIN = [
    ("plain.txt", b"Once upon a time.", ""),
    ("plain.md", b"# Title\n\nWords.", ""),
    ("UPPER.TXT", b"Words.", ""),
    ("bom.txt", b"\xef\xbb\xbfWords.", ""),
    ("utf16-le.txt", "Words é".encode("utf-16"), ""),
    ("utf16-be.txt", b"\xfe\xff" + "Words é".encode("utf-16-be"), ""),
    ("emoji.txt", "🙂 ça va".encode(), ""),
    ("crlf.txt", b"one\r\ntwo\rthree", ""),
    ("form-feed.txt", b"page one\fpage two", ""),
    ("right-to-left.txt", "שלום \u202e abc".encode(), ""),
    ("../../etc/passwd.txt", b"Words.", ""),
    ("C:\\Windows\\win.txt", b"Words.", ""),
    ("; rm -rf ~;.txt", b"Words.", ""),
    ("<script>alert(1)</script>.md", b"<script>alert(1)</script>", ""),
    ("a" * 300 + ".txt", b"Words.", ""),
    ("template.md", b"{{ 7 * 7 }} ${7*7} {% raw %}", ""),
    ("empty.txt", b"", "no text"),
    ("blank.txt", b" \n\t\r\n", "no text"),
    ("only-a-bom.txt", b"\xef\xbb\xbf", "no text"),
    ("half-utf16.txt", b"\xff\xfeW", "not text in UTF"),
    ("surrogate.txt", b"\xff\xfe\x00\xd8", "not text in UTF"),
    ("latin.txt", "café".encode("latin-1"), "not text in UTF"),
    ("broken-utf8.txt", b"Words \xc3", "not text in UTF"),
    ("utf32.txt", "Words".encode("utf-32"), "binary"),
    ("nul.txt", b"Words\0words", "binary"),
    ("zeros.txt", bytes(5000), "binary"),
    ("bells.txt", b"\x07\x1b[31m" * 50, "binary"),
    ("random.txt", bytes((i * 197 + 31) % 256 for i in range(4096)), "not text in UTF"),
    ("program.txt", b"\x7fELF\x02\x01\x01" + bytes(64), "binary"),
    ("picture.md", b"\x89PNG\r\n\x1a\n" + bytes(64), "not text in UTF"),
    ("pickle.txt", b"\x80\x04\x95\x10cos\nsystem\n(S'true'\ntR.", "not text in UTF"),
    ("zip-bomb.txt", zipped(a=bytes(20_000_000)), "not text in UTF"),
    ("gzip-bomb.md", gzip.compress(bytes(20_000_000)), "not text in UTF"),
    ("document.docx", zipped(document="<xml/>"), "must end in"),
    ("archive.zip", zipped(a="b"), "must end in"),
    ("page.html", b"<html></html>", "must end in"),
    ("script.py", b"print(1)", "must end in"),
    ("no-ending", b"Words.", "must end in"),
    (".txt", b"Words.", "must end in"),
    ("", b"Words.", "must end in"),
    ("trap.txt.exe", b"MZ", "must end in"),
    ("trap.pdf\0.txt", b"Words.", ""),
    ("text.pdf", b"Words, no PDF.", "is not what its name"),
    ("pdf.txt", GOOD, "is not what its name"),
    ("empty.pdf", b"", "is not what its name"),
    ("huge.txt", b"a" * 8_000_001, "bytes, and this demo"),
    ("long.txt", b"word " * 30_000, "characters, and this demo"),
]
PDF = [
    ("good.pdf", GOOD, ""),
    ("three-pages.pdf", pdf(pages=3), ""),
    ("mark-behind-rubbish.pdf", b"rubbish\n" + GOOD, ""),
    ("script-inside.pdf", pdf(page_more=SCRIPT), ""),
    ("flate.pdf", pdf(zlib.compress(b"BT /F1 12 Tf (Squeezed) Tj ET"), more=b"/Filter /FlateDecode "), ""),
    ("scan.pdf", pdf(b""), "is the PDF a scan"),
    ("only-a-mark.pdf", b"%PDF-1.7", "damaged"),
    ("truncated.pdf", GOOD[:200], "damaged"),
    ("many-pages.pdf", pdf(pages=501), "more than 500 pages"),
    ("long.pdf", pdf(b"BT /F1 12 Tf (" + b"word " * 30_000 + b") Tj ET"), "more text"),
    ("flate-bomb.pdf", pdf(BOMB, more=b"/Filter /FlateDecode "), "PDF"),
    ("nested-bomb.pdf", pdf(NESTED, more=b"/Filter [/FlateDecode /FlateDecode] "), "PDF"),
    ("pages-of-pages.pdf", GOOD.replace(b"/Kids [5 0 R]", b"/Kids [2 0 R]"), "damaged"),
    ("lies-about-itself.pdf", GOOD.replace(b"/Count 1", b"/Count 99999999999"), ""),
    ("rubbish-inside.pdf", GOOD.replace(b"/Font", b"\xff\x00()<<"), "PDF"),
]
