//! Rows of a parquet file, of the columns that are needed.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parquet::basic::Compression;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::{ReaderIter, TreeBuilder};
use parquet::record::{Field, Row};
use parquet::schema::types::{SchemaDescPtr, SchemaDescriptor, Type, TypePtr};
use serde_json::{Map, Value};

use super::reader::until_error;
use super::rows::{Placed, Rows};
use crate::checkpoint::files;
use crate::error::{Error, Result};
use crate::guard::guarded;

/// Opens `file`; its columns and their compression are checked before any row is read.
pub(super) fn open(file: &Path, rows: Rows) -> Result<impl Iterator<Item = Result<Placed>> + use<>> {
    let handle = files::open(file)?;
    let reader = checked(file, || SerializedFileReader::new(handle))?;
    let columns = wanted_columns(file, reader.metadata().file_metadata().schema_descr(), rows)?;
    let compressed = reader.metadata().row_groups().iter().flat_map(|g| g.columns()).find(|c| {
        let root = c.column_path().parts().first();
        let readable = matches!(c.compression(), Compression::UNCOMPRESSED | Compression::SNAPPY);
        !readable && root.is_some_and(|r| columns.iter().any(|f| f.name() == r))
    });
    if let Some(c) = compressed {
        return Err(Error::file(
            file,
            format!(
                "column {} is compressed with {}; this tool reads parquet that is not compressed or with SNAPPY: write it \
                 again so, or as jsonl",
                c.column_path().string(),
                c.compression().to_string().split('(').next().unwrap_or_default()
            ),
        ));
    }
    let schema = checked(file, || {
        let root = Type::group_type_builder("schema").with_fields(columns).build()?;
        Ok(Arc::new(SchemaDescriptor::new(Arc::new(root))))
    })?;
    let mut records = Records { file: file.to_path_buf(), reader, schema, rows, group: 0, current: None, row: 0 };
    Ok(until_error(move || records.read()))
}

/// The top-level columns that `rows` reads. `text` alone is enough where there is also `messages`.
fn wanted_columns(file: &Path, schema: &SchemaDescriptor, rows: Rows) -> Result<Vec<TypePtr>> {
    let all = schema.root_schema().get_fields();
    let mut names = rows.fields();
    if rows == Rows::TextOrMessages && all.iter().any(|f| f.name() == "text") {
        names = vec!["text"];
    }
    let found: Vec<TypePtr> = all.iter().filter(|f| names.contains(&f.name())).cloned().collect();
    if found.is_empty() {
        let have: Vec<&str> = all.iter().map(|f| f.name()).collect();
        return Err(Error::file(
            file,
            format!("has no column {}; its columns are {}", names.join(" or "), have.join(", ")),
        ));
    }
    Ok(found)
}

/// The parquet crate answers some damaged files with a panic; here that is one more kind of error.
fn checked<T>(file: &Path, f: impl FnOnce() -> parquet::errors::Result<T>) -> Result<T> {
    match guarded(f) {
        Some(result) => result.map_err(|e| Error::file(file, format!("is no parquet file that can be read: {e}"))),
        None => Err(Error::file(file, "is a damaged parquet file")),
    }
}

struct Records {
    file: PathBuf,
    reader: SerializedFileReader<File>,
    schema: SchemaDescPtr,
    rows: Rows,
    /// The next row group.
    group: usize,
    current: Option<ReaderIter>,
    /// Of the row that was read last, from 1.
    row: usize,
}

impl Records {
    fn read(&mut self) -> Result<Option<Placed>> {
        loop {
            let current = &mut self.current;
            let row = checked(&self.file, || current.as_mut().and_then(Iterator::next).transpose())?;
            if let Some(row) = row {
                self.row += 1;
                let document = object(&row).and_then(|row| self.rows.document(row));
                let place = format!("row {}", self.row);
                return match document {
                    Ok(document) => Ok(Some(Placed { document, place })),
                    Err(reason) => Err(Error::file(&self.file, format!("{place}: {reason}"))),
                };
            }
            if self.group == self.reader.num_row_groups() {
                return Ok(None);
            }
            let (schema, group) = (self.schema.clone(), self.group);
            let rows = checked(&self.file, || TreeBuilder::new().as_iter(schema, &*self.reader.get_row_group(group)?))?;
            self.current = Some(rows);
            self.group += 1;
        }
    }
}

fn object(row: &Row) -> std::result::Result<Map<String, Value>, String> {
    row.get_column_iter().map(|(name, field)| Ok((name.clone(), value(name, field)?))).collect()
}

fn value(name: &str, field: &Field) -> std::result::Result<Value, String> {
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(b) => (*b).into(),
        Field::Byte(n) => (*n).into(),
        Field::Short(n) => (*n).into(),
        Field::Int(n) => (*n).into(),
        Field::Long(n) => (*n).into(),
        Field::UByte(n) => (*n).into(),
        Field::UShort(n) => (*n).into(),
        Field::UInt(n) => (*n).into(),
        Field::ULong(n) => (*n).into(),
        Field::Float(x) => (*x).into(),
        Field::Double(x) => (*x).into(),
        Field::Str(text) => text.as_str().into(),
        // Strings of writers that do not say so.
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => text.into(),
            Err(e) => return Err(format!("{name} is no UTF-8 text: byte {} does not belong there", e.valid_up_to())),
        },
        Field::Group(row) => Value::Object(object(row)?),
        Field::ListInternal(list) => {
            Value::Array(list.elements().iter().map(|e| value(name, e)).collect::<std::result::Result<_, _>>()?)
        }
        other => return Err(format!("{name} holds {other}, which is neither text nor a list of messages")),
    })
}

#[cfg(test)]
mod tests {
    use super::super::reader;
    use super::*;
    use crate::text::rows::Document;
    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    /// One row group; each column with its values, definition and repetition levels.
    type Column<'a> = (&'a [&'a str], Option<&'a [i16]>, Option<&'a [i16]>);

    fn write(file: &Path, schema: &str, compression: Compression, groups: &[&[Column]]) {
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
        let mut writer = SerializedFileWriter::new(File::create(file).unwrap(), schema, properties).unwrap();
        for columns in groups {
            let mut group = writer.next_row_group().unwrap();
            for (values, defined, repeated) in *columns {
                let values: Vec<ByteArray> = values.iter().map(|v| ByteArray::from(*v)).collect();
                let mut column = group.next_column().unwrap().unwrap();
                column.typed::<ByteArrayType>().write_batch(&values, *defined, *repeated).unwrap();
                column.close().unwrap();
            }
            group.close().unwrap();
        }
        writer.close().unwrap();
    }

    const TEXT: &str = "message m { required binary other (UTF8); optional binary text (UTF8); }";
    const CHAT: &str = "message m { optional group messages (LIST) { repeated group list { optional group element {
        optional binary content (UTF8); optional binary role (UTF8); } } } }";

    fn read(file: &Path, rows: Rows) -> Result<Vec<Document>> {
        reader::open(file, rows)?.map(|d| d.map(|d| d.document)).collect()
    }

    #[test]
    fn text_and_chats_come_out_of_columns() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x.parquet");
        let groups: [&[Column]; 2] = [
            &[(&["x", "x"], None, None), (&["a"], Some(&[1, 0]), None)],
            &[(&["x"], None, None), (&["é"], Some(&[1]), None)],
        ];
        write(&file, TEXT, Compression::SNAPPY, &groups);
        let text = |t: &str| Document::Text(t.into());
        assert_eq!(read(&file, Rows::TextOrMessages).unwrap(), [text("a"), text(""), text("é")]);
        assert_eq!(read(&file, Rows::Joined("other")).unwrap(), [text("x\n\nx\n\nx")]);
        let e = read(&file, Rows::Alpaca).unwrap_err().to_string();
        assert!(e.contains("has no column instruction or input or output; its columns are other, text"), "{e}");

        let levels = (Some(&[4i16, 4, 4][..]), Some(&[0i16, 1, 0][..]));
        let group: [Column; 2] =
            [(&["hi", "ho", "hm"], levels.0, levels.1), (&["user", "assistant", "user"], levels.0, levels.1)];
        write(&file, CHAT, Compression::UNCOMPRESSED, &[&group]);
        let message = |role: &str, content: &str| serde_json::json!({"content": content, "role": role});
        let chats = vec![
            Document::Chat(vec![message("user", "hi"), message("assistant", "ho")]),
            Document::Chat(vec![message("user", "hm")]),
        ];
        assert_eq!(read(&file, Rows::TextOrMessages).unwrap(), chats);
        assert_eq!(read(&file, Rows::Field("messages")).unwrap(), chats);
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x.parquet");
        std::fs::write(&file, "not parquet").unwrap();
        let e = read(&file, Rows::TextOrMessages).unwrap_err().to_string();
        assert!(e.contains("x.parquet: is no parquet file that can be read"), "{e}");
        write(&file, "message m { required int32 text; }", Compression::UNCOMPRESSED, &[]);
        assert!(read(&file, Rows::TextOrMessages).unwrap().is_empty());
        let group: [Column; 2] = [(&["x"], None, None), (&["a"], Some(&[1]), None)];
        write(&file, TEXT, Compression::SNAPPY, &[&group]);
        // The codec's number in the footer: SNAPPY is 1, ZSTD 6; zigzag doubles them.
        let bytes = std::fs::read(&file).unwrap();
        let metadata = SerializedFileReader::new(File::open(&file).unwrap()).unwrap();
        assert_eq!(metadata.num_row_groups(), 1);
        let footer = bytes.windows(4).rposition(|w| w == b"text").unwrap();
        let codec = footer + 4;
        assert_eq!(bytes[codec..codec + 2], [0x15, 2], "{:?}", &bytes[footer..footer + 12]);
        let mut zstd = bytes.clone();
        zstd[codec + 1] = 12;
        std::fs::write(&file, zstd).unwrap();
        let e = read(&file, Rows::TextOrMessages).unwrap_err().to_string();
        assert!(e.contains("column text is compressed with ZSTD; this tool reads"), "{e}");
    }

    #[test]
    fn damage_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x.parquet");
        let levels = (Some(&[4i16, 4, 4][..]), Some(&[0i16, 1, 0][..]));
        let group: [Column; 2] =
            [(&["hi", "ho", "hm"], levels.0, levels.1), (&["user", "assistant", "user"], levels.0, levels.1)];
        write(&file, CHAT, Compression::SNAPPY, &[&group]);
        let good = std::fs::read(&file).unwrap();
        for i in 0..good.len() {
            for flip in [0x01, 0x80, 0xff] {
                let mut bad = good.clone();
                bad[i] ^= flip;
                std::fs::write(&file, bad).unwrap();
                // Whatever it is, it ends.
                let _ = read(&file, Rows::TextOrMessages);
            }
            std::fs::write(&file, &good[..i]).unwrap();
            assert!(read(&file, Rows::TextOrMessages).is_err());
        }
    }
}
