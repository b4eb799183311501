//! Objects in the files of other tools, read strictly: a key that nobody knows is refused with the nearest known one, and
//! every error names the file and the key's path in it.

use std::io::Read;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Largest file that is believed to be a recipe.
const MAX_BYTES: u64 = 1 << 20;

/// The text of a recipe's file.
pub fn text(file: &Path) -> Result<String> {
    let mut bytes = Vec::new();
    // It may be a pipe, whose length nobody knows.
    let opened = std::fs::File::open(file).map_err(Error::io("open", file))?;
    opened.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(Error::io("read", file))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(Error::file(file, format!("has more than {MAX_BYTES} bytes, and no recipe has")));
    }
    String::from_utf8(bytes).map_err(|_| Error::file(file, "is no UTF-8 text"))
}

/// Deepest nesting of a recipe in YAML that is read.
const MAX_DEPTH: usize = 64;

/// Refuses YAML that nests deeper than any recipe: a reader's time grows with the square of the depth. The depth is
/// estimated from brackets, dashes and indents, so what stands in strings may make it come out larger or smaller than it is; the
/// reader's time has a limit besides.
pub fn refuse_deep_yaml(file: &Path, text: &str) -> Result<()> {
    let (mut brackets, mut indents) = (0usize, Vec::<usize>::new());
    for (number, line) in text.lines().enumerate() {
        let content = line.trim_start_matches(' ');
        if content.is_empty() || content.starts_with('#') {
            continue;
        }
        let indent = line.len() - content.len();
        while indents.last().is_some_and(|&i| i >= indent) {
            indents.pop();
        }
        indents.push(indent);
        let dashes = content.split(' ').take_while(|w| matches!(*w, "-" | "?" | ":")).count();
        let mut deepest = brackets;
        for c in content.chars() {
            match c {
                '[' | '{' => brackets += 1,
                ']' | '}' => brackets = brackets.saturating_sub(1),
                _ => {}
            }
            deepest = deepest.max(brackets);
        }
        if deepest + dashes + indents.len() > MAX_DEPTH {
            return Err(Error::file(file, format!("line {}: nests deeper than {MAX_DEPTH} levels", number + 1)));
        }
    }
    Ok(())
}

/// A file's JSON; a key that stands twice in one object is an error, not the last of the two.
pub fn json(file: &Path, text: &str) -> Result<Value> {
    let strict: Strict = serde_json::from_str(text).map_err(|e| Error::file(file, format!("is not JSON: {e}")))?;
    Ok(strict.0)
}

/// A value without keys that stand twice.
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor).map(Self)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> std::result::Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, v: bool) -> std::result::Result<Value, E> {
        Ok(v.into())
    }

    fn visit_i64<E>(self, v: i64) -> std::result::Result<Value, E> {
        Ok(v.into())
    }

    fn visit_u64<E>(self, v: u64) -> std::result::Result<Value, E> {
        Ok(v.into())
    }

    fn visit_f64<E>(self, v: f64) -> std::result::Result<Value, E> {
        Ok(v.into())
    }

    fn visit_str<E>(self, v: &str) -> std::result::Result<Value, E> {
        Ok(v.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Value, A::Error> {
        let mut all = Vec::new();
        while let Some(Strict(value)) = seq.next_element()? {
            all.push(value);
        }
        Ok(all.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Value, A::Error> {
        let mut all = Map::new();
        while let Some((key, Strict(value))) = map.next_entry::<String, Strict>()? {
            if all.contains_key(&key) {
                return Err(serde::de::Error::custom(format_args!("the key {key:?} stands twice in one object")));
            }
            all.insert(key, value);
        }
        Ok(all.into())
    }
}

/// An object, and where it stands.
#[derive(Clone)]
pub struct Object<'a> {
    file: &'a Path,
    path: String,
    map: &'a Map<String, Value>,
}

impl<'a> Object<'a> {
    /// `value`, which stands at `path` of `file`.
    pub fn new(file: &'a Path, path: &str, value: &'a Value) -> Result<Self> {
        let at = if path.is_empty() { String::new() } else { format!("{path}: ") };
        match value {
            Value::Object(map) => Ok(Self { file, path: path.to_owned(), map }),
            other => Err(Error::file(file, format!("{at}is {}, wanted an object", kind(other)))),
        }
    }

    /// An error about `key`.
    pub fn error(&self, key: &str, reason: impl std::fmt::Display) -> Error {
        Error::file(self.file, format!("{}: {reason}", self.at(key)))
    }

    /// An error about the whole object.
    pub fn refuse(&self, reason: impl std::fmt::Display) -> Error {
        let path = if self.path.is_empty() { "the file" } else { &self.path };
        Error::file(self.file, format!("{path}: {reason}"))
    }

    fn at(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// Refuses keys that are not among `known`.
    pub fn only(&self, known: &[&str]) -> Result<()> {
        match self.map.keys().find(|k| !known.contains(&k.as_str())) {
            Some(key) => Err(self.unknown(key, known)),
            None => Ok(()),
        }
    }

    /// The error for a key that is not among `known`.
    pub fn unknown(&self, key: &str, known: &[&str]) -> Error {
        self.error(key, format!("is no known key; {}", suggestion(key, known)))
    }

    /// The keys, in the file's order.
    pub fn keys(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.map.keys().map(String::as_str)
    }

    /// A value; `null` is none.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    fn typed<T>(&self, key: &str, wanted: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match read(value) {
            Some(v) => Ok(Some(v)),
            None => Err(self.error(key, format!("is {}, wanted {wanted}", kind(value)))),
        }
    }

    /// A text.
    pub fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.typed(key, "a text", Value::as_str)
    }

    /// True or false.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    /// A whole number.
    pub fn integer(&self, key: &str) -> Result<Option<i64>> {
        self.typed(key, "a whole number", Value::as_i64)
    }

    /// A whole number that counts something.
    pub fn count(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a whole number, 0 or more", |v| usize::try_from(v.as_u64()?).ok())
    }

    /// A number.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", Value::as_f64)
    }

    /// Texts; one alone may stand without a list.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<String>>> {
        self.typed(key, "a text or a list of texts", |v| match v {
            Value::String(s) => Some(vec![s.clone()]),
            Value::Array(list) => list.iter().map(|s| s.as_str().map(str::to_owned)).collect(),
            _ => None,
        })
    }

    /// An object inside.
    pub fn object(&self, key: &str) -> Result<Option<Object<'a>>> {
        self.get(key).map(|v| Object::new(self.file, &self.at(key), v)).transpose()
    }

    /// `key` as if it held `nothing`.
    pub fn empty(&self, key: &str, nothing: &'a Value) -> Result<Object<'a>> {
        Object::new(self.file, &self.at(key), nothing)
    }

    /// Objects inside.
    pub fn objects(&self, key: &str) -> Result<Vec<Object<'a>>> {
        let Some(list) = self.typed(key, "a list", Value::as_array)? else { return Ok(Vec::new()) };
        let one = |(i, v)| Object::new(self.file, &format!("{}[{i}]", self.at(key)), v);
        list.iter().enumerate().map(one).collect()
    }

    /// Refuses `key` where it has a value, for the reason given.
    pub fn without(&self, key: &str, reason: &str) -> Result<()> {
        match self.get(key) {
            Some(_) => Err(self.error(key, reason)),
            None => Ok(()),
        }
    }
}

fn kind(value: &Value) -> String {
    match value {
        Value::Object(_) => "an object".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Null => "nothing".into(),
        other => other.to_string(),
    }
}

/// The nearest of `known`, where one is near; all of them otherwise.
pub fn suggestion(word: &str, known: &[&str]) -> String {
    let distance = |k: &&&str| strsim::damerau_levenshtein(&word.to_lowercase(), &k.to_lowercase());
    match known.iter().min_by_key(distance).filter(|k| distance(k) <= 1 + word.len().max(k.len()) / 3) {
        Some(near) => format!("did you mean {near}?"),
        None => format!("known are {}", known.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_words_are_suggested() {
        let known = ["group_size", "overrides", "default"];
        assert_eq!(suggestion("groupsize", &known), "did you mean group_size?");
        assert_eq!(suggestion("Override", &known), "did you mean overrides?");
        assert_eq!(suggestion("x", &known), "known are group_size, overrides, default");
    }

    #[test]
    fn errors_name_file_and_path() {
        let value = serde_json::json!({"a": [{"b": 1}], "c": null});
        let object = Object::new(Path::new("f.json"), "", &value).unwrap();
        let inner = &object.objects("a").unwrap()[0];
        assert_eq!(inner.text("b").unwrap_err().to_string(), "f.json: a[0].b: is 1, wanted a text");
        assert_eq!(object.only(&["a"]).unwrap_err().to_string(), "f.json: c: is no known key; did you mean a?");
        assert!(object.object("c").unwrap().is_none() && object.object("a").is_err());
    }
}
