//! Chats -> text, by the checkpoint's own template, as transformers' `apply_chat_template` renders it.
//!
//! The template is `chat_template.jinja`, else `chat_template` in `tokenizer_config.json`. It is Jinja2, run by minijinja with
//! what transformers adds: trimmed blocks, `break` and `continue`, its `tojson`, `raise_exception`, `strftime_now`,
//! `{% generation %}` and Python's methods of strings, lists and dictionaries. There are no tools and no documents.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, ErrorKind, context};
use regex_lite::{Captures, Regex};
use serde_json::Value;

use super::clock::Clock;
use super::config::{self, SpecialTokens, TOKENIZER_CONFIG};
use super::python::{self, Dumps};
use crate::checkpoint::files;
use crate::error::{Error, Result};
use crate::guard::{Limits, limited};

/// Name of the file in a checkpoint's folder.
pub const CHAT_TEMPLATE: &str = "chat_template.jinja";
/// Steps of a template's program; a long chat takes some ten thousand.
const FUEL: u64 = 5_000_000;
/// Largest template that is read; gpt-oss's has 17 kB.
const MAX_BYTES: usize = 256 << 10;
/// Steps are counted inside, but one step can double a text. Operators in a row, of which [`MAX_BYTES`] has 131,000, nest in
/// the reader, which takes some hundred bytes of stack for each.
const LIMITS: Limits = Limits { time: Duration::from_secs(10), memory: 512 << 20, stack: 256 << 20 };

/// Name of the one template in its environment. It has no extension that would switch escaping on.
const NAME: &str = "chat";

/// A template that is ready to render.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    special: SpecialTokens,
    /// Where the template came from.
    file: PathBuf,
}

impl ChatTemplate {
    /// The template of the checkpoint in `dir`; `None` where it has none. `clock` is what the template takes for now.
    pub fn open(dir: &Path, clock: Clock) -> Result<Option<Self>> {
        let Some((file, source)) = find(dir)? else { return Ok(None) };
        // Jinja2 reads every kind of line end as one newline.
        let source = generation_as_with(&source.replace("\r\n", "\n").replace('\r', "\n"));
        if source.len() > MAX_BYTES {
            return Err(Error::file(&file, format!("has more than {MAX_BYTES} bytes, and no chat template has")));
        }
        // Its constants are computed as it is read, so this has limits too.
        let read = limited("the template", LIMITS, move || {
            let mut environment = environment(clock);
            environment.add_template_owned(NAME, source).map(|()| environment).map_err(|e| explain(&e))
        });
        let environment = read
            .and_then(|r| r)
            .map_err(|reason| Error::file(&file, format!("is no chat template that can be read: {reason}")))?;
        Ok(Some(Self { environment: Arc::new(environment), special: SpecialTokens::read(dir)?, file }))
    }

    /// The same, where nothing works without one.
    pub fn require(dir: &Path, clock: Clock) -> Result<Self> {
        Self::open(dir, clock)?.ok_or_else(|| {
            Error::file(
                dir,
                format!(
                    "has no chat template, neither {CHAT_TEMPLATE} nor \"chat_template\" in {TOKENIZER_CONFIG}; copy the \
                     original model's {CHAT_TEMPLATE} into it, or use plain text instead of chats"
                ),
            )
        })
    }

    /// The text of a chat. Each message is an object with a `role` and whatever else the template knows.
    /// `add_generation_prompt` ends it where the assistant begins to speak.
    pub fn render(&self, messages: &[Value], add_generation_prompt: bool) -> Result<String> {
        let special: minijinja::Value = self.special.iter().collect();
        let messages: Vec<_> = messages.iter().map(|m| python::for_template(&with_reasoning(m))).collect();
        let variables = context! {
            messages, add_generation_prompt,
            tools => (), documents => (),
            ..special
        };
        let environment = self.environment.clone();
        let text =
            limited("the template", LIMITS, move || environment.get_template(NAME).and_then(|t| t.render(variables)));
        let explained = text.map(|r| r.map_err(|e| explain(&e)));
        let reason = match explained {
            Ok(Ok(text)) => return Ok(text),
            Ok(Err(reason)) | Err(reason) => reason,
        };
        Err(Error::file(&self.file, format!("cannot render a chat: {reason}")))
    }
}

/// What an assistant thought goes by several names. Like transformers, a message that has one gets `thinking`, which
/// gpt-oss's template reads, in front, and `reasoning_content`, which others read.
fn with_reasoning(message: &Value) -> Value {
    const NAMES: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];
    let Value::Object(fields) = message else { return message.clone() };
    let Some(thought) = NAMES.iter().find_map(|n| fields.get(*n).filter(|v| !v.is_null())) else {
        return message.clone();
    };
    let mut all = serde_json::Map::new();
    all.insert("thinking".into(), thought.clone());
    all.extend(fields.iter().map(|(k, v)| (k.clone(), v.clone())));
    all.insert("reasoning_content".into(), thought.clone());
    Value::Object(all)
}

/// The template's text, as it stands.
pub fn source(dir: &Path) -> Result<Option<String>> {
    find(dir).map(|found| found.map(|f| f.1))
}

/// The template's text and the file that it stands in.
fn find(dir: &Path) -> Result<Option<(PathBuf, String)>> {
    let file = dir.join(CHAT_TEMPLATE);
    if let Some(source) = files::read_text_if_there(&file)? {
        return Ok(Some((file, source)));
    }
    let file = dir.join(TOKENIZER_CONFIG);
    let config = config::read(dir)?;
    let source = match config.get("chat_template") {
        None | Some(Value::Null) => return Ok(None),
        // Several templates by name; without further ado transformers takes `default`.
        Some(Value::Array(list)) => {
            let default = list.iter().find(|t| t["name"] == "default").ok_or_else(|| {
                Error::file(&file, "chat_template is a list without one of the name \"default\"; keep that one")
            })?;
            default.get("template")
        }
        other => other,
    };
    match source.and_then(Value::as_str) {
        Some(source) => Ok(Some((file, source.to_owned()))),
        None => Err(Error::file(&file, "chat_template is neither a string nor a list of {name, template}")),
    }
}

/// transformers marks the assistant's words with `{% generation %}`, a scope that changes nothing in the text. minijinja
/// knows no such tag, but `{% with %}` is a scope as well.
fn generation_as_with(source: &str) -> String {
    let tag = Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").expect("a constant");
    let with = |c: &Captures| {
        let part = |i: usize| c.get(i).map_or("", |m| m.as_str());
        format!("{{%{} {}with {}%}}", part(1), part(2), part(3))
    };
    tag.replace_all(source, with).into_owned()
}

fn environment(clock: Clock) -> Environment<'static> {
    let mut env = Environment::new();
    env.set_fuel(Some(FUEL));
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.set_formatter(|out, state, value| {
        // Of what a template makes itself only these print otherwise than in Python.
        let as_python = match value.kind() {
            ValueKind::Seq | ValueKind::Iterable | ValueKind::Map => Some(python::repr(&plain(value)?)),
            ValueKind::Number if !value.is_integer() => f64::try_from(value.clone()).ok().map(python::float),
            _ => None,
        };
        match as_python {
            Some(text) => out.write_str(&text).map_err(minijinja::Error::from),
            None => minijinja::escape_formatter(out, state, value),
        }
    });
    env.add_filter("tojson", to_json);
    env.add_function("raise_exception", |message: String| -> std::result::Result<(), minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, format!("the template refuses it: {message}")))
    });
    env.add_function("strftime_now", move |format: &str| {
        clock.strftime(format).map_err(|directive| {
            minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now does not know {directive}"))
        })
    });
    env
}

/// transformers' filter: `json.dumps` with its arguments in its order.
fn to_json(
    value: &minijinja::Value,
    ensure_ascii: Option<bool>,
    indent: Option<minijinja::Value>,
    kwargs: Kwargs,
) -> std::result::Result<String, minijinja::Error> {
    let indent = indent.or(kwargs.get("indent")?).filter(|v| !v.is_none());
    let indent = match indent {
        None => None,
        Some(v) => Some(match v.as_str() {
            Some(text) => text.to_owned(),
            // Of a message, not of a document: no template indents deeper.
            None => " ".repeat(usize::try_from(v)?.min(64)),
        }),
    };
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let separators = match separators.as_deref() {
        None => None,
        Some([item, key]) => Some((item.clone(), key.clone())),
        Some(_) => return Err(minijinja::Error::new(ErrorKind::InvalidOperation, "tojson wants two separators")),
    };
    let ensure_ascii = ensure_ascii.or(kwargs.get("ensure_ascii")?).unwrap_or(false);
    let sort_keys = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    kwargs.assert_all_used()?;
    if value.is_undefined() {
        return Err(minijinja::Error::new(ErrorKind::UndefinedError, "tojson of what is not defined"));
    }
    Ok(Dumps { ensure_ascii, indent, separators, sort_keys }.json(&plain(value)?))
}

fn plain(value: &minijinja::Value) -> std::result::Result<Value, minijinja::Error> {
    serde_json::to_value(value)
        .map_err(|e| minijinja::Error::new(ErrorKind::BadSerialization, format!("a value has no JSON: {e}")))
}

/// The message with its line; minijinja names templates, of which there is one.
fn explain(error: &minijinja::Error) -> String {
    let what = match (error.kind(), error.detail()) {
        (ErrorKind::InvalidOperation, Some(detail)) => detail.to_owned(),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    };
    error.line().map_or(what.clone(), |line| format!("line {line}: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn folder(template: &str, config: &Value) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        if !template.is_empty() {
            std::fs::write(dir.path().join(CHAT_TEMPLATE), template).unwrap();
        }
        std::fs::write(dir.path().join(TOKENIZER_CONFIG), config.to_string()).unwrap();
        dir
    }

    fn render(template: &str, messages: &Value) -> Result<String> {
        let dir = folder(template, &json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}}));
        ChatTemplate::require(dir.path(), Clock::FIXED)?.render(messages.as_array().unwrap(), true)
    }

    fn rendered(template: &str, messages: &Value) -> String {
        render(template, messages).unwrap()
    }

    #[test]
    fn blocks_are_trimmed_as_transformers_trims_them() {
        let template = "{{ bos_token }}\n{% for m in messages %}\r\n    {% if m.role == 'user' %}\n[{{ m.content | trim }}]\n    \
                        {%- endif %}\n{% endfor %}\n{% if add_generation_prompt %}\nassistant:{% endif %}\n";
        let messages = json!([{"role": "user", "content": " a\n"}, {"role": "x"}, {"role": "user", "content": "b"}]);
        assert_eq!(rendered(template, &messages), "<s>\n[a][b]assistant:");
    }

    #[test]
    fn python_is_spoken() {
        let messages = json!([{"role": "user", "content": "<b>É & 'q'</b>", "n": 1e16, "extra": {"k": [1, null]}}]);
        for (template, want) in [
            ("{{ messages[0].extra | tojson }}", r#"{"k": [1, null]}"#),
            ("{{ messages[0].content | tojson }}", r#""<b>É & 'q'</b>""#),
            ("{{ messages[0].content[:4] | tojson(ensure_ascii=true) }}", r#""<b>\u00c9""#),
            ("{{ messages[0].extra | tojson(indent=1) }}", "{\n \"k\": [\n  1,\n  null\n ]\n}"),
            ("{{ messages[0].extra }}", "{'k': [1, None]}"),
            ("{{ messages[0].n }} {{ true }} {{ none }}", "1e+16 True None"),
            ("{{ messages[0].content.split('>')[-2].strip().startswith('É') }}", "True"),
            ("{% for k, v in messages[0].items() %}{{ k }};{% endfor %}", "role;content;n;extra;"),
            ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
            ("{% set ns = namespace(n=0) %}{% for i in [1, 2] %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "3"),
            ("{%- generation -%}  {% set x = 1 %}{{ x }}  {%- endgeneration %}{{ x }}", "1"),
            ("{{ strftime_now('%Y-%m-%d') }}", "2025-08-05"),
            ("{{ tools is none }} {{ nothing }} {{ eos_token }} {{ pad_token is defined }}", "True  </s> False"),
        ] {
            assert_eq!(rendered(template, &messages), want, "{template}");
        }
    }

    #[test]
    fn what_a_template_refuses_is_told() {
        let messages = json!([{"role": "tool"}]);
        for (template, want) in [
            (
                "\n{{ raise_exception('no ' + messages[0].role) }}",
                "cannot render a chat: line 2: the template refuses it: no tool",
            ),
            ("{{ strftime_now('%Q') }}", "strftime_now does not know %Q"),
            ("{% if %}", "is no chat template that can be read: line 1: "),
            ("{{ messages[0].a.b }}", "cannot render a chat: line 1: undefined"),
            ("{{ nothing | tojson }}", "tojson of what is not defined"),
            ("{{ 1 | tojson(foo=1) }}", "foo"),
            ("{% include 'other' %}", "cannot render"),
        ] {
            let e = render(template, &messages).unwrap_err().to_string();
            assert!(e.contains(want) && e.contains(CHAT_TEMPLATE), "{template}: {e}");
        }
    }

    #[test]
    fn the_file_comes_before_the_config() {
        let open = |dir: &tempfile::TempDir| ChatTemplate::open(dir.path(), Clock::FIXED);
        let text = |dir: &tempfile::TempDir| open(dir).unwrap().unwrap().render(&[], false).unwrap();
        assert_eq!(text(&folder("file", &json!({"chat_template": "config"}))), "file");
        assert_eq!(text(&folder("", &json!({"chat_template": "config"}))), "config");
        let list = json!([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]);
        assert_eq!(text(&folder("", &json!({"chat_template": list}))), "d");
        assert!(open(&folder("", &json!({}))).unwrap().is_none());
        assert!(open(&folder("", &json!({"chat_template": [{"name": "x", "template": "t"}]}))).is_err());
        assert!(open(&folder("", &json!({"chat_template": 7}))).is_err());
        let e = ChatTemplate::require(folder("", &json!({})).path(), Clock::Now).unwrap_err().to_string();
        assert!(e.contains("has no chat template") && e.contains("plain text"), "{e}");
    }
}
