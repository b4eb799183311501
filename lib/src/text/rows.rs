//! One row of a file -> one document.

use serde_json::{Map, Value};

/// A piece of text that stands for itself.
#[derive(Debug, Clone, PartialEq)]
pub enum Document {
    /// Text as it is.
    Text(String),
    /// Messages, each an object with a `role`, for the checkpoint's chat template.
    Chat(Vec<Value>),
}

/// A document and the row that it stands in, for errors: `line 14`, `row 3`, nothing where the file is the document.
#[derive(Debug, Clone, PartialEq)]
pub struct Placed {
    /// The document.
    pub document: Document,
    /// Its place.
    pub place: String,
}

impl Document {
    /// True where there is nothing to read.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Text(text) => text.trim().is_empty(),
            Self::Chat(messages) => messages.is_empty(),
        }
    }
}

/// How a row becomes a document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    /// The field `text`, else the chat in `messages`, else what trainers' files have: `conversations` (ShareGPT),
    /// `instruction`, `input` and `output` (Alpaca), `prompt` and `completion` (TRL).
    TextOrMessages,
    /// A string, or a chat, in the field of this name.
    Field(&'static str),
    /// The field of this name of all rows, with an empty line between them, is one document: how GPTQ's loader and the
    /// perplexities after it read wikitext.
    Joined(&'static str),
    /// `instruction`, `input` and `output` in the words of Alpaca, as llm-compressor has them for open_platypus.
    Alpaca,
    /// `question` and `answer`, as llm-compressor has them for gsm8k.
    QuestionAnswer,
}

impl Rows {
    /// What stands between rows that are joined.
    pub(super) const JOINT: &'static str = "\n\n";

    /// The fields that are read, where a row has them.
    pub(super) fn fields(self) -> Vec<&'static str> {
        match self {
            Self::TextOrMessages => {
                vec!["text", "messages", "conversations", "instruction", "input", "output", "prompt", "completion"]
            }
            Self::Field(name) | Self::Joined(name) => vec![name],
            Self::Alpaca => vec!["instruction", "input", "output"],
            Self::QuestionAnswer => vec!["question", "answer"],
        }
    }

    /// The document in a row, or what is wrong with it.
    pub(super) fn document(self, mut row: Map<String, Value>) -> Result<Document, String> {
        let text = |row: &Map<String, Value>, name: &str| match row.get(name) {
            Some(Value::String(text)) => Ok(text.clone()),
            Some(Value::Null) => Ok(String::new()),
            Some(other) => Err(format!("{name} is {}, wanted a string", kind(other))),
            None => Err(lacks(&format!("field {name}"), row)),
        };
        match self {
            Self::TextOrMessages => match (row.remove("text"), row.remove("messages")) {
                (None | Some(Value::Null), Some(messages)) => whole("messages", messages),
                (Some(text), _) => whole("text", text),
                (None, None) => of_trainers(row),
            },
            Self::Field(name) => match row.remove(name) {
                Some(value) => whole(name, value),
                None => Err(lacks(&format!("field {name}"), &row)),
            },
            Self::Joined(name) => text(&row, name).map(Document::Text),
            Self::Alpaca => {
                let (instruction, output) = (text(&row, "instruction")?, text(&row, "output")?);
                let input = if row.contains_key("input") { text(&row, "input")? } else { String::new() };
                Ok(Document::Text(alpaca(&instruction, &input, &output)))
            }
            Self::QuestionAnswer => {
                let (question, answer) = (text(&row, "question")?, text(&row, "answer")?);
                Ok(Document::Text(format!("Question: {question}\nAnswer: {answer}")))
            }
        }
    }
}

/// The document in a row of a file that a trainer reads.
fn of_trainers(mut row: Map<String, Value>) -> Result<Document, String> {
    if let Some(conversation) = row.remove("conversations") {
        return whole("conversations", sharegpt(conversation)?);
    }
    if row.contains_key("instruction") && row.contains_key("output") {
        return Rows::Alpaca.document(row);
    }
    match (row.remove("prompt"), row.remove("completion")) {
        (Some(Value::String(prompt)), Some(Value::String(completion))) => Ok(Document::Text(prompt + &completion)),
        (Some(Value::Array(mut prompt)), Some(Value::Array(completion))) => {
            prompt.extend(completion);
            whole("prompt", Value::Array(prompt))
        }
        (Some(_), Some(_)) => Err("prompt and completion are not both strings, or both lists of messages".into()),
        (prompt, completion) => {
            let back = [("prompt", prompt), ("completion", completion)];
            row.extend(back.into_iter().filter_map(|(k, v)| Some((k.to_owned(), v?))));
            Err(lacks("field text or messages", &row))
        }
    }
}

/// ShareGPT's `{from, value}` as messages; its `human` is a user and its `gpt` an assistant.
fn sharegpt(conversation: Value) -> Result<Value, String> {
    let Value::Array(turns) = conversation else { return Ok(conversation) };
    let message = |turn: Value| match (turn.get("from").and_then(Value::as_str), turn.get("value")) {
        (Some(from), Some(content)) => {
            let role = match from {
                "human" => "user",
                "gpt" => "assistant",
                other => other,
            };
            serde_json::json!({"role": role, "content": content})
        }
        // Some have messages under this name.
        _ => turn,
    };
    Ok(Value::Array(turns.into_iter().map(message).collect()))
}

fn alpaca(instruction: &str, input: &str, output: &str) -> String {
    let (paired, input) = match input {
        "" => ("", String::new()),
        input => (", paired with an input that provides further context", format!("### Input:\n{input}\n\n")),
    };
    format!(
        "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the \
         request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n{output}"
    )
}

/// A value that is a document by itself.
fn whole(name: &str, value: Value) -> Result<Document, String> {
    match value {
        Value::String(text) => Ok(Document::Text(text)),
        Value::Null => Ok(Document::Text(String::new())),
        Value::Array(messages) => {
            for (i, message) in messages.iter().enumerate() {
                if !message.get("role").is_some_and(Value::is_string) {
                    return Err(format!("{name}[{i}] is {}, wanted an object with a string role", kind(message)));
                }
            }
            Ok(Document::Chat(messages))
        }
        other => Err(format!("{name} is {}, wanted a string or a list of messages", kind(&other))),
    }
}

fn lacks(what: &str, row: &Map<String, Value>) -> String {
    let names: Vec<&str> = row.keys().take(12).map(String::as_str).collect();
    format!("has no {what}; its fields are {}", if names.is_empty() { "none".into() } else { names.join(", ") })
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn document(rows: Rows, row: Value) -> Result<Document, String> {
        let Value::Object(row) = row else { panic!("an object") };
        rows.document(row)
    }

    fn text(rows: Rows, row: Value) -> String {
        match document(rows, row) {
            Ok(Document::Text(text)) => text,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn rows_become_what_llm_compressor_makes_of_them() {
        let row = json!({"instruction": "Add.", "input": "1 2", "output": "3", "data_source": "x"});
        assert_eq!(
            text(Rows::Alpaca, row),
            "Below is an instruction that describes a task, paired with an input that provides further context. Write a \
             response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n\
             ### Response:\n3"
        );
        assert_eq!(
            text(Rows::Alpaca, json!({"instruction": "Go.", "input": "", "output": "Ok."})),
            "Below is an instruction that describes a task. Write a response that appropriately completes the \
             request.\n\n### Instruction:\nGo.\n\n### Response:\nOk."
        );
        assert_eq!(text(Rows::QuestionAnswer, json!({"question": "1+1?", "answer": "2"})), "Question: 1+1?\nAnswer: 2");
    }

    #[test]
    fn text_comes_before_messages_and_a_null_is_empty() {
        assert_eq!(text(Rows::TextOrMessages, json!({"text": "a", "messages": []})), "a");
        let chat = json!([{"role": "user", "content": "hi", "extra": 1}]);
        let got = document(Rows::TextOrMessages, json!({"messages": chat})).unwrap();
        assert_eq!(got, Document::Chat(chat.as_array().unwrap().clone()));
        assert!(document(Rows::TextOrMessages, json!({"text": null})).unwrap().is_empty());
        assert!(document(Rows::Field("x"), json!({"x": " \n"})).unwrap().is_empty());
    }

    #[test]
    fn a_row_that_cannot_be_used_says_why() {
        for (rows, row, want) in [
            (Rows::TextOrMessages, json!({"a": 1, "b": 2}), "has no field text or messages; its fields are a, b"),
            (Rows::TextOrMessages, json!({}), "its fields are none"),
            (Rows::TextOrMessages, json!({"text": 7}), "text is a number"),
            (Rows::TextOrMessages, json!({"messages": [{"role": "user"}, {}]}), "messages[1] is an object"),
            (Rows::Field("q"), json!({"text": "a"}), "has no field q"),
            (Rows::Alpaca, json!({"instruction": "a", "output": ["b"]}), "output is a list"),
        ] {
            let e = document(rows, row).unwrap_err();
            assert!(e.contains(want), "{e}");
        }
    }
}
