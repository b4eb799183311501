//! A file -> its documents, one by one. The name says what it is: `.jsonl` and `.json` hold a JSON object a line, `.parquet`
//! a row each, everything else is plain text and one document. What is packed with gzip is unpacked on the way, whatever its name.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::bufread::MultiGzDecoder;
use serde_json::Value;

use super::rows::{Document, Placed, Rows};
use crate::checkpoint::files;
use crate::error::{Error, Result};

/// Documents in the order of the file. Nothing is read before it is asked for. The first error ends it.
pub type Documents = Box<dyn Iterator<Item = Result<Placed>>>;

/// The documents of `file`.
pub fn open(file: &Path, rows: Rows) -> Result<Documents> {
    let name = file.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let unpacked = name.strip_suffix(".gz").unwrap_or(&name);
    if [".csv", ".tsv"].iter().any(|end| unpacked.ends_with(end)) {
        let reason = "is a table with separators, which is not read as text: save it as JSON Lines with a field text, as \
                      Parquet, or as plain text";
        return Err(Error::file(file, reason));
    }
    let documents: Documents = if name.ends_with(".parquet") {
        Box::new(super::parquet::open(file, rows)?)
    } else {
        let mut plain = BufReader::new(files::open(file)?);
        let start = plain.fill_buf().map_err(Error::io("read", file))?;
        if let Some((_, what)) = UNREAD.iter().find(|(magic, _)| start.starts_with(magic)) {
            return Err(Error::file(file, format!("is {what}")));
        }
        let input: Box<dyn BufRead> = if start.starts_with(GZIP) || name != unpacked {
            Box::new(BufReader::new(MultiGzDecoder::new(plain)))
        } else {
            Box::new(plain)
        };
        let name = unpacked;
        if name.ends_with(".jsonl") || name.ends_with(".json") {
            let mut lines = Lines { file: file.to_path_buf(), input, number: 0, rows };
            Box::new(until_error(move || lines.read()))
        } else {
            Box::new(std::iter::once(plain_text(file, input)))
        }
    };
    Ok(match rows {
        Rows::Joined(_) => Box::new(std::iter::once_with(move || joined(documents))),
        _ => documents,
    })
}

/// What a file begins with that is packed with gzip.
const GZIP: &[u8] = &[0x1f, 0x8b];
/// What others begin with, and what to do with them.
const UNREAD: [(&[u8], &str); 4] = [
    (&[0x28, 0xb5, 0x2f, 0xfd], "packed with zstd, which is not read: unpack it, or pack it with gzip"),
    (&[0xfd, b'7', b'z', b'X', b'Z'], "packed with xz, which is not read: unpack it, or pack it with gzip"),
    (b"PK\x03\x04", "a ZIP archive, which is not read: unpack it"),
    (b"PAR1\x15", "Parquet by its content: its name has to end with .parquet"),
];

/// Bytes of the largest document that is read, unpacked: of a line, or of a file of plain text.
const LARGEST: u64 = 512 << 20;

fn refuse_large(file: &Path, bytes: &[u8], place: &str) -> Result<()> {
    if bytes.len() as u64 > LARGEST {
        let most = LARGEST >> 20;
        let reason =
            format!("{place}has more than {most} MiB: cut it into smaller documents, one a line of a .jsonl file");
        return Err(Error::file(file, reason));
    }
    Ok(())
}

fn plain_text(file: &Path, input: Box<dyn BufRead>) -> Result<Placed> {
    let mut bytes = Vec::new();
    input.take(LARGEST + 1).read_to_end(&mut bytes).map_err(Error::io("read", file))?;
    refuse_large(file, &bytes, "")?;
    match String::from_utf8(bytes) {
        Ok(text) => Ok(placed(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))),
        Err(e) => Err(Error::file(
            file,
            format!("is no UTF-8 text: byte {} does not belong there", e.utf8_error().valid_up_to()),
        )),
    }
}

/// A text that is a whole file.
fn placed(text: String) -> Placed {
    Placed { document: Document::Text(text), place: String::new() }
}

fn joined(documents: Documents) -> Result<Placed> {
    let mut all = String::new();
    for (i, document) in documents.enumerate() {
        if i > 0 {
            all.push_str(Rows::JOINT);
        }
        match document?.document {
            Document::Text(text) => all.push_str(&text),
            Document::Chat(_) => unreachable!("Rows::Joined makes texts"),
        }
    }
    Ok(placed(all))
}

/// What `read` gives, to its end or its first error.
pub(super) fn until_error(mut read: impl FnMut() -> Result<Option<Placed>>) -> impl Iterator<Item = Result<Placed>> {
    let mut ended = false;
    std::iter::from_fn(move || {
        let document = if ended { None } else { read().transpose() };
        ended = !matches!(document, Some(Ok(_)));
        document
    })
}

/// JSON, an object a line.
struct Lines {
    file: PathBuf,
    input: Box<dyn BufRead>,
    /// Of the line that was read last, from 1.
    number: usize,
    rows: Rows,
}

impl Lines {
    fn read(&mut self) -> Result<Option<Placed>> {
        let mut line = Vec::new();
        loop {
            line.clear();
            self.number += 1;
            let read = (&mut self.input).take(LARGEST + 1).read_until(b'\n', &mut line);
            if read.map_err(Error::io("read", &self.file))? == 0 {
                return Ok(None);
            }
            refuse_large(&self.file, &line, &format!("line {}: ", self.number))?;
            let line = line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&line).trim_ascii();
            if !line.is_empty() {
                let document = self.document(line)?;
                return Ok(Some(Placed { document, place: format!("line {}", self.number) }));
            }
        }
    }

    fn document(&self, line: &[u8]) -> Result<Document> {
        let bad = |reason: String| Error::file(&self.file, format!("line {}: {reason}", self.number));
        match serde_json::from_slice(line) {
            Ok(Value::Object(row)) => self.rows.document(row).map_err(bad),
            Ok(_) => Err(bad("is no JSON object; wanted one like {\"text\": \"...\"} on each line".into())),
            // A list over many lines is what `.json` often is; its first line alone is not JSON.
            Err(_) if self.number == 1 && line.starts_with(b"[") => {
                Err(bad("begins a list; wanted one JSON object like {\"text\": \"...\"} on each line".into()))
            }
            Err(e) => {
                // The line that serde_json names is always its first.
                let reason = e.to_string();
                let reason = reason.split(" at line ").next().unwrap_or_default();
                Err(bad(format!("is not JSON: {reason}, at column {}", e.column())))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn read(name: &str, content: &[u8], rows: Rows) -> Result<Vec<Document>> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(name);
        std::fs::write(&file, content).unwrap();
        open(&file, rows)?.map(|d| d.map(|d| d.document)).collect()
    }

    fn texts(documents: &[Document]) -> Vec<&str> {
        documents.iter().map(|d| if let Document::Text(t) = d { t.as_str() } else { "a chat" }).collect()
    }

    #[test]
    fn the_name_says_what_a_file_is() {
        let lines = b"\xef\xbb\xbf{\"text\": \"a\"}\r\n\n{\"messages\": []}\n{\"text\": \"b\"}";
        let want = vec!["a", "a chat", "b"];
        assert_eq!(texts(&read("x.jsonl", lines, Rows::TextOrMessages).unwrap()), want);
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(lines).unwrap();
        let gz = gz.finish().unwrap();
        assert_eq!(texts(&read("x.JSON.gz", &gz, Rows::TextOrMessages).unwrap()), want);
        assert_eq!(texts(&read("x.jsonl", &gz, Rows::TextOrMessages).unwrap()), want);
        for (content, words) in
            [(&b"\x28\xb5\x2f\xfd."[..], "packed with zstd"), (b"PAR1\x15", "has to end with .parquet")]
        {
            let e = read("x.jsonl", content, Rows::TextOrMessages).unwrap_err().to_string();
            assert!(e.contains("x.jsonl") && e.contains(words), "{e}");
        }
        assert_eq!(texts(&read("x.md", "\u{feff}{é}\n".as_bytes(), Rows::TextOrMessages).unwrap()), ["{é}\n"]);
        assert_eq!(texts(&read("x", b"", Rows::TextOrMessages).unwrap()), [""]);
        assert!(read("x.jsonl", b"", Rows::TextOrMessages).unwrap().is_empty());
        let e = read("x.jsonl.gz", &gz[..gz.len() / 2], Rows::TextOrMessages).unwrap_err().to_string();
        assert!(e.contains("cannot read") && e.contains("x.jsonl.gz"), "{e}");
    }

    #[test]
    fn joined_rows_are_one_document() {
        let lines = b"{\"t\": \"\"}\n{\"t\": \" = A = \\n\"}\n{\"t\": \"b\"}\n";
        assert_eq!(texts(&read("x.jsonl", lines, Rows::Joined("t")).unwrap()), ["\n\n = A = \n\n\nb"]);
    }

    #[test]
    fn a_bad_line_is_named() {
        for (content, want) in [
            (
                &b"{\"text\": \"a\"}\n\n{\"text\": \"b\"\n"[..],
                "x.jsonl: line 3: is not JSON: EOF while parsing an object, at column 12",
            ),
            (b"{\"text\": \"\xff\"}", "line 1: is not JSON"),
            (b"[\n{\"text\": \"a\"}\n]", "line 1: begins a list"),
            (b"7", "line 1: is no JSON object"),
            (b"{\"text\": \"a\"}\n{\"txt\": \"b\"}", "line 2: has no field text or messages; its fields are txt"),
        ] {
            let e = read("x.jsonl", content, Rows::TextOrMessages).unwrap_err().to_string();
            assert!(e.contains(want), "{e}");
        }
        let deep = "{\"text\":".to_owned() + &"[".repeat(100_000);
        assert!(read("x.jsonl", deep.as_bytes(), Rows::TextOrMessages).is_err());
        let e = read("x.txt", b"ab\xffcd", Rows::TextOrMessages).unwrap_err().to_string();
        assert!(e.contains("is no UTF-8 text: byte 2"), "{e}");
        let e = open(Path::new("nowhere.txt"), Rows::TextOrMessages).err().unwrap().to_string();
        assert!(e.contains("cannot open nowhere.txt"), "{e}");
    }

    #[test]
    fn nothing_follows_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x.jsonl");
        std::fs::write(&file, "7\n{\"text\": \"a\"}\n").unwrap();
        let mut documents = open(&file, Rows::TextOrMessages).unwrap();
        assert!(documents.next().unwrap().is_err());
        assert!(documents.next().is_none());
    }
}
