//! The header of a GGUF file: magic, version, metadata, tensors; then the data, each tensor at a multiple of the alignment.
//! Strict: every tensor must lie inside the file and fill exactly its shape, and none may overlap another.
//! Source: ggml's `docs/gguf.md`, version 3. Extents stand in a file innermost first, here outermost first.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use safetensors::Dtype;

use super::header::TensorInfo;
use crate::error::{Error, Result};
use crate::formats::ggml::Ggml;

/// First bytes of every GGUF file.
pub const MAGIC: [u8; 4] = *b"GGUF";
/// The version that is written; 2 differs in nothing that is read here.
const VERSION: u32 = 3;
/// Multiples at which tensors begin, unless the metadata says otherwise.
const ALIGNMENT: u64 = 32;
/// Key of another alignment.
const ALIGNMENT_KEY: &str = "general.alignment";
/// Most entries of the metadata, and most tensors, that are believed.
const MAX_ENTRIES: u64 = 1 << 20;
/// Most elements of an array that are believed: a vocabulary's merges, 40 times over.
const MAX_ARRAY: u64 = 1 << 24;

/// A value of the metadata.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// 8, 16 or 32 bits; written as 32.
    U32(u32),
    /// 8, 16 or 32 bits; written as 32.
    I32(i32),
    /// Written as 32 bits.
    F32(f32),
    /// true or false.
    Bool(bool),
    /// Text.
    Text(String),
    /// 64 bits.
    U64(u64),
    /// Some texts.
    Texts(Vec<String>),
    /// Some integers of 32 bits.
    I32s(Vec<i32>),
    /// Something that nobody here asks for.
    Other,
}

/// As messages say it: long texts and lists are cut short.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::U32(n) => write!(f, "{n}"),
            Self::I32(n) => write!(f, "{n}"),
            Self::F32(x) => write!(f, "{x}"),
            Self::Bool(b) => write!(f, "{b}"),
            Self::Text(text) if text.chars().count() > 60 => {
                write!(f, "{:?}...", text.chars().take(60).collect::<String>())
            }
            Self::Text(text) => write!(f, "{text:?}"),
            Self::U64(n) => write!(f, "{n}"),
            Self::Texts(texts) => write!(f, "a list of {} texts", texts.len()),
            Self::I32s(numbers) => write!(f, "a list of {} numbers", numbers.len()),
            Self::Other => write!(f, "of another type"),
        }
    }
}

/// Metadata by key.
pub type Metadata = BTreeMap<String, Value>;

/// How the numbers of a tensor are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// F32, F16 or BF16.
    Float(Dtype),
    /// Blocks.
    Blocks(Ggml),
}

impl Storage {
    const TABLE: [(u32, Self); 11] = [
        (0, Self::Float(Dtype::F32)),
        (1, Self::Float(Dtype::F16)),
        (2, Self::Blocks(Ggml::Q4_0)),
        (3, Self::Blocks(Ggml::Q4_1)),
        (6, Self::Blocks(Ggml::Q5_0)),
        (7, Self::Blocks(Ggml::Q5_1)),
        (8, Self::Blocks(Ggml::Q8_0)),
        (30, Self::Float(Dtype::BF16)),
        (34, Self::Blocks(Ggml::Tq1_0)),
        (35, Self::Blocks(Ggml::Tq2_0)),
        (39, Self::Blocks(Ggml::Mxfp4)),
    ];

    /// ggml's number of it.
    pub fn id(self) -> u32 {
        Self::TABLE.iter().find(|t| t.1 == self).expect("the table is complete").0
    }

    /// The type of the bytes, and the extents in it: blocks are bytes, a row's next to each other.
    pub fn as_bytes(self, shape: &[usize]) -> (Dtype, Vec<usize>) {
        let mut shape = shape.to_vec();
        match self {
            Self::Float(dtype) => (dtype, shape),
            Self::Blocks(ty) => {
                if let Some(row) = shape.last_mut() {
                    *row = ty.row_bytes(*row);
                }
                (Dtype::U8, shape)
            }
        }
    }

    /// Bytes of a tensor of this shape; `None` where blocks do not fill its rows, or on overflow.
    fn byte_len(self, shape: &[usize]) -> Option<usize> {
        if let (Self::Blocks(ty), Some(row)) = (self, shape.last())
            && !row.is_multiple_of(ty.group())
        {
            return None;
        }
        let (dtype, bytes) = self.as_bytes(shape);
        super::header::byte_len(dtype, &bytes)
    }
}

/// A tensor that is to be written.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// ggml's name of it.
    pub name: String,
    /// How it is stored.
    pub storage: Storage,
    /// Extents in numbers, outermost first.
    pub shape: Vec<usize>,
}

/// The header of a file with these tensors in this order, padded to where the data begins, and for each tensor the first
/// byte in the file.
pub fn encode(metadata: &[(String, Value)], tensors: &[Tensor]) -> (Vec<u8>, Vec<u64>) {
    let mut out = MAGIC.to_vec();
    out.extend(VERSION.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        text(&mut out, key);
        put(&mut out, value);
    }
    let (mut at, mut offsets) = (0u64, Vec::with_capacity(tensors.len()));
    for t in tensors {
        text(&mut out, &t.name);
        out.extend((t.shape.len() as u32).to_le_bytes());
        t.shape.iter().rev().for_each(|&n| out.extend((n as u64).to_le_bytes()));
        out.extend(t.storage.id().to_le_bytes());
        out.extend(at.to_le_bytes());
        offsets.push(at);
        let len = t.storage.byte_len(&t.shape).expect("the plan has looked at widths") as u64;
        at = (at + len).next_multiple_of(ALIGNMENT);
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT as usize), 0);
    let data = out.len() as u64;
    (out, offsets.into_iter().map(|at| at + data).collect())
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// A value's type and bytes.
fn put(out: &mut Vec<u8>, value: &Value) {
    let id = |out: &mut Vec<u8>, id: u32| out.extend(id.to_le_bytes());
    let array = |out: &mut Vec<u8>, of: u32, len: usize| {
        [9, of].iter().for_each(|n: &u32| out.extend(n.to_le_bytes()));
        out.extend((len as u64).to_le_bytes());
    };
    match value {
        Value::U32(v) => {
            id(out, 4);
            out.extend(v.to_le_bytes());
        }
        Value::I32(v) => {
            id(out, 5);
            out.extend(v.to_le_bytes());
        }
        Value::F32(v) => {
            id(out, 6);
            out.extend(v.to_le_bytes());
        }
        Value::Bool(v) => {
            id(out, 7);
            out.push(u8::from(*v));
        }
        Value::Text(v) => {
            id(out, 8);
            text(out, v);
        }
        Value::U64(v) => {
            id(out, 10);
            out.extend(v.to_le_bytes());
        }
        Value::Texts(list) => {
            array(out, 8, list.len());
            list.iter().for_each(|v| text(out, v));
        }
        Value::I32s(list) => {
            array(out, 5, list.len());
            list.iter().for_each(|v| out.extend(v.to_le_bytes()));
        }
        Value::Other => unreachable!("nobody writes what nobody reads"),
    }
}

/// Bytes that are read one after the other.
struct Cursor<'a> {
    file: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, n: u64) -> Result<&'a [u8]> {
        let left = &self.bytes[self.at..];
        let n = usize::try_from(n).ok().filter(|&n| n <= left.len()).ok_or_else(|| {
            Error::file(
                self.file,
                format!("the header goes on behind the end at byte {}: truncated?", self.bytes.len()),
            )
        })?;
        self.at += n;
        Ok(&left[..n])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        Ok(self.take(N as u64)?.try_into().expect("as many as were asked for"))
    }

    fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Result<String> {
        let len = self.u64()?;
        let bytes = self.take(len)?.to_vec();
        String::from_utf8(bytes).map_err(|_| Error::file(self.file, "the header holds text that is not UTF-8"))
    }

    fn count(&mut self, what: &str, most: u64) -> Result<u64> {
        match self.u64()? {
            n if n <= most => Ok(n),
            n => Err(Error::file(self.file, format!("the header claims {n} {what}, at most {most} are believed"))),
        }
    }

    /// A value of type `id`; `depth` bounds arrays of arrays.
    fn value(&mut self, id: u32, depth: u32) -> Result<Value> {
        Ok(match id {
            0 => Value::U32(u32::from(self.array::<1>()?[0])),
            1 => Value::I32(i32::from(self.array::<1>()?[0] as i8)),
            2 => Value::U32(u32::from(u16::from_le_bytes(self.array()?))),
            3 => Value::I32(i32::from(i16::from_le_bytes(self.array()?))),
            4 => Value::U32(self.u32()?),
            5 => Value::I32(self.array().map(i32::from_le_bytes)?),
            6 => Value::F32(self.array().map(f32::from_le_bytes)?),
            7 => Value::Bool(self.array::<1>()?[0] != 0),
            8 => Value::Text(self.text()?),
            9 if depth < 4 => {
                let of = self.u32()?;
                let len = self.count("elements of an array", MAX_ARRAY)?;
                match of {
                    8 => Value::Texts((0..len).map(|_| self.text()).collect::<Result<_>>()?),
                    5 => Value::I32s(
                        self.take(len * 4)?.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b)).collect(),
                    ),
                    of => {
                        for _ in 0..len {
                            self.value(of, depth + 1)?;
                        }
                        Value::Other
                    }
                }
            }
            10 => Value::U64(self.u64()?),
            11 => match i64::from_le_bytes(self.array()?) {
                v if v >= 0 => Value::U64(v as u64),
                _ => Value::Other,
            },
            12 => Value::F32(f64::from_le_bytes(self.array()?) as f32),
            other => return Err(Error::file(self.file, format!("the metadata has a value of type {other}"))),
        })
    }
}

/// Parses the header of `file`, whose whole content is `bytes`.
///
/// # Errors
/// [`Error::BadFile`] and [`Error::BadTensor`] for whatever contradicts itself, and for types that this tool does not know.
pub fn parse(file: &Path, bytes: &[u8]) -> Result<(Metadata, BTreeMap<String, TensorInfo>)> {
    let mut c = Cursor { file, bytes, at: 0 };
    if c.array::<4>()? != MAGIC {
        return Err(Error::file(file, "does not begin with GGUF"));
    }
    match c.u32()? {
        2 | 3 => {}
        other => return Err(Error::file(file, format!("is GGUF version {other}, this tool reads 2 and 3"))),
    }
    let tensors = c.count("tensors", MAX_ENTRIES)?;
    let entries = c.count("metadata entries", MAX_ENTRIES)?;
    let mut metadata = Metadata::new();
    for _ in 0..entries {
        let key = c.text()?;
        let id = c.u32()?;
        let value = c.value(id, 0)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(Error::file(file, format!("the metadata key {key} stands twice")));
        }
    }
    let alignment = match metadata.get(ALIGNMENT_KEY) {
        None => ALIGNMENT,
        Some(&Value::U32(n)) if n.is_power_of_two() => u64::from(n),
        Some(other) => return Err(Error::file(file, format!("{ALIGNMENT_KEY} is {other}, no power of two"))),
    };
    let mut listed = Vec::new();
    for _ in 0..tensors {
        listed.push(tensor(&mut c)?);
    }
    let data = (c.at as u64).next_multiple_of(alignment);
    let mut infos = BTreeMap::new();
    for (name, storage, shape, offset) in listed {
        let bad = |reason: String| Error::tensor(file, &name, reason);
        let len = storage
            .byte_len(&shape)
            .ok_or_else(|| bad(format!("shape {shape:?} overflows, or its rows are no whole blocks")))?;
        let start = data.checked_add(offset).filter(|_| offset.is_multiple_of(alignment));
        let start = start.ok_or_else(|| bad(format!("begins at {offset}, no multiple of {alignment}")))?;
        let end = start.checked_add(len as u64).filter(|&e| e <= bytes.len() as u64);
        let end = end.ok_or_else(|| {
            bad(format!("needs {len} bytes from byte {start} on, the file has {}: truncated?", bytes.len()))
        })?;
        let (dtype, blocks) = match storage {
            Storage::Float(dtype) => (dtype, None),
            Storage::Blocks(ty) => (Dtype::U8, Some(ty)),
        };
        let info = TensorInfo { dtype, shape, start: start as usize, end: end as usize, blocks };
        if infos.insert(name.clone(), info).is_some() {
            return Err(Error::tensor(file, &name, "stands twice in the header"));
        }
    }
    no_overlaps(file, &infos)?;
    Ok((metadata, infos))
}

type Listed = (String, Storage, Vec<usize>, u64);

fn tensor(c: &mut Cursor) -> Result<Listed> {
    let name = c.text()?;
    let rank = c.u32()?;
    if rank > 4 {
        return Err(Error::tensor(c.file, &name, format!("has {rank} extents, ggml knows at most 4")));
    }
    let mut shape = Vec::new();
    for _ in 0..rank {
        let n = c.u64()?;
        shape.push(usize::try_from(n).map_err(|_| Error::tensor(c.file, &name, format!("has an extent of {n}")))?);
    }
    shape.reverse();
    let id = c.u32()?;
    let storage = Storage::TABLE.iter().find(|t| t.0 == id).map(|t| t.1);
    let storage = storage.ok_or_else(|| {
        Error::tensor(
            c.file,
            &name,
            format!("is of ggml's type {}; this tool reads F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, TQ1_0, TQ2_0, MXFP4", type_name(id)),
        )
    })?;
    Ok((name, storage, shape, c.u64()?))
}

/// ggml's name of a type, for types that are not read.
fn type_name(id: u32) -> String {
    // ggml.h, enum ggml_type.
    const NAMES: [(u32, &str); 20] = [
        (9, "Q8_1"),
        (10, "Q2_K"),
        (11, "Q3_K"),
        (12, "Q4_K"),
        (13, "Q5_K"),
        (14, "Q6_K"),
        (15, "Q8_K"),
        (16, "IQ2_XXS"),
        (17, "IQ2_XS"),
        (18, "IQ3_XXS"),
        (19, "IQ1_S"),
        (20, "IQ4_NL"),
        (21, "IQ3_S"),
        (22, "IQ2_S"),
        (23, "IQ4_XS"),
        (24, "I8"),
        (25, "I16"),
        (26, "I32"),
        (28, "F64"),
        (29, "IQ1_M"),
    ];
    NAMES.iter().find(|n| n.0 == id).map_or_else(|| format!("number {id}"), |n| n.1.to_owned())
}

/// `NAME-00002-of-00003.gguf` -> (`NAME`, 2, 3): a part of a split file.
fn part_of(name: &str) -> Option<(&str, u32, u32)> {
    let rest = name.strip_suffix(".gguf")?;
    let (rest, count) = rest.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let five = |s: &str| (s.len() == 5).then(|| s.parse().ok())?;
    Some((stem, five(number)?, five(count)?))
}

/// The files of `found`, all GGUF files of `dir`, that make one model: a single one, or all parts of a split one in order.
///
/// # Errors
/// Where parts are missing, or there are several models.
pub(super) fn parts(dir: &Path, found: Vec<PathBuf>) -> Result<Vec<PathBuf>> {
    let name = |p: &PathBuf| p.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let names: Vec<String> = found.iter().map(name).collect();
    let Some((stem, _, count)) = names.first().and_then(|n| part_of(n)) else {
        return match found.len() {
            0 | 1 => Ok(found),
            n => {
                let reason = format!("holds {n} GGUF files; keep the one that is meant in a folder of its own");
                Err(Error::file(dir, reason))
            }
        };
    };
    if let Some(other) = names.iter().find(|n| part_of(n).is_none_or(|(s, _, c)| (s, c) != (stem, count))) {
        let reason =
            format!("holds parts of the split file {stem} and {other} beside them; keep one model in a folder");
        return Err(Error::file(dir, reason));
    }
    for number in 1..=count {
        let wanted = format!("{stem}-{number:05}-of-{count:05}.gguf");
        if !names.contains(&wanted) {
            let reason = format!(
                "holds {} of the {count} parts of a split GGUF file: {wanted} is missing, put it beside the others",
                names.len()
            );
            return Err(Error::file(dir, reason));
        }
    }
    Ok(found)
}

/// Checks that a file's metadata calls it part `number`, from 0, of `count`.
pub(super) fn check_part(file: &Path, metadata: &Metadata, number: usize, count: usize) -> Result<()> {
    let get = |key: &str| match metadata.get(key) {
        Some(&Value::U32(n)) => Some(n as usize),
        Some(&Value::I32(n)) => usize::try_from(n).ok(),
        _ => None,
    };
    let (no, of) = (get("split.no").unwrap_or(0), get("split.count").unwrap_or(1).max(1));
    if (no, of) == (number, count) {
        return Ok(());
    }
    Err(Error::file(
        file,
        format!(
            "says that it is part {} of {of} of a split file, and was taken for part {} of {count}; keep all parts in a folder \
             under the names NAME-00001-of-{of:05}.gguf, or join them with llama-gguf-split --merge",
            no + 1,
            number + 1
        ),
    ))
}

fn no_overlaps(file: &Path, tensors: &BTreeMap<String, TensorInfo>) -> Result<()> {
    let mut order: Vec<_> = tensors.iter().filter(|(_, t)| t.start < t.end).collect();
    order.sort_by_key(|(_, t)| (t.start, t.end));
    match order.windows(2).find(|two| two[1].1.start < two[0].1.end) {
        Some(two) => Err(Error::tensor(file, two[1].0, format!("overlaps {}", two[0].0))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file() -> Vec<u8> {
        let metadata = vec![
            ("a".to_owned(), Value::U32(7)),
            ("b".to_owned(), Value::F32(0.5)),
            ("c".to_owned(), Value::Texts(vec!["x".into(), "\u{120}y".into()])),
            ("d".to_owned(), Value::I32s(vec![1, 3])),
            ("e".to_owned(), Value::Bool(true)),
            ("f".to_owned(), Value::Text("gpt-oss".into())),
        ];
        let tensors = [
            Tensor { name: "t".into(), storage: Storage::Float(Dtype::F32), shape: vec![3] },
            Tensor { name: "u".into(), storage: Storage::Blocks(Ggml::Q5_1), shape: vec![2, 5, 64] },
        ];
        let (mut bytes, at) = encode(&metadata, &tensors);
        assert_eq!(at[1] - at[0], 32);
        bytes.resize(at[1] as usize + 2 * 5 * 2 * 24, 0);
        bytes
    }

    #[test]
    fn what_is_written_is_read() {
        let bytes = file();
        let (metadata, tensors) = parse(Path::new("m.gguf"), &bytes).unwrap();
        assert_eq!(metadata["c"], Value::Texts(vec!["x".into(), "\u{120}y".into()]));
        assert_eq!((&metadata["a"], &metadata["e"]), (&Value::U32(7), &Value::Bool(true)));
        assert_eq!((tensors["u"].blocks, &tensors["u"].shape[..]), (Some(Ggml::Q5_1), &[2, 5, 64][..]));
        assert_eq!(tensors["u"].end, bytes.len());
        assert_eq!(tensors["t"].dtype, Dtype::F32);
    }

    #[test]
    fn a_file_that_ends_anywhere_is_an_error() {
        let bytes = file();
        for len in 0..bytes.len() {
            assert!(parse(Path::new("m.gguf"), &bytes[..len]).is_err(), "{len}");
        }
    }

    proptest! {
        #[test]
        fn no_byte_makes_it_panic(at in 0usize..400, byte: u8, second in 0usize..400) {
            let mut bytes = file();
            let n = bytes.len();
            bytes[at % n] = byte;
            bytes[second % n] ^= byte;
            let _ = parse(Path::new("m.gguf"), &bytes);
        }
    }
}
