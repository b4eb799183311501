//! The header of one safetensors file: 8 bytes of length, JSON, then the data. Strict: every tensor must lie inside the
//! file, fill exactly its shape, and neither overlap another nor leave a gap. Source: the format's own description,
//! <https://github.com/huggingface/safetensors#format>.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use safetensors::Dtype;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::formats::ggml::Ggml;

/// Bytes of the length field.
const LEN: usize = 8;
/// The format's own upper limit for a header.
const MAX_HEADER: u64 = 100_000_000;

/// One tensor's place in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Element type.
    pub dtype: Dtype,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// First byte, counted from the start of the file.
    pub start: usize,
    /// One past the last byte.
    pub end: usize,
    /// The blocks that its rows consist of, where they are no single numbers: extents still count numbers then, and the type
    /// is U8. GGUF alone has such tensors.
    pub blocks: Option<Ggml>,
}

/// Bytes that `dtype` and `shape` take; `None` where that overflows or does not fill whole bytes.
pub fn byte_len(dtype: Dtype, shape: &[usize]) -> Option<usize> {
    let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
    let bits = elements.checked_mul(dtype.bitsize())?;
    (bits % 8 == 0).then_some(bits / 8)
}

/// JSON object members in file order, doubles included: a map type would hide a name that stands twice.
struct Members(Vec<(String, Value)>);

impl<'de> serde::Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(de: D) -> std::result::Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Members;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a JSON object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Members, A::Error> {
                let mut members = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    members.push(entry);
                }
                Ok(Members(members))
            }
        }
        de.deserialize_map(Collect)
    }
}

#[derive(serde::Deserialize)]
struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

/// Parses and checks the header of `file`, whose whole content is `bytes`.
pub fn parse(file: &Path, bytes: &[u8]) -> Result<BTreeMap<String, TensorInfo>> {
    let (data_start, json) = split(file, bytes)?;
    let Members(members) = serde_json::from_slice(json)
        .map_err(|e| Error::file(file, format!("the header is not a JSON object of tensors: {e}")))?;
    let data_len = bytes.len() - data_start;
    let mut tensors = BTreeMap::new();
    for (name, value) in members {
        if name == "__metadata__" {
            continue;
        }
        let info = entry(file, &name, value, data_start, data_len)?;
        if tensors.insert(name.clone(), info).is_some() {
            return Err(Error::tensor(file, &name, "stands twice in the header"));
        }
    }
    no_gaps(file, &tensors, data_start, bytes.len())?;
    Ok(tensors)
}

/// Splits off the JSON; gives it with the offset at which the data starts.
fn split<'a>(file: &Path, bytes: &'a [u8]) -> Result<(usize, &'a [u8])> {
    let Some(len) = bytes.first_chunk::<LEN>().map(|b| u64::from_le_bytes(*b)) else {
        let n = bytes.len();
        return Err(Error::file(file, format!("{n} bytes are too few for a safetensors file, which starts with 8")));
    };
    if len > MAX_HEADER {
        return Err(Error::file(file, format!("the header claims {len} bytes, the format allows {MAX_HEADER}")));
    }
    let end = LEN + len as usize;
    match bytes.get(LEN..end) {
        Some(json) => Ok((end, json)),
        None => {
            let n = bytes.len();
            Err(Error::file(file, format!("the header ends at byte {end}, the file at {n}: truncated?")))
        }
    }
}

fn entry(file: &Path, name: &str, value: Value, data_start: usize, data_len: usize) -> Result<TensorInfo> {
    let bad = |reason: String| Error::tensor(file, name, reason);
    let e: Entry = serde_json::from_value(value).map_err(|e| bad(format!("unusable header entry: {e}")))?;
    let (start, end) = e.data_offsets;
    if start > end {
        return Err(bad(format!("data_offsets run backwards: {start} to {end}")));
    }
    let want = byte_len(e.dtype, &e.shape)
        .ok_or_else(|| bad(format!("shape {:?} of {} overflows or splits a byte", e.shape, e.dtype)))?;
    if end - start != want {
        let (len, shape, dtype) = (end - start, &e.shape, e.dtype);
        return Err(bad(format!("data_offsets span {len} bytes, shape {shape:?} of {dtype} needs {want}")));
    }
    if end > data_len {
        return Err(bad(format!("ends at data byte {end}, the file has {data_len}: truncated?")));
    }
    Ok(TensorInfo { dtype: e.dtype, shape: e.shape, start: data_start + start, end: data_start + end, blocks: None })
}

fn no_gaps(file: &Path, tensors: &BTreeMap<String, TensorInfo>, data_start: usize, file_len: usize) -> Result<()> {
    let mut order: Vec<_> = tensors.iter().collect();
    order.sort_by_key(|(_, t)| (t.start, t.end));
    let mut at = data_start;
    for (name, t) in order {
        if t.start < at {
            let (start, end) = (t.start - data_start, at - data_start);
            return Err(Error::tensor(
                file,
                name,
                format!("starts at data byte {start}, inside the tensor that ends at {end}"),
            ));
        }
        if t.start > at {
            let (start, end) = (t.start - data_start, at - data_start);
            return Err(Error::tensor(
                file,
                name,
                format!("starts at data byte {start}, after a gap that begins at {end}"),
            ));
        }
        at = t.end;
    }
    if at != file_len {
        return Err(Error::file(file, format!("the tensors end at byte {at}, the file at {file_len}")));
    }
    Ok(())
}

/// One tensor that is to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name in the file.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// A tensor to be written.
    pub fn new(name: impl Into<String>, dtype: Dtype, shape: impl Into<Vec<usize>>) -> Self {
        Self { name: name.into(), dtype, shape: shape.into() }
    }

    /// Bytes of data.
    pub fn byte_len(&self) -> usize {
        byte_len(self.dtype, &self.shape).expect("shapes come from a validated config, whose sizes do not overflow")
    }
}

/// The header bytes (length field, JSON, padding to 8 bytes) for `specs` in this order.
pub fn encode(specs: &[&TensorSpec]) -> Vec<u8> {
    let mut map = serde_json::Map::new();
    // transformers refuses a file whose metadata does not say for which framework it was written.
    map.insert("__metadata__".into(), serde_json::json!({"format": "pt"}));
    let mut at = 0;
    for spec in specs {
        let end = at + spec.byte_len();
        let entry = serde_json::json!({"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [at, end]});
        map.insert(spec.name.clone(), entry);
        at = end;
    }
    let mut json = Value::Object(map).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut out = (json.len() as u64).to_le_bytes().to_vec();
    out.extend_from_slice(&json);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(json: &str, data: usize) -> Vec<u8> {
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(json.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    fn error(json: &str, data: usize) -> String {
        parse(Path::new("x.safetensors"), &file(json, data)).unwrap_err().to_string()
    }

    #[test]
    fn what_encode_writes_other_readers_and_we_understand() {
        let specs = [
            TensorSpec::new("b", Dtype::BF16, [3, 2]),
            TensorSpec::new("a", Dtype::U8, [5]),
            TensorSpec::new("c", Dtype::I64, []),
        ];
        let mut bytes = encode(&specs.iter().collect::<Vec<_>>());
        assert_eq!(bytes.len() % 8, 0);
        bytes.resize(bytes.len() + 12 + 5 + 8, 7);
        let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(theirs.tensor("b").unwrap().shape(), [3, 2]);
        let ours = parse(Path::new("x"), &bytes).unwrap();
        assert_eq!(&bytes[ours["a"].start..ours["a"].end], theirs.tensor("a").unwrap().data());
        assert_eq!(ours["c"].end, bytes.len());
    }

    #[test]
    fn errors_name_the_tensor_and_both_values() {
        let long = error(r#"{"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#, 3);
        assert_eq!(long, "x.safetensors: tensor w: ends at data byte 4, the file has 3: truncated?");
        let twice = error(
            r#"{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#,
            1,
        );
        assert!(twice.contains("stands twice"), "{twice}");
        let huge = error(r#"{"w":{"dtype":"BF16","shape":[9223372036854775807,4],"data_offsets":[0,4]}}"#, 4);
        assert!(huge.contains("overflows"), "{huge}");
    }
}
