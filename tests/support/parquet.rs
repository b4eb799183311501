//! Parquet files.
#![allow(dead_code, reason = "each test file uses its part")]

use std::sync::Arc;

use parquet::basic::Compression;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

/// One with a column of text, and one of chats.
pub fn samples() -> Vec<Vec<u8>> {
    let chat: &[(&str, &str)] = &[("user", "What is 2 + 2?"), ("assistant", "4.")];
    vec![
        parquet_file(&[("text", &["The first document.", "The second, longer than the first."])]),
        chats_file(&[chat, chat]),
    ]
}

/// A parquet file of string columns.
pub fn parquet_file(columns: &[(&str, &[&str])]) -> Vec<u8> {
    let fields: String = columns.iter().map(|(name, _)| format!("required binary {name} (UTF8); ")).collect();
    let flat: Vec<_> = columns.iter().map(|(_, values)| (*values, None, None)).collect();
    write_parquet(&format!("message m {{ {fields} }}"), &flat)
}

/// A parquet file with a column `messages`; each chat is its messages' (role, content).
pub fn chats_file(chats: &[&[(&str, &str)]]) -> Vec<u8> {
    let schema = "message m { optional group messages (LIST) { repeated group list { optional group element {
        optional binary content (UTF8); optional binary role (UTF8); } } } }";
    let contents: Vec<&str> = chats.iter().flat_map(|c| c.iter().map(|m| m.1)).collect();
    let roles: Vec<&str> = chats.iter().flat_map(|c| c.iter().map(|m| m.0)).collect();
    let repeated: Vec<i16> = chats.iter().flat_map(|c| (0..c.len()).map(|i| i16::from(i > 0))).collect();
    let defined = vec![4i16; repeated.len()];
    let levels = (Some(&defined[..]), Some(&repeated[..]));
    write_parquet(schema, &[(&contents, levels.0, levels.1), (&roles, levels.0, levels.1)])
}

/// Values, and the levels at which they are defined and repeated.
type Column<'a> = (&'a [&'a str], Option<&'a [i16]>, Option<&'a [i16]>);

fn write_parquet(schema: &str, columns: &[Column]) -> Vec<u8> {
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = Arc::new(WriterProperties::builder().set_compression(Compression::SNAPPY).build());
    let mut bytes = Vec::new();
    let mut writer = SerializedFileWriter::new(&mut bytes, schema, properties).unwrap();
    let mut group = writer.next_row_group().unwrap();
    for (values, defined, repeated) in columns {
        let values: Vec<ByteArray> = values.iter().map(|v| ByteArray::from(*v)).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&values, *defined, *repeated).unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
    bytes
}
