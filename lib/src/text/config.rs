//! What `tokenizer_config.json` says beside `tokenizer.json`. A checkpoint may lack it.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};

use crate::checkpoint::files;
use crate::checkpoint::source::read_object;
use crate::error::{Error, Result};

/// Name of the file in a checkpoint's folder.
pub const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// The names under which transformers hands special tokens to chat templates.
const NAMES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Special tokens by their role: `eos_token` -> `<|return|>`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialTokens(BTreeMap<&'static str, String>);

impl SpecialTokens {
    /// Reads them from `dir/tokenizer_config.json`; none where there is no such file.
    pub fn read(dir: &Path) -> Result<Self> {
        let file = dir.join(TOKENIZER_CONFIG);
        let config = read(dir)?;
        let mut tokens = BTreeMap::new();
        for name in NAMES {
            // Older files have an object with the token's `content` and how it is matched.
            let token = match config.get(name) {
                None | Some(Value::Null) => continue,
                Some(Value::Object(token)) => token.get("content"),
                other => other,
            };
            let token = token.and_then(Value::as_str).ok_or_else(|| {
                Error::file(&file, format!("{name} is neither a string nor an object with a string \"content\""))
            })?;
            tokens.insert(name, token.to_owned());
        }
        Ok(Self(tokens))
    }

    /// The token of a role such as `eos_token`.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// Roles and tokens.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.0.iter().map(|(name, token)| (*name, token.as_str()))
    }
}

/// The whole file; empty where there is none.
pub(super) fn read(dir: &Path) -> Result<Map<String, Value>> {
    let file = dir.join(TOKENIZER_CONFIG);
    if files::is_there(&file)? { read_object(&file) } else { Ok(Map::new()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_may_be_strings_or_objects_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(SpecialTokens::read(dir.path()).unwrap(), SpecialTokens::default());
        let write = |text: &str| std::fs::write(dir.path().join(TOKENIZER_CONFIG), text).unwrap();
        write(r#"{"eos_token": {"content": "</s>", "lstrip": false}, "bos_token": "<s>", "pad_token": null}"#);
        let tokens = SpecialTokens::read(dir.path()).unwrap();
        assert_eq!(tokens.iter().collect::<Vec<_>>(), [("bos_token", "<s>"), ("eos_token", "</s>")]);
        write(r#"{"eos_token": 7}"#);
        let e = SpecialTokens::read(dir.path()).unwrap_err().to_string();
        assert!(e.contains("eos_token is neither a string"), "{e}");
    }
}
