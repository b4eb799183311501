//! A tokenizer in the words of a GGUF file: `tokenizer.json` -> `tokenizer.ggml.*`. Source: llama.cpp `src/llama-vocab.cpp`
//! and gguf-py's `constants.py` (kinds of tokens).

use std::path::Path;

use serde_json::{Map, Value as Json};

use super::chat;
use super::config::SpecialTokens;
use super::tokenizer::TOKENIZER;
use crate::checkpoint::files;
use crate::checkpoint::gguf::Value;
use crate::checkpoint::source::read_object;
use crate::error::{Error, Result};
use crate::model::gguf::TOKENS;

/// Kinds of tokens.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

/// How llama.cpp cuts text into words before it merges bytes: the pattern of o200k, which gpt-oss has.
const PRE: &str = "gpt-4o";

/// The keys for the tokenizer of the checkpoint in `dir`, whose config.json is `config`, for `vocab` tokens.
///
/// # Errors
/// [`Error::Refused`] without a tokenizer; [`Error::BadFile`] for one that is no byte-level BPE, or another model's.
pub fn metadata(dir: &Path, config: &Map<String, Json>, vocab: usize) -> Result<Vec<(String, Value)>> {
    let file = dir.join(TOKENIZER);
    if !files::is_there(&file)? {
        return Err(Error::Refused(format!(
            "a GGUF file holds the model's tokenizer, and {} has no {TOKENIZER}: put it (and tokenizer_config.json) there; it is \
             not read out of other GGUF files",
            dir.display()
        )));
    }
    let bad = |reason: String| Error::file(&file, reason);
    let json = read_object(&file)?;
    let none = Json::Null;
    let model = json.get("model").unwrap_or(&none);
    if model["type"] != "BPE" {
        return Err(bad(format!("its model is of type {}, a gpt-oss has BPE", model["type"])));
    }
    let mut tokens: Vec<Option<(String, i32)>> = vec![None; vocab];
    let mut put = |id: Option<u64>, token: &str, kind: i32| match id.and_then(|id| tokens.get_mut(id as usize)) {
        Some(slot) => {
            *slot = Some((token.to_owned(), kind));
            Ok(())
        }
        None => Err(bad(format!("token {token:?} has an id that is none of config.json's {vocab}"))),
    };
    for (token, id) in model["vocab"].as_object().ok_or_else(|| bad("has no vocabulary".into()))? {
        put(id.as_u64(), token, NORMAL)?;
    }
    for added in json.get("added_tokens").and_then(Json::as_array).into_iter().flatten() {
        let kind = if added["special"] == true { CONTROL } else { USER_DEFINED };
        put(added["id"].as_u64(), added["content"].as_str().unwrap_or_default(), kind)?;
    }
    let empty = |i: usize| (format!("[PAD{i}]"), UNUSED);
    let all = tokens.into_iter().enumerate().map(|(i, t)| t.unwrap_or_else(|| empty(i)));
    let (tokens, kinds): (Vec<String>, Vec<i32>) = all.unzip();
    let merge = |m: &Json| match m {
        Json::String(s) => Some(s.clone()),
        Json::Array(two) => Some(format!("{} {}", two.first()?.as_str()?, two.get(1)?.as_str()?)),
        _ => None,
    };
    let merges = model["merges"].as_array().map(|list| list.iter().map(merge).collect::<Option<Vec<String>>>());
    let merges = merges.flatten().ok_or_else(|| bad("its merges are no list of pairs".into()))?;

    let special = SpecialTokens::read(dir)?;
    let id = |name: &str| {
        let named = special.get(&format!("{name}_token")).and_then(|t| tokens.iter().position(|have| have == t));
        let said = match config.get(&format!("{name}_token_id")) {
            Some(Json::Array(list)) => list.first().and_then(Json::as_u64),
            other => other.and_then(Json::as_u64),
        };
        named.or(said.map(|id| id as usize)).filter(|&id| id < vocab).map(|id| Value::U32(id as u32))
    };
    let ids = [("bos", "bos"), ("eos", "eos"), ("pad", "padding")];
    let ids: Vec<(String, Value)> = ids
        .into_iter()
        .filter_map(|(ours, theirs)| id(ours).map(|id| (format!("tokenizer.ggml.{theirs}_token_id"), id)))
        .collect();
    let mut keys = vec![
        ("tokenizer.ggml.model".to_owned(), Value::Text("gpt2".into())),
        ("tokenizer.ggml.pre".to_owned(), Value::Text(PRE.into())),
        (TOKENS.to_owned(), Value::Texts(tokens)),
        ("tokenizer.ggml.token_type".to_owned(), Value::I32s(kinds)),
        ("tokenizer.ggml.merges".to_owned(), Value::Texts(merges)),
    ];
    keys.extend(ids);
    if let Some(template) = chat::source(dir)? {
        keys.push(("tokenizer.chat_template".to_owned(), Value::Text(template)));
    }
    Ok(keys)
}
