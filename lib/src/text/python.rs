//! Values as Python writes them. Chat templates were written for Jinja2, where `{{ x | tojson }}` is `json.dumps` and a
//! printed list is its `repr`; minijinja's own forms differ in blanks, quotes and floats.

use std::fmt::{self, Write};
use std::sync::Arc;

use minijinja::value::{Enumerator, Object, ObjectRepr};
use serde_json::{Map, Number, Value};

/// `value` for a template.
pub fn for_template(value: &Value) -> minijinja::Value {
    match value {
        Value::Array(_) | Value::Object(_) => minijinja::Value::from_object(Container(value.clone())),
        plain => minijinja::Value::from_serialize(plain),
    }
}

/// A list or dictionary that prints as in Python wherever a template makes text of it.
#[derive(Debug)]
struct Container(Value);

impl Object for Container {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        if self.0.is_array() { ObjectRepr::Seq } else { ObjectRepr::Map }
    }

    fn get_value(self: &Arc<Self>, key: &minijinja::Value) -> Option<minijinja::Value> {
        let value = match &self.0 {
            Value::Array(items) => items.get(key.as_usize()?),
            map => map.get(key.as_str()?),
        };
        value.map(for_template)
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        match &self.0 {
            Value::Array(items) => Enumerator::Seq(items.len()),
            Value::Object(map) => Enumerator::Values(map.keys().map(minijinja::Value::from).collect()),
            _ => Enumerator::NonEnumerable,
        }
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&repr(&self.0))
    }
}

/// Arguments of `json.dumps` that templates give.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dumps {
    /// Everything outside ASCII as `\uXXXX`.
    pub ensure_ascii: bool,
    /// What a level is indented by; everything on one line where there is none.
    pub indent: Option<String>,
    /// Between items, and between key and value; Python's own choice where there is none.
    pub separators: Option<(String, String)>,
    /// Keys in alphabetical order.
    pub sort_keys: bool,
}

impl Dumps {
    /// `value` as `json.dumps` writes it.
    pub fn json(&self, value: &Value) -> String {
        let mut out = String::new();
        self.write(&mut out, value, 0);
        out
    }

    fn write(&self, out: &mut String, value: &Value, depth: usize) {
        match value {
            Value::Null => out.push_str("null"),
            Value::Bool(b) => out.push_str(if *b { "true" } else { "false" }),
            Value::Number(n) => out.push_str(&number(n)),
            Value::String(s) => self.string(out, s),
            Value::Array(items) => {
                self.sequence(out, '[', ']', depth, items, |out, item| self.write(out, item, depth + 1));
            }
            Value::Object(map) => {
                let mut entries: Vec<_> = map.iter().collect();
                if self.sort_keys {
                    entries.sort_by_key(|e| e.0);
                }
                let colon = self.separators.as_ref().map_or(": ", |s| &s.1);
                self.sequence(out, '{', '}', depth, &entries, |out, (key, value)| {
                    self.string(out, key);
                    out.push_str(colon);
                    self.write(out, value, depth + 1);
                });
            }
        }
    }

    fn sequence<T>(
        &self,
        out: &mut String,
        open: char,
        close: char,
        depth: usize,
        items: &[T],
        write: impl Fn(&mut String, &T),
    ) {
        let line = |out: &mut String, depth: usize| {
            if let Some(indent) = &self.indent {
                out.push('\n');
                (0..depth).for_each(|_| out.push_str(indent));
            }
        };
        let comma = self.separators.as_ref().map_or(if self.indent.is_some() { "," } else { ", " }, |s| &s.0);
        out.push(open);
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                out.push_str(comma);
            }
            line(out, depth + 1);
            write(out, item);
        }
        if !items.is_empty() {
            line(out, depth);
        }
        out.push(close);
    }

    fn string(&self, out: &mut String, text: &str) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && c > '~') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

/// `value` as Python's `repr` writes it.
pub fn repr(value: &Value) -> String {
    match value {
        Value::Null => "None".into(),
        Value::Bool(b) => if *b { "True" } else { "False" }.into(),
        Value::Number(n) => number(n),
        Value::String(s) => repr_string(s),
        Value::Array(items) => format!("[{}]", items.iter().map(repr).collect::<Vec<_>>().join(", ")),
        Value::Object(map) => format!("{{{}}}", entries(map).join(", ")),
    }
}

fn entries(map: &Map<String, Value>) -> Vec<String> {
    map.iter().map(|(key, value)| format!("{}: {}", repr_string(key), repr(value))).collect()
}

fn repr_string(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            // Python escapes whatever is not printable; of that only the control characters occur in chats.
            c if c.is_control() => {
                let _ = write!(out, "\\x{:02x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

fn number(n: &Number) -> String {
    match n.as_f64() {
        Some(x) if n.is_f64() => float(x),
        _ => n.to_string(),
    }
}

/// A float as Python's `repr` writes it: the shortest digits that come back, with an exponent below 1e-4 and from 1e16.
pub fn float(x: f64) -> String {
    if !x.is_finite() {
        return if x.is_nan() {
            "nan".into()
        } else if x < 0.0 {
            "-inf".into()
        } else {
            "inf".into()
        };
    }
    if x == 0.0 || (1e-4..1e16).contains(&x.abs()) {
        return format!("{x:?}");
    }
    let text = format!("{x:e}");
    let (digits, exponent) = text.split_once('e').expect("{:e} writes an exponent");
    let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |e| ('-', e));
    format!("{digits}e{sign}{exponent:0>2}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const PLAIN: Dumps = Dumps { ensure_ascii: false, indent: None, separators: None, sort_keys: false };

    #[test]
    fn json_has_pythons_blanks() {
        let value = json!({"b": [1, 2.0, null, true], "a": {}, "é": []});
        assert_eq!(PLAIN.json(&value), r#"{"b": [1, 2.0, null, true], "a": {}, "é": []}"#);
        let sorted = Dumps { sort_keys: true, ensure_ascii: true, ..PLAIN };
        assert_eq!(sorted.json(&value), r#"{"a": {}, "b": [1, 2.0, null, true], "\u00e9": []}"#);
        let lines = Dumps { indent: Some("  ".into()), ..PLAIN };
        let want = "{\n  \"b\": [\n    1,\n    2.0,\n    null,\n    true\n  ],\n  \"a\": {},\n  \"é\": []\n}";
        assert_eq!(lines.json(&value), want);
        let tight = Dumps { separators: Some((",".into(), ":".into())), ..PLAIN };
        assert_eq!(tight.json(&value), r#"{"b":[1,2.0,null,true],"a":{},"é":[]}"#);
    }

    #[test]
    fn strings_are_escaped_as_in_python() {
        let text = json!("<a href='x'>&\"\\\n\u{1}\u{8}\u{7f}🔬");
        assert_eq!(PLAIN.json(&text), "\"<a href='x'>&\\\"\\\\\\n\\u0001\\b\u{7f}🔬\"");
        assert_eq!(Dumps { ensure_ascii: true, ..PLAIN }.json(&json!("🔬")), r#""\ud83d\udd2c""#);
        let value = json!(["it's", "a\"b", "'\"", "\n\u{1}é", null, true, {"k": []}]);
        assert_eq!(repr(&value), r#"["it's", 'a"b', '\'"', '\n\x01é', None, True, {'k': []}]"#);
    }

    #[test]
    fn floats_are_pythons() {
        for (x, want) in [
            (1e16, "1e+16"),
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e-5, "1e-05"),
            (1.5e22, "1.5e+22"),
            (123_456_789_012_345_680.0, "1.2345678901234568e+17"),
            (1e15, "1000000000000000.0"),
            (-0.0, "-0.0"),
            (0.0001, "0.0001"),
            (-2.5e-7, "-2.5e-07"),
            (1e300, "1e+300"),
        ] {
            assert_eq!(float(x), want);
        }
    }
}
